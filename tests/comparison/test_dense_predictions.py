"""The dense model's predictions are computed once, and a model beside them is as far from them as it is."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optprune import load_recipe, prune
from optprune.comparison import DensePredictions, dense
from optprune.errors import NumericalError
from optprune.measure import divergence_from, perplexity
from optprune.models import Decoder, open_model
from tests.helpers.tiny_models import by_variant, save_tiny, tiny_llama
from tests.helpers.token_batches import batches


def windows() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(5, 500, (5, 40), generator=generator)


@by_variant
def test_a_pruned_model_is_as_far_as_divergence_from_says(make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pruned = make(), make()
    # So that the windows come in several batches, the last of them smaller.
    monkeypatch.setattr(dense, "TOKENS_AT_ONCE", 80)
    kept = DensePredictions(Decoder(model), windows())
    prune(pruned, batches(), load_recipe("fasp", {"sparsity": 0.3, "units": "mlp"}))
    found, expected = kept.divergence_to(Decoder(pruned)), divergence_from(pruned, model, windows())
    for what, value in asdict(expected).items():
        if what == "standard_errors":
            assert asdict(found.standard_errors) == pytest.approx(value, rel=1e-5)
        elif what != "along":
            assert getattr(found, what) == pytest.approx(value, rel=1e-5), what
    assert found.divergence > 0.001
    itself = kept.itself()
    assert itself.perplexity == pytest.approx(perplexity(model, windows()).perplexity, rel=1e-6)
    assert (itself.divergence, itself.agreement) == (0.0, 1.0)


def test_the_dense_model_is_gone_through_once() -> None:
    model = tiny_llama()
    kept = DensePredictions(Decoder(model), windows())
    expected = kept.itself()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
    # What is kept is what it was, whatever becomes of the blocks.
    assert kept.itself() == expected
    assert kept.divergence_to(Decoder(model)).divergence > 0.001


def test_blocks_may_be_read_one_at_a_time(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    opened, other = open_model(folder, device="cpu"), tiny_llama(1)
    found = DensePredictions(opened.decoder(), windows(), tmp_path).divergence_to(Decoder(other))
    assert found == DensePredictions(Decoder(tiny_llama()), windows()).divergence_to(Decoder(other))
    assert all(weight.is_meta for weight in opened.model.model.layers.parameters())


def test_a_model_that_gives_nan_is_told() -> None:
    kept, broken = DensePredictions(Decoder(tiny_llama()), windows()), tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        kept.divergence_to(Decoder(broken))
