"""A rotated residual stream changes nothing, and its first directions make a model of the stock class."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import hidden_size
from benchmarks.hidden_size import EXACT, INEXACT, NARROWED, end, narrow, restore, rotate, stream_basis
from optprune.errors import InputError
from optprune.models import ARCHITECTURES, Decoder
from tests.helpers.tiny_models import ALL_MODELS, tiny_llama, tiny_qwen2
from tests.helpers.token_batches import batches

TOKENS = torch.arange(10, 42)[None]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def some_basis(size: int = 64, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


def change(model: PreTrainedModel) -> float:
    """How far a rotation moves a logit."""
    return float((logits(rotate(copy.deepcopy(model), some_basis())) - logits(model)).abs().max())


def in_few_directions(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """The model, folded and changed so that nothing writes to the last directions of its stream."""
    folded = rotate(model, torch.eye(64))
    state = folded.state_dict()
    for name, weight in state.items():
        if name.endswith("embed_tokens.weight"):
            weight[:, keep:] = 0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[keep:] = 0
    return folded


def test_every_family_is_rotated_or_refused() -> None:
    assert {*EXACT, *INEXACT} == set(ARCHITECTURES) and not {*EXACT} & {*INEXACT}
    assert {*NARROWED} < {*EXACT}


@pytest.mark.parametrize("family", EXACT)
def test_a_rotation_changes_no_logit(family: str) -> None:
    assert change(ALL_MODELS[family]()) < 1e-4


@pytest.mark.parametrize("family", NARROWED)
def test_in_double_precision_it_changes_less(family: str) -> None:
    # The norms of transformers compute in float32 even then.
    assert change(ALL_MODELS[family]().double()) < 1e-5


@pytest.mark.parametrize("family", INEXACT)
def test_other_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(InputError, match=f"the residual stream of a {family} model cannot be rotated: .*norms"):
        rotate(ALL_MODELS[family](), some_basis())


@pytest.mark.parametrize("fault", ["the gains stay", "a basis that is not orthogonal", "the wrong way round"])
def test_a_fault_in_a_rotation_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, basis = tiny_qwen2(), some_basis()
    if fault == "the gains stay":
        monkeypatch.setattr(hidden_size, "fold_gains", lambda decoder: None)
    elif fault == "a basis that is not orthogonal":
        basis = basis + 0.01 * torch.eye(64)
    before = logits(model)
    rotated = rotate(copy.deepcopy(model), basis)
    if fault == "the wrong way round":
        embedding = rotated.get_input_embeddings().get_parameter("weight").data
        embedding.copy_(model.get_input_embeddings().get_parameter("weight").data @ basis.T.float())
    assert (logits(rotated) - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", NARROWED)
def test_directions_that_hold_nothing_are_cut_without_a_change(family: str) -> None:
    model = in_few_directions(ALL_MODELS[family](), 56)
    before = logits(model)
    smaller = narrow(model, 56)
    assert smaller.config.hidden_size == 56 and type(smaller) is type(model)
    # The norms add their epsilon to a mean over fewer numbers.
    assert (logits(smaller) - before).abs().max() < 1e-3
    # Nor does restoration change what has lost nothing: the ridge draws towards the weights that there are.
    streams = restore(smaller, model, batches(), 0.01)
    streams.refit_readers(end(Decoder(model)), end(Decoder(smaller)), 0.01)
    assert (logits(smaller) - before).abs().max() < 1e-3


@pytest.mark.parametrize("kind", hidden_size.BASES)
def test_the_last_directions_are_those_that_hold_nothing(kind: str) -> None:
    model = in_few_directions(tiny_llama(), 56)
    basis = stream_basis(model, batches(), kind)
    assert torch.allclose(basis.T @ basis, torch.eye(64, dtype=torch.float64), atol=1e-9)
    last = basis[:56, 56:].abs().max()
    assert last < 1e-2 if kind == "variance" else last < 0.1


def test_sizes_that_no_config_takes_are_refused() -> None:
    with pytest.raises(InputError, match="a hidden size of 57 is not a multiple of the 4 heads"):
        narrow(rotate(tiny_llama(), some_basis()), 57)
    with pytest.raises(InputError, match="phi3 models are only rotated"):
        narrow(rotate(ALL_MODELS["phi3"](), some_basis()), 56)
