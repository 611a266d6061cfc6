"""The choice of experts: its cost against mixtures computed by hand, and the solvers against all choices."""

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optprune.errors import InputError
from optprune.problems import ExpertChoice
from optprune.solvers import ExpertElimination, ExpertFrequency, ExpertSolver, Reap, choose_experts

TOKENS, WIDTH = 40, 5
SOLVERS: tuple[ExpertSolver, ...] = (
    ExpertElimination(),
    ExpertElimination(exhaustive=0),
    Reap(),
    Reap(renormalised=True),
    ExpertFrequency(),
)


def mixture(seed: int, experts: int, alike: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits [tokens, experts] and answers [tokens, experts, width], the second of which may be much alike."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, experts, generator=generator, dtype=torch.float64)
    answers = torch.randn(TOKENS, experts, WIDTH, generator=generator, dtype=torch.float64)
    return logits, (1 - alike) * answers + alike * answers[:, :1]


CORRECTION = torch.tensor([0.3, -0.2, 0.05, -0.4, 0.1], dtype=torch.float64)
"""of a router by sigmoids, large enough that others than the largest are chosen"""


def answered(
    logits: Tensor, answers: Tensor, experts: list[int], chosen: int, normalised: bool, correction: Tensor | None = None
) -> Tensor:
    """What a mixture of these experts alone answers [tokens, width], token by token."""
    rows, added = [], torch.zeros(len(experts)) if correction is None else correction[experts]
    for scores, made in zip(logits[:, experts], answers[:, experts], strict=True):
        shares = scores.exp() / scores.exp().sum() if correction is None else 1 / (1 + (-scores).exp())
        best = sorted(range(len(experts)), key=lambda place: -float(shares[place] + added[place]))[:chosen]
        total = sum(float(shares[place]) for place in best) if normalised else 1.0
        rows.append(sum((float(shares[place]) / total * made[place] for place in best), torch.zeros(WIDTH)))
    return torch.stack(rows)


def mask(experts: int, kept: list[int]) -> Tensor:
    return torch.tensor([expert in kept for expert in range(experts)])


@pytest.mark.parametrize("correction", [None, CORRECTION], ids=["softmax", "sigmoids"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_the_cost_is_that_of_the_mixture_without_the_experts(
    chosen: int, normalised: bool, correction: Tensor | None
) -> None:
    logits, answers = mixture(0, 5)
    problem = ExpertChoice.of(logits, answers, chosen, normalised, 3, correction)
    dense = answered(logits, answers, list(range(5)), chosen, normalised, correction)
    # Infeasible choices too: of fewer experts than are to be kept, or than the router chooses, and of none.
    for kept in (list(each) for size in range(4) for each in combinations(range(5), size)):
        change = (answered(logits, answers, kept, chosen, normalised, correction) - dense).square().sum(1)
        assert problem.objective(mask(5, kept)) == pytest.approx(float(change.mean()) / 2, rel=1e-9)
        share = float(change.sum() / dense.square().sum())
        assert problem.relative_error(mask(5, kept)) == pytest.approx(share, rel=1e-9)
    assert problem.objective(torch.ones(5, dtype=torch.bool)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_outputs_in_half_precision_are_not_rounded_to_it(dtype: torch.dtype) -> None:
    logits, answers = mixture(0, 5)
    given = answers.to(dtype)
    problem = ExpertChoice.of(logits, given, 2, True, 3)
    exact, sizes = given.double() @ given.double().mT, given.double().abs() @ given.double().abs().mT
    # A product of two such numbers is exact in float32; a sum of WIDTH of them is rounded fewer than WIDTH times.
    assert bool(((problem.products.double() - exact).abs() <= WIDTH * 2.0**-24 * sizes).all())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 5), st.booleans(), st.booleans(), st.data())
def test_removals_are_the_costs_of_single_removals(
    seed: int, experts: int, normalised: bool, sigmoids: bool, data: st.DataObject
) -> None:
    correction = CORRECTION[:experts] if sigmoids else None
    problem = ExpertChoice.of(*mixture(seed, experts, alike=0.7), 2, normalised, 2, correction)
    kept = list(data.draw(st.sets(st.integers(0, experts - 1), min_size=3)))
    costs = problem.removal_costs(mask(experts, kept))
    for expert in range(experts):
        rest = [other for other in kept if other != expert]
        expected = problem.objective(mask(experts, rest)) if expert in kept else float("inf")
        assert float(costs[expert]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_a_solver_keeps_as_many_as_it_may_and_never_beats_all_choices(solver: ExpertSolver, seed: int) -> None:
    problem = ExpertChoice.of(*mixture(seed, 6, alike=0.5), 2, seed % 2 == 0, 3)
    found = choose_experts(problem, solver)
    least = min(problem.objective(mask(6, list(kept))) for kept in combinations(range(6), 3))
    assert found.violation == 0 and int(found.kept.sum()) == 3
    assert found.objective >= least * (1 - 1e-12)
    if solver.exact(problem):
        assert found.objective == found.lower_bound == pytest.approx(least)
    else:
        assert found.lower_bound is None


@pytest.mark.e2e
def test_elimination_with_swaps_is_nearer_to_the_best_than_scores() -> None:
    """Over a fixed set: it finds the best choice mostly, and swaps find what elimination alone does not."""
    met = dict.fromkeys(("swaps", "no swaps", "reap", "frequency"), 0)
    solvers = (ExpertElimination(exhaustive=0), ExpertElimination(0, 0), Reap(), ExpertFrequency())
    for seed in range(20):
        problem = ExpertChoice.of(*mixture(seed, 8, alike=0.5), 2, True, 3)
        least = choose_experts(problem, ExpertElimination()).objective
        for name, solver in zip(met, solvers, strict=True):
            met[name] += choose_experts(problem, solver).objective <= least * (1 + 1e-9)
    assert met["swaps"] >= 16 and met["swaps"] > met["no swaps"] >= 12
    assert met["no swaps"] > 2 * max(met["reap"], met["frequency"])


def test_scores_are_those_of_their_papers() -> None:
    """Two of three experts for each of two tokens, by hand."""
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64)
    answers = torch.zeros(2, 3, 2, dtype=torch.float64)
    answers[0] = torch.tensor([[3.0, 4.0], [2.0, 0.0], [7.0, 7.0]])
    answers[1] = torch.tensor([[9.0, 9.0], [0.0, 6.0], [1.0, 0.0]])
    problem = ExpertChoice.of(shares.log(), answers, 2, True, 2)
    assert Reap().score(problem).tolist() == pytest.approx([0.5 * 5, (0.3 * 2 + 0.3 * 6) / 2, 0.6 * 1])
    scaled = [0.5 / 0.8 * 5, (0.3 / 0.8 * 2 + 0.3 / 0.9 * 6) / 2, 0.6 / 0.9 * 1]
    assert Reap(renormalised=True).score(problem).tolist() == pytest.approx(scaled)
    assert ExpertFrequency().score(problem).tolist() == [1, 2, 1]


def test_an_expert_without_tokens_goes_first() -> None:
    logits, answers = mixture(1, 5)
    logits[:, 3] = -50
    problem = ExpertChoice.of(logits, answers, 2, True, 4)
    for solver in SOLVERS:
        found = choose_experts(problem, solver)
        assert not found.kept[3] and found.objective <= 1e-20


@pytest.mark.parametrize("keep", [0, 1, 6])
def test_fewer_than_the_router_chooses_are_refused(keep: int) -> None:
    with pytest.raises(InputError, match=f"{keep} of 5 experts cannot be kept: the router chooses 2.*keep 2 to 5"):
        ExpertChoice.of(*mixture(0, 5), 2, True, keep)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("kept", [torch.ones(3, dtype=torch.bool), torch.ones(4), [True] * 4])
def test_a_choice_that_is_no_mask_of_the_experts_is_refused(kept: Any) -> None:
    problem = ExpertChoice.of(*mixture(0, 4), chosen=2, normalised=True, keep=3)
    with pytest.raises(InputError, match="the choice of experts"):
        problem.objective(kept)


def test_a_problem_of_a_softmax_has_the_fingerprint_that_it_had_before_there_were_sigmoids() -> None:
    """Journals and saved problems know it by that."""
    one = ExpertChoice(torch.zeros(2, 3), torch.zeros(2, 3, 3), 1, True, 2)
    assert one.fingerprint().startswith("7a9ac0b7a5137a47")
    assert ExpertChoice(one.logits, one.products, 1, True, 2, torch.zeros(3)).fingerprint() != one.fingerprint()


def test_the_same_problem_has_the_same_fingerprint() -> None:
    one, other, fewer = (ExpertChoice.of(*mixture(0, 5), 2, True, keep) for keep in (3, 3, 2))
    assert one.fingerprint() == other.fingerprint() != fewer.fingerprint()
