"""Rows that take over the probability of removed tokens: the problem, its solver, and the text that is predicted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.texts import Text, demo_articles
from optprune.tokens import HeadMatching, States, match_head, prune_vocabulary
from tests.helpers.fewer_tokens import KEEP, bits_per_byte, loaded
from tests.helpers.tiny_models import tiny_llama, tiny_opt
from tests.helpers.trained_tiny import trained

TOKENS = 8192


@pytest.mark.e2e
def test_refitted_rows_predict_other_text_better() -> None:
    texts = [Text("news", demo_articles("calibration")[:40])]
    model, articles = trained(200), demo_articles("evaluation")[:60]
    dense = bits_per_byte(loaded(model), articles)
    plain, _ = prune_vocabulary(loaded(model), texts, KEEP, tokens=0)
    fitted, change = prune_vocabulary(loaded(model), texts, KEEP, tokens=TOKENS)
    assert change.divergence_before is not None and change.divergence_after is not None
    assert change.divergence_after < 0.8 * change.divergence_before
    without, refitted = bits_per_byte(plain, articles), bits_per_byte(fitted, articles)
    assert refitted - dense < 0.8 * (without - dense)


def test_the_head_has_the_refitted_rows() -> None:
    """They are those that the refit returns, and what a model without refit has elsewhere."""
    texts, seen = [Text("news", demo_articles("calibration")[:4])], list[Tensor]()

    def watched(*given: Any, **named: Any) -> Any:
        found = match_head(*given, **named)
        seen.append(found.rows)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optprune.tokens.prune.match_head", watched)
        fitted, _ = prune_vocabulary(loaded(tiny_llama()), texts, KEEP, tokens=2048)
    plain, _ = prune_vocabulary(loaded(tiny_llama()), texts, KEEP, tokens=0)
    rows, before = (one.model.get_output_embeddings().weight.detach() for one in (fitted, plain))
    changed = (rows != before).any(1)
    (refitted,) = seen
    assert 0 < int(changed.sum()) <= len(refitted) and refitted.shape[1] == rows.shape[1]
    assert all((refitted == row).all(1).any() for row in rows[changed])


def states(count: int, seed: int = 0) -> States:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 6, generator=generator)
    truth = hidden @ torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
    others = torch.ones(count)
    targets = (truth - torch.logaddexp(truth.logsumexp(1), others)[:, None]).exp()
    return States(hidden, targets, others, 0.5 + torch.rand(count, generator=generator))


def problem(ridge: float = 0.0) -> HeadMatching:
    return HeadMatching(states(300), torch.zeros(5, 6), ridge=ridge)


def objective(problem: HeadMatching, rows: Tensor) -> Tensor:
    """The objective by its formula."""
    s, change = problem.states, rows - problem.start
    logits = torch.cat([s.hidden @ rows.t(), s.others[:, None]], 1).double()
    targets = torch.cat([s.targets, 1 - s.targets.sum(1, keepdim=True)], 1).double()
    apart = (torch.xlogy(targets, targets) - targets * logits.log_softmax(1)).sum(1)
    gram = (s.hidden * s.weights[:, None]).t() @ s.hidden / s.weights.sum()
    probable = (s.targets * s.weights[:, None]).sum(0) / s.weights.sum()
    pull = problem.ridge / 2 * torch.einsum("i,ik,kl,il->", probable, change, gram, change)
    return (s.weights * apart).sum() / s.weights.sum() + pull


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_problem_measures_its_formula(ridge: float) -> None:
    stated = problem(ridge)
    for seed in range(3):
        rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        assert stated.objective(rows) == pytest.approx(float(objective(stated, rows)), rel=1e-5)
    rows = rows.requires_grad_()
    slopes = stated.slopes(stated.states, stated.logits(stated.states, rows.detach()))
    (expected,) = torch.autograd.grad(objective(problem(), rows), rows)
    found = slopes.t() @ stated.states.hidden / stated.states.weights.sum()
    assert torch.allclose(found, expected.float(), atol=1e-6)


def test_rows_that_give_the_targets_are_found() -> None:
    matched = match_head(problem(), states(100, seed=1), epochs=60, batch=32)
    assert matched.before > 0.3
    assert matched.after < 0.01 * matched.before
    assert torch.allclose(matched.rows, torch.randn(6, 5, generator=torch.Generator().manual_seed(9)).t(), atol=0.15)


def test_rows_that_fit_stay() -> None:
    truth = torch.randn(6, 5, generator=torch.Generator().manual_seed(9)).t().contiguous()
    matched = match_head(HeadMatching(states(300), truth), states(100, seed=1), epochs=2)
    assert matched.epochs == 0
    assert torch.equal(matched.rows, truth)


def test_a_ridge_pulls_towards_the_start() -> None:
    free, pulled = (match_head(problem(ridge), states(100, seed=1), epochs=20, batch=32) for ridge in (0.0, 10.0))
    assert float(pulled.rows.norm()) < 0.5 * float(free.rows.norm())


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama], ids=["learned positions", "rotary"])
def test_pieces_of_a_text_stay_within_the_positions_of_the_model(make: Any) -> None:
    """A text has more pieces than tokens, so they are cut; a token of more pieces than positions is refused."""
    texts, read = [Text("news", demo_articles("calibration")[:4])], list[int]()
    few = loaded(make(max_position_embeddings=12))
    few.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: read.append(ids[0].shape[1]))
    _, change = prune_vocabulary(few, texts, KEEP, tokens=512, predictions=512)
    assert change.divergence_after is not None and max(read) == 12
    with pytest.raises(InputError, match=r"becomes \d that stay, more than the 2 positions of the model: keep"):
        prune_vocabulary(loaded(make(max_position_embeddings=2)), texts, KEEP, tokens=512, predictions=0)
