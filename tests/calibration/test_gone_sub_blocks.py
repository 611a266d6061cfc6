"""What it costs that a sub-block is gone: measured as it is, and the last point of a curve then."""

import pytest
import torch

from optprune.allocation.width_costs import WidthCurve
from optprune.calibration import Probe, calibrating
from optprune.models import Decoder, Mlp
from tests.helpers.tiny_models import by_variant
from tests.helpers.token_batches import batches


@by_variant
def test_a_sub_block_can_be_gone_for_a_divergence(make) -> None:
    """As with all that it adds to the hidden states gone, and the model is left as it was."""
    model, dense = make(), make()
    decoder, ids = Decoder(model), torch.cat(batches())[:2, :20]
    index, measured = len(decoder.blocks) - 1, []
    for part in ("attention", "mlp"):
        less = make()
        Decoder(less).remove(index, part)
        with torch.no_grad():
            log_p, log_q = (each(input_ids=ids).logits.double().log_softmax(-1) for each in (dense, less))
        measured.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    with calibrating(decoder):
        probe = Probe(decoder, [ids])
        for block in range(len(decoder.blocks)):
            for part in ("attention", "mlp") if block == index else ():
                probe.try_without(block, part)
            probe.advance()
        assert probe.divergences() == pytest.approx(measured, rel=1e-3) and min(measured) > 1e-5
    assert [type(each) for each in model.modules()] == [type(each) for each in dense.modules()]
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())


def test_between_two_measurements_the_rate_is_between_theirs() -> None:
    predicted = {count: 128.0 - count for count in (96, 64, 32, 0)}
    curve = WidthCurve(0, Mlp(), 128, predicted, in_nats=False)
    assert curve.rescaled({}).losses == predicted
    assert curve.rescaled({64: 128.0}).losses == pytest.approx({96: 64, 64: 128, 32: 192, 0: 256}, rel=1e-5)
    both = curve.rescaled({64: 128.0, 0: 512.0}).losses
    # Twice what was predicted of 64, four times of none: three times of 32, and above 64 twice.
    assert both == pytest.approx({96: 64, 64: 128, 32: 288, 0: 512}, rel=1e-5)
    # Of a loss of nothing no rate makes what was measured.
    assert WidthCurve(0, Mlp(), 128, {64: 0.0, 0: 0.0}).rescaled({0: 7.0}).losses == {64: 0.0, 0: 7.0}
