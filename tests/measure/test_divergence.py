"""Divergence from the dense model against its definition, by torch's losses in float64."""

import math
from statistics import stdev

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from optprune.errors import InputError, NumericalError
from optprune.measure import divergence_from
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama

Pairs = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def some_windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(1))


def literal(model: torch.nn.Module, dense: torch.nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every quantity of every prediction [windows, length - 1]."""
    with torch.no_grad():
        q, p = (one(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for one in (model, dense))
    following = windows[:, 1:].flatten()
    shape = q.shape[:2]
    return {
        "surprise": cross_entropy(q.flatten(0, 1), following, reduction="none").view(shape),
        "dense surprise": cross_entropy(p.flatten(0, 1), following, reduction="none").view(shape),
        "divergence": kl_div(q, p, reduction="none", log_target=True).sum(-1),
        "agreement": (q.argmax(-1) == p.argmax(-1)).double(),
    }


@pytest.mark.parametrize("architecture", TINY_MODELS)
def test_it_is_the_definition(architecture: str) -> None:
    model, dense = (TINY_MODELS[architecture](seed=seed) for seed in (1, 0))
    windows = some_windows(3, 300)
    found, expected = divergence_from(model, dense, windows), literal(model, dense, windows)
    assert found.divergence == pytest.approx(float(expected["divergence"].mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float(expected["agreement"].mean()), abs=1e-12)
    assert found.perplexity == pytest.approx(math.exp(float(expected["surprise"].mean())), rel=1e-6)
    assert found.dense_perplexity == pytest.approx(math.exp(float(expected["dense surprise"].mean())), rel=1e-6)


def test_along_the_context_every_prediction_counts_once() -> None:
    model, dense, windows = tiny_llama(seed=1), tiny_llama(seed=0), some_windows(2, 20)
    found, expected = divergence_from(model, dense, windows).along, literal(model, dense, windows)
    assert [(part.first, part.last) for part in found] == [
        (1, 2), (3, 4), (5, 7), (8, 9), (10, 11), (12, 14), (15, 16), (17, 19)
    ]  # fmt: skip
    for part in found:
        columns = slice(part.first - 1, part.last)
        assert part.divergence == pytest.approx(float(expected["divergence"][:, columns].mean()), rel=1e-5)
        assert part.agreement == pytest.approx(float(expected["agreement"][:, columns].mean()), abs=1e-12)
        assert part.perplexity == pytest.approx(math.exp(float(expected["surprise"][:, columns].mean())), rel=1e-5)


def test_standard_errors_are_those_of_paired_window_means() -> None:
    model, dense, windows = tiny_llama(seed=1), tiny_llama(seed=0), some_windows(5, 20)
    found, expected = divergence_from(model, dense, windows).standard_errors, literal(model, dense, windows)
    assert found is not None and found.windows == 5
    by_window = {
        "surprise": (expected["surprise"] - expected["dense surprise"]).mean(1),
        "divergence": expected["divergence"].mean(1),
        "agreement": expected["agreement"].mean(1),
    }
    for name, means in by_window.items():
        assert getattr(found, name) == pytest.approx(stdev(means.tolist()) / math.sqrt(5), rel=1e-5)


def test_a_single_window_has_no_standard_error() -> None:
    assert divergence_from(tiny_llama(seed=1), tiny_llama(seed=0), some_windows(1, 20)).standard_errors is None


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_llama().train()
    found = divergence_from(model, model, some_windows(2, 3))
    assert (found.divergence, found.agreement) == (0.0, 1.0)
    assert found.perplexity == found.dense_perplexity
    assert len(found.along) == 2
    assert model.training


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(InputError, match="vocabularies of 512 and 256 tokens"):
        divergence_from(tiny_llama(), tiny_llama(vocab_size=256), some_windows(1, 8))


def test_nan_is_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match="gives NaN within the first 2 windows"):
        divergence_from(tiny_llama(), model, some_windows(2, 8))
