"""The head of a probe: the dense model's predictions are made once, whatever is tried."""

import pytest
import torch

from optprune.calibration import Change, Probe, calibrating
from optprune.calibration import divergence as divergence_module
from optprune.models import Decoder
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches


def test_the_head_answers_once_for_the_dense_model_and_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of a batch, whose sums are those of all at once."""
    monkeypatch.setattr(divergence_module, "POSITIONS_AT_ONCE", 7)
    model, ids, rows = tiny_llama().double(), torch.cat(batches())[:3, :20], list[int]()
    found = list[list[float]]()
    for split in (list(ids.split(2)), [ids]):
        decoder = Decoder(model)
        with calibrating(decoder):
            probe = Probe(decoder, split)
            for block in range(len(decoder.blocks)):
                for path in ("self_attn.o_proj", "mlp.down_proj"):
                    layer = decoder.layer(block, path)
                    probe.try_out([Change(layer, layer.weight * 0.5, None)])
                probe.advance()
            handle = model.lm_head.register_forward_hook(lambda _, __, output: rows.append(output[..., 0].numel()))
            found.append(probe.divergences())
            handle.remove()
    changes = 2 * len(decoder.blocks)
    assert sum(rows) == 2 * (1 + changes) * ids.numel() and max(rows) == 7
    assert found[0] == pytest.approx(found[1], rel=1e-9) and len(set(found[0])) == changes
