"""Descents on block matching: every concrete one keeps the laws, and meets references on small cases."""

import inspect

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from optprune.problems import BlockMatching, Example
from optprune.problems import matching as problem_module
from optprune.problems.matching import KeptEntries, Point
from optprune.solvers import Adam, Descent, Lbfgs, Status, descent, match
from optprune.solvers.adam import AdamState
from optprune.solvers.descent import Rounding
from optprune.testing import Listed, check_descent, matchings
from optprune.testing.matching import affine_optimum
from optprune.testing.strategies import concrete
from optprune.work import Work
from tests.helpers.gated_block import gated

DESCENTS = {"Adam": Adam(), "Lbfgs": Lbfgs(), "Adam, slow": Adam(2, 1e-3), "Lbfgs, one pair": Lbfgs(5, 1)}
FEWER = settings(max_examples=max(settings().max_examples // 4, 1))


def test_every_descent_is_in_the_table() -> None:
    assert {cls for cls in concrete(Descent) if not inspect.isabstract(cls)} == {type(one) for one in DESCENTS.values()}


@pytest.mark.e2e
@pytest.mark.parametrize("examples", [4, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", DESCENTS.values(), ids=DESCENTS)
def test_it_keeps_every_law(solver: Descent, examples: int) -> None:
    check_descent(solver, examples=examples)


@FEWER
@given(matchings(affine=True))
def test_lbfgs_meets_least_squares(problem: BlockMatching) -> None:
    """What the problem's own reference finds, within the square of the gradient that is left."""
    before, best = problem.objective(), affine_optimum(problem)
    found = problem.objective(match(problem, Lbfgs(400, 20, 1e-10)).value)
    assert -1e-9 * before <= found - best <= 1e-6 * (before - best) + 1e-12 * before


@pytest.mark.e2e
@FEWER
@given(matchings(affine=True))
def test_adam_comes_close_to_least_squares(problem: BlockMatching) -> None:
    before, best = problem.objective(), affine_optimum(problem)
    found = problem.objective(match(problem, Adam(400, 0.1)).value)
    assert found - best <= 0.1 * (before - best) + 1e-9 * before


@pytest.mark.slow
def test_lbfgs_goes_as_far_as_that_of_scipy() -> None:
    """On a block that is not convex, from the same start, with as many steps: about the same objective."""
    problem = gated()
    start, before = problem.point(), problem.objective()

    def unpacked(flat: np.ndarray) -> tuple[Tensor, ...]:
        parts = torch.from_numpy(flat).split([len(part) for part in start])
        return tuple(part * unit for part, unit in zip(parts, problem.units, strict=True))

    def packed(point: tuple[Tensor, ...], power: int) -> np.ndarray:
        return torch.cat([part * unit**power for part, unit in zip(point, problem.units, strict=True)]).numpy()

    def measured(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = problem.gradient(unpacked(flat))
        return value, packed(slope, 1)

    theirs = scipy.optimize.minimize(
        measured, packed(start, -1), jac=True, method="L-BFGS-B", options={"maxiter": 300, "maxcor": 8}
    )
    problem.put(start)
    ours = problem.objective(match(problem, Lbfgs(300)).value)
    assert float(theirs.fun) < before / 10
    assert ours <= 1.1 * float(theirs.fun)


def flat(point: Point, problem: BlockMatching, power: int) -> Tensor:
    """A point or a gradient, in units of the problem's tensors to a power."""
    return torch.cat([part * unit**power for part, unit in zip(point, problem.units, strict=True)])


def test_the_direction_is_that_of_the_last_pairs() -> None:
    """H from its definition (BFGS), a matrix: from a multiple of the identity, a rank-two update for each pair."""
    problem, solver = gated(), Lbfgs(40, 3)
    state = solver.begin(problem)
    points, slopes = [flat(problem.point(), problem, -1)], [flat(problem.gradient()[1], problem, 1)]
    for _ in range(7):
        state = solver.step(problem, state)
        points.append(flat(problem.point(), problem, -1))
        slopes.append(flat(problem.gradient()[1], problem, 1))
    pairs = [(b - a, d - c) for a, b, c, d in zip(points, points[1:], slopes, slopes[1:], strict=False)][-3:]
    assert all(float(move @ change) > 0 for move, change in pairs)
    identity = torch.eye(len(points[0]), dtype=torch.float64)
    move, change = pairs[-1]
    inverse = identity * (move @ change) / (change @ change)
    for move, change in pairs:
        rho = 1 / (move @ change)
        left = identity - rho * torch.outer(move, change)
        inverse = left @ inverse @ left.T + rho * torch.outer(move, move)
    expected = inverse @ slopes[-1]
    found = torch.cat(list(solver._direction(state, sum(one.count for one in problem.entries))))
    # The moves are differences of points of size 1: a rounding of those, over the moves.
    rounding = 2.0**-52 * len(expected) / min(float(move.norm()) for move, _ in pairs)
    assert float((found - expected).norm()) <= 100 * rounding * float(expected.norm())


class Saturated(nn.Module):
    """tanh v times the input: beyond v = -0.7 the error's slope grows on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([-2.0], dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gain.tanh()


def test_a_pair_of_negative_curvature_is_left_out() -> None:
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    problem, solver = BlockMatching.of(Saturated(), Listed((Example((ones,), {}, ones),))), Lbfgs()
    before = solver.begin(problem)
    after = solver.step(problem, before)
    assert after.value < before.value and float(after.slope[0]) < float(before.slope[0]) < 0
    assert after.pairs == () and solver.step(problem, after).value < after.value


def test_looks_without_a_gain_are_counted_from_the_last_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after three in a row, however many there were before."""
    looks = [9, 10, 10, 8, 10, 10, 7, 10, 10, 10]
    errors = iter(map(float, [10, 10, *looks, 7]))
    monkeypatch.setattr(BlockMatching, "error", lambda self, point=None: next(errors))
    found = match(gated(), Lbfgs(40), Listed(()))
    assert (found.steps, found.tried, found.held_out) == (7, 10, 7.0)


def test_adam_is_that_of_torch_in_units() -> None:
    problem, solver = gated(), Adam(3, 0.02)
    steps = 3 * problem.examples.draws
    start = problem.point()
    theirs = [weight.clone().requires_grad_() for weight in start]
    groups = [{"params": [weight], "lr": unit} for weight, unit in zip(theirs, problem.units, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=solver.memory, eps=1e-20)
    for step in range(steps):
        _, slope = problem.gradient(tuple(weight.detach() for weight in theirs), step)
        for weight, part in zip(theirs, slope, strict=True):
            weight.grad = part.clone()
        for group, unit in zip(optimiser.param_groups, problem.units, strict=True):
            group["lr"] = unit * solver.rate_at(step, steps)
        optimiser.step()
    problem.put(start)
    state = solver.begin(problem)
    for _ in range(steps):
        state = solver.step(problem, state)
    for ours, other in zip(problem.point(), theirs, strict=True):
        torch.testing.assert_close(ours, other.detach(), rtol=1e-6, atol=1e-9)


def test_the_rate_grows_and_goes_to_zero() -> None:
    solver = Adam(10, 0.5)
    rates = [solver.rate_at(step, 50) for step in range(50)]
    assert max(rates) == pytest.approx(0.5) and rates.index(max(rates)) in (4, 5)
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01


def check_rate() -> None:
    problem = gated()
    before = problem.objective()
    found = match(problem, Adam(12, 1.0))
    assert found.steps > 0
    assert problem.objective() < 0.9 * before


def test_a_rate_that_is_too_high_is_taken_back() -> None:
    check_rate()


def test_a_descent_that_does_not_go_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adam, "restart", Descent.restart)
    with pytest.raises(AssertionError):
        check_rate()


def overfitting() -> tuple[BlockMatching, Listed]:
    """Targets with noise, fewer examples than weights: what fits them is worse elsewhere sooner or later."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(12, 4, bias=False).double()
    truth = torch.randn(4, 12, generator=generator, dtype=torch.float64)

    def example() -> Example:
        hidden = torch.randn(1, 6, 12, generator=generator, dtype=torch.float64)
        noise = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)
        return Example((hidden,), {}, hidden @ truth.T + 4 * noise)

    with torch.no_grad():
        linear.weight.copy_(truth + 0.6 * torch.randn(4, 12, generator=generator, dtype=torch.float64))
    return BlockMatching.of(linear, Listed((example(), example()))), Listed(tuple(example() for _ in range(8)))


def check_held_out() -> None:
    problem, apart = overfitting()
    found = match(problem, Lbfgs(60), apart)
    judge = problem.on(apart)
    last = match(overfitting()[0], Lbfgs(60))
    assert found.held_out == judge.error(found.value) <= found.held_out_before
    assert judge.error(last.value) > found.held_out
    assert found.steps < found.tried < last.tried
    assert found.tried - found.steps == descent.PATIENCE and found.status is Status.CONVERGED


def test_the_examples_apart_decide_what_is_kept_and_when_it_ends() -> None:
    check_held_out()


@pytest.mark.parametrize("fault", ["it never stops", "the last state is kept", "the fit decides"])
def test_a_descent_that_does_not_heed_them_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "it never stops":
        monkeypatch.setattr(descent, "PATIENCE", 1000)
    elif fault == "the last state is kept":
        errors = iter(range(0, -1000, -1))
        monkeypatch.setattr(BlockMatching, "error", lambda self, point=None: float(next(errors)))
    else:
        monkeypatch.setattr(BlockMatching, "on", lambda self, examples: self)
    with pytest.raises(AssertionError):
        check_held_out()


def test_a_start_that_is_the_answer_stays() -> None:
    problem = gated()
    start = problem.point()
    dense = problem.on(Listed(tuple(replaced(problem, example) for example in problem.examples.examples)))  # type: ignore[attr-defined]
    for solver in DESCENTS.values():
        found = match(dense, solver)
        assert found.steps == 0 and found.error == 0
        assert all(map(torch.equal, found.value, start)) and all(map(torch.equal, dense.point(), start))


def replaced(problem: BlockMatching, example: Example) -> Example:
    """The example with what the damaged block answers."""
    with torch.no_grad():
        return Example(example.args, example.kwargs, problem.module(*example.args))


def coarse(weight: Tensor) -> Tensor:
    return (weight * 16).round() / 16


def test_points_are_tried_as_they_are_rounded_and_kept_weights_stay() -> None:
    problem = gated()
    with torch.no_grad():
        for weight in problem.module.parameters():
            weight.copy_(coarse(weight))
    start = [weight.detach().clone() for weight in problem.module.parameters()]
    problem = BlockMatching.of(problem.module, problem.examples)
    found = match(problem, Adam(10, 0.05), rounded=coarse)
    assert found.steps > 0
    for before, after in zip(start, problem.module.parameters(), strict=True):
        assert torch.equal(after, coarse(after))
        assert before.ndim < 2 or torch.equal(before != 0, after != 0)


class Scripted(Descent[int]):
    """Moves its block by halves of a sixteenth, and is stopped before its third step."""

    def __init__(self) -> None:
        self.seen = list[Point]()

    def begin(self, problem: BlockMatching) -> int:
        return 0

    def step(self, problem: BlockMatching, state: int) -> int:
        self.seen.append(problem.point())
        if state == 2:
            raise KeyboardInterrupt
        problem.put(tuple(part + part.sign() / 32 for part in problem.point()))
        return state + 1

    def done(self, problem: BlockMatching, state: int) -> None:
        return None

    def evaluate_every(self, problem: BlockMatching) -> int:
        return 1

    def work(self, weights: int, draws: int = 1) -> Work:
        return Work()


@pytest.mark.parametrize("rounded", [None, coarse])
def test_a_block_whose_descent_is_interrupted_holds_what_was_kept(rounded: Rounding | None) -> None:
    problem = gated()
    start = problem.point()
    with pytest.raises(KeyboardInterrupt):
        match(problem, Scripted(), problem.examples, rounded=rounded)
    kept = problem.point()
    assert problem.error() <= problem.error(start)
    assert rounded is None or all(map(torch.equal, kept, start)) or all(map(torch.equal, kept, map(rounded, kept)))


def test_steps_go_on_from_where_they_were_and_not_from_where_that_is_rounded_to() -> None:
    problem, solver = gated(), Scripted()
    start = problem.point()
    with pytest.raises(KeyboardInterrupt):
        match(problem, solver, rounded=coarse)
    assert len(solver.seen) == 3
    for number, point in enumerate(solver.seen):
        for part, first in zip(point, start, strict=True):
            torch.testing.assert_close(part, first + number * first.sign() / 32, rtol=0, atol=1e-15)


@pytest.mark.parametrize("solver", DESCENTS.values(), ids=DESCENTS)
def test_the_block_holds_the_point_of_the_state(solver: Descent) -> None:
    """What begins and what goes back moves nothing, or to what was kept, and a line search that fails is undone."""
    problem = gated()
    start = problem.point()
    state = solver.begin(problem)
    assert all(map(torch.equal, problem.point(), start))
    state = solver.step(problem, state)
    after = problem.point()
    assert not all(map(torch.equal, after, start))
    back = solver.restart(problem, state, start)
    assert all(map(torch.equal, problem.point(), start if isinstance(back, AdamState) else after))


def test_a_line_search_that_fails_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, solver = gated(), Lbfgs()
    start, state = problem.point(), solver.begin(problem)
    honest = BlockMatching.gradient

    def worse(self: BlockMatching, point: Point | None = None, draw: int | None = None):
        value, slope = honest(self, point, draw)
        return value + 1, slope

    monkeypatch.setattr(BlockMatching, "gradient", worse)
    state = solver.step(problem, state)
    assert solver.done(problem, state) is Status.STALLED
    assert all(map(torch.equal, problem.point(), start))


FAULTS = ["no mask", "no units", "wrong sign", "the metric is forgotten", "what is kept moves on"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_breaks_a_law(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, solver = BlockMatching.gradient, Adam(4, 0.05)

    def upwards(self: BlockMatching, point: tuple[Tensor, ...] | None = None, draw: int | None = None):
        value, slope = gradient(self, point, draw)
        return value, tuple(-part for part in slope)

    if fault == "no mask":
        monkeypatch.setattr(KeptEntries, "of", classmethod(lambda cls, weight: cls(weight.detach())))
    elif fault == "no units":
        monkeypatch.setattr(problem_module, "_units", lambda entries: tuple(1e-20 for _ in entries))
    elif fault == "wrong sign":
        monkeypatch.setattr(BlockMatching, "gradient", upwards)
    elif fault == "the metric is forgotten":
        monkeypatch.setattr(BlockMatching, "_weigh", lambda self, columns: columns)
    else:
        monkeypatch.setattr(KeptEntries, "read", lambda self, into=None: self.gather(self.weight))
    with pytest.raises(AssertionError):
        check_descent(solver, examples=20)
