"""The loss of distillation against scipy and against autograd over whole logits, and faults that these must notice."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from optprune.healing import distillation
from optprune.healing.distillation import Reader, add_gradient, surprise_and_divergence
from optprune.measure import divergence_from
from tests.helpers.faults import noticed
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama
from tests.helpers.token_batches import batches

by_model = pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS)


def plain(model: PreTrainedModel) -> Reader:
    return Reader(model, lambda: torch.autocast("cpu", enabled=False))


def pair(make=tiny_llama) -> tuple[PreTrainedModel, PreTrainedModel]:
    return make(), make(1)


def by_scipy(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    """The mean KL(teacher || student) over the predictions that a token follows."""
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits[:, :-1].double().numpy() for model in (student, teacher))
    p, q = (np.exp(log_softmax(logits, axis=-1)) for logits in (theirs, ours))
    return float(rel_entr(p, q).sum(-1).mean())


@by_model
def test_the_loss_is_that_of_scipy(make, monkeypatch) -> None:
    monkeypatch.setattr(distillation, "POSITIONS_AT_ONCE", 7)  # which does not divide what there is
    student, teacher = pair(make)
    ids = torch.cat(batches(1))
    found = add_gradient(plain(student), plain(teacher), ids, ids[:, 1:].numel())
    assert found == pytest.approx(by_scipy(student, teacher, ids), rel=1e-5)
    hidden = plain(teacher).hidden(ids)
    sums = surprise_and_divergence(plain(student), plain(teacher), ids, hidden) / ids[:, 1:].numel()
    expected = divergence_from(student, teacher, ids)
    assert sums[2] == pytest.approx(expected.divergence, rel=1e-5)
    assert sums[:2].exp().tolist() == pytest.approx([expected.perplexity, expected.dense_perplexity], rel=1e-5)


@by_model
def test_the_gradient_is_that_of_whole_logits(make, monkeypatch) -> None:
    """Of all parameters, the head and the embeddings that are tied to it too."""
    monkeypatch.setattr(distillation, "POSITIONS_AT_ONCE", 7)
    student, teacher = pair(make)
    whole = copy.deepcopy(student)
    ids = torch.cat(batches(1))
    for part in ids.split(1):
        add_gradient(plain(student), plain(teacher), part, ids[:, 1:].numel())
    log_q = whole(input_ids=ids).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        p = teacher(input_ids=ids).logits[:, :-1].softmax(-1)
    (-(p * log_q).sum() / ids[:, 1:].numel()).backward()  # the cross entropy has the same gradient
    for name, weight in whole.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(student.get_parameter(name).grad, weight.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_another_direction_is_noticed(monkeypatch) -> None:
    def flipped(log_q: Tensor, log_p: Tensor) -> Tensor:
        return functional.kl_div(log_p, log_q, reduction="sum", log_target=True)

    def test() -> None:
        student, teacher = pair()
        ids = torch.cat(batches(1))
        found = add_gradient(plain(student), plain(teacher), ids, ids[:, 1:].numel())
        assert found == pytest.approx(by_scipy(student, teacher, ids), rel=1e-3)

    noticed(monkeypatch, distillation, "divergence", flipped, test)


def test_a_model_that_agrees_has_no_gradient() -> None:
    student = tiny_llama()
    ids = torch.cat(batches(1))
    found = add_gradient(plain(student), plain(copy.deepcopy(student)), ids, ids[:, 1:].numel())
    assert abs(found) < 1e-7
    other = tiny_llama()
    add_gradient(plain(other), plain(tiny_llama(1)), ids, ids[:, 1:].numel())
    for own, apart in zip(student.parameters(), other.parameters(), strict=True):
        assert own.grad is not None and apart.grad is not None
        assert own.grad.norm() <= 1e-5 * apart.grad.norm()


def test_a_model_whose_logits_are_not_its_heads_is_refused(monkeypatch) -> None:
    class Capped(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return 3 * torch.tanh(hidden)

    model = tiny_llama()
    plain(model).check(batches(1)[0])
    model.model.register_forward_hook(lambda *_: None)
    forward = model.forward

    def capped(**inputs):
        found = forward(**inputs)
        found.logits = Capped()(found.logits)
        return found

    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(ValueError, match="the logits of a llama model differ from its head"):
        plain(model).check(batches(1)[0])
