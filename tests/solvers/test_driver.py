"""solve, choose and Chain: who measures, who may stop, and what is said."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from optprune.errors import InputError, NoSolver
from optprune.moments import InputMoments
from optprune.patterns import RowWise
from optprune.problems import Channels, LayerLoss, MaskedLeastSquares, Problem, StructuredLeastSquares
from optprune.solvers import (
    Answer,
    Certificate,
    Chain,
    ChannelSwaps,
    ConjugateGradients,
    DirectSolver,
    FaspMetric,
    GreedyObs,
    Magnitude,
    Record,
    Restore,
    Solution,
    Solver,
    Status,
    choose,
    solve,
)
from optprune.solvers.run import CONTRADICTED, GRADIENT_TOLERANCE, answer, candidates
from optprune.work import Work


@pytest.fixture
def masked():
    moments = InputMoments(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.zeros(2), 10)
    loss = LayerLoss.of(torch.tensor([[3.0, 2.0]]), moments)
    return MaskedLeastSquares(loss, torch.tensor([[True, False]]))


@pytest.fixture
def linked(masked):
    channels = Channels(torch.tensor([[0], [1]]), torch.zeros(2, dtype=torch.long))
    return StructuredLeastSquares(masked.loss, channels, 1)


@dataclass(frozen=True)
class Foreign(Problem):
    """A kind of problem that nobody knows."""

    kind: ClassVar[str] = "foreign"
    loss: LayerLoss

    def objective(self, weight):
        return 0.0

    def violation(self, weight):
        return 0.0

    def start(self):
        return self.loss.weight


@dataclass(frozen=True)
class Counter(Solver[Problem, int]):
    """Counts to `until`; its weight is the start plus the count, its own opinion of itself is always good."""

    until: float
    ending: Status = Status.CONVERGED
    note: str | None = None
    bound: float | None = None
    bad: float = 0.0

    def unsupported(self, problem):
        return None

    def init(self, problem, start):
        return 0, start

    def step(self, problem, state):
        return state[0] + 1, state[1]

    def done(self, problem, state):
        return self.ending if state[0] >= self.until else None

    def value(self, problem, state):
        return state[1] + state[0] + self.bad

    def work(self, outputs, inputs, *, coupled=False):
        return Work()

    def certify(self, problem, state):
        return None if self.bound is None else Certificate(self.bound, "said so")

    def notes(self, state):
        return () if self.note is None else (self.note,)

    def history(self, state):
        return (Record("count", state[0], 0.0, 0.0),)


# -- solve


def test_the_problem_measures_the_answer(masked):
    solution = solve(masked, Counter(3))
    assert solution.value.tolist() == [[6.0, 3.0]]
    assert solution.objective == masked.objective(solution.value) > 0
    assert solution.violation == masked.violation(solution.value) == 1
    assert solution.status is Status.CONVERGED
    assert solution.steps == 3
    assert solution.seconds >= 0
    assert solution.history == (Record("count", 3, 0.0, 0.0),)
    assert solution.certificate is None
    assert solution.gap is None


def test_a_refusal_is_no_solver_with_the_reason(masked):
    with pytest.raises(NoSolver) as caught:
        solve(masked, FaspMetric())
    assert FaspMetric().refusal(masked) in str(caught.value)
    assert "FaspMetric" in str(caught.value)
    assert "structured least squares problems" in str(caught.value)
    assert masked.kind in str(caught.value)


@dataclass(frozen=True)
class InPlace(DirectSolver[MaskedLeastSquares]):
    """Writes its answer into a tensor of the loss."""

    accepts = (MaskedLeastSquares,)

    def answer(self, problem, start):
        return Answer(problem.loss.weight.mul_(problem.mask))

    def work(self, outputs, inputs, *, coupled=False):
        return Work(0.0, 0.0)


def test_a_solver_that_writes_into_its_problem_is_an_error(masked):
    for run in (lambda: solve(masked, InPlace()), lambda: answer(masked, InPlace(), masked.start())):
        with pytest.raises(InputError, match=r"InPlace writes into the weight .* work on copies, by clone\(\)"):
            run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("solver", [ConjugateGradients(), Counter(1)])
def test_a_start_of_another_dtype_is_converted(solver, dtype, masked):
    start = masked.start().round()
    found = solve(masked, solver, start=start.to(dtype))
    assert found.value.dtype == masked.loss.weight.dtype
    assert torch.equal(found.value, solve(masked, solver, start=start).value)


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_a_start_that_is_not_finite_is_refused(entry, masked):
    with pytest.raises(InputError, match="the start has entries that are NaN or infinite"):
        solve(masked, ConjugateGradients(), start=torch.full_like(masked.start(), entry))


@dataclass(frozen=True)
class OnlyOneRow(DirectSolver[MaskedLeastSquares]):
    """Accepts restoration of a single row; `unsupported` reads a mask, which other kinds of problems lack."""

    accepts = (MaskedLeastSquares,)

    def unsupported(self, problem):
        return None if problem.mask.shape[0] == 1 else "it restores a single row"

    def work(self, outputs, inputs, *, coupled=False):
        return Work()

    def answer(self, problem, start):
        return Answer(problem.start())


def test_unsupported_is_called_for_accepted_kinds_only(masked, linked):
    assert OnlyOneRow().refusal(masked) is None
    assert solve(masked, OnlyOneRow()).violation == 0
    assert "it accepts masked least squares problems" in OnlyOneRow().refusal(linked)
    assert linked.kind in Chain((OnlyOneRow(),)).refusal(linked)
    two = MaskedLeastSquares(replace(masked.loss, weight=torch.ones(2, 2)), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(NoSolver, match="a single row"):
        solve(two, OnlyOneRow())


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 3), (1, 1, 2)])
def test_a_start_of_another_shape_is_an_input_error(masked, shape):
    with pytest.raises(InputError, match="start must be"):
        solve(masked, Restore(), start=torch.zeros(shape))


def test_the_start_is_a_warm_start(masked):
    start = torch.tensor([[10.0, 0.0]])
    assert solve(masked, Counter(0), start=start).value.tolist() == [[10.0, 0.0]]
    assert solve(masked, Counter(0)).value.tolist() == masked.start().tolist()


def test_the_step_limit(masked):
    solution = solve(masked, Counter(math.inf), max_steps=7)
    assert solution.status is Status.STEP_LIMIT
    assert solution.steps == 7
    assert solution.value.tolist() == [[10.0, 7.0]]
    # Ready exactly at the limit is ready.
    assert solve(masked, Counter(7), max_steps=7).status is Status.CONVERGED
    assert solve(masked, Counter(1), max_steps=0).status is Status.STEP_LIMIT


def test_the_time_limit(masked):
    solution = solve(masked, Counter(math.inf), max_seconds=0.0)
    assert solution.status is Status.TIME_LIMIT
    assert solution.steps == 0
    solution = solve(masked, Counter(math.inf), max_seconds=0.02, max_steps=10**9)
    assert solution.status is Status.TIME_LIMIT
    assert solution.steps > 0
    assert solution.seconds >= 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_has_not_converged(masked, bad):
    solution = solve(masked, Counter(2, bad=bad))
    assert solution.status is Status.NONFINITE
    assert not math.isfinite(solution.objective)


@pytest.mark.parametrize("ending", [Status.STALLED, Status.CONVERGED])
def test_the_status_is_the_solvers_own(masked, ending):
    assert solve(masked, Counter(1, ending)).status is ending


def test_the_callback_sees_every_step_and_its_weight(masked):
    seen = []
    solve(masked, Counter(3), callback=lambda steps, weight: seen.append((steps, weight().tolist())))
    assert seen == [(1, [[4.0, 1.0]]), (2, [[5.0, 2.0]]), (3, [[6.0, 3.0]])]
    solve(masked, Restore(), callback=lambda steps, weight: pytest.fail("a direct solver takes no steps"))


def test_no_graph_is_built(masked):
    start = torch.tensor([[1.0, 0.0]], requires_grad=True)
    assert not solve(masked, Counter(2), start=start).value.requires_grad


def test_every_status_is_a_sentence():
    assert all(len(status.value) > 20 for status in Status)


def solution_of(objective, bound):
    certificate = None if bound is None else Certificate(bound, "")
    return Solution(torch.zeros(1, 1), objective, 0.0, Status.CONVERGED, 0, 0.0, certificate)


def test_the_gap():
    assert solution_of(2.0, None).gap is None
    assert solution_of(2.0, 1.0).gap == 0.5
    # A bound above the objective, which `solve` drops, is seen: nothing is clipped.
    assert solution_of(2.0, 3.0).gap == -0.5
    assert solution_of(0.0, 0.0).gap == 0
    assert solution_of(0.0, -1.0).gap == math.inf


def test_a_certificate_that_the_answer_contradicts_is_dropped_with_a_note(masked):
    objective, error = masked.objective(masked.start()), masked.measuring_error(masked.start())
    assert 0 < error < 1e-9 * objective
    # What may have been rounded in measuring the objective is taken off what is proved, or the like share of it.
    for bound, less in (
        (-1.0, 0.0),
        (0.0, 0.0),
        (objective / 2, error / 2),
        (objective, error),
        (objective + error / 2, error),
    ):
        solution = solve(masked, Counter(0, bound=bound))
        assert solution.certificate == Certificate(bound - less, "said so")
        assert solution.gap > 0
        assert solution.notes == ()
    for bound in (objective + 2 * error, 2 * objective, math.inf):
        solution = solve(masked, Counter(0, bound=bound, note="a note"))
        assert solution.certificate is None
        assert solution.gap is None
        assert solution.notes[0] == "a note"
        assert solution.notes[1].startswith(CONTRADICTED)
        assert f"{bound:.6g}" in solution.notes[1]
    solution = solve(masked, Counter(0, bound=math.nan))
    assert solution.certificate is None
    assert solution.notes == (f"{CONTRADICTED}: its lower bound is not a number",)
    # An infeasible answer may well be below the optimum.
    assert solve(masked, Counter(1, bound=math.inf)).violation > 0
    assert solve(masked, Counter(1, bound=math.inf)).certificate is not None


@dataclass(frozen=True)
class Proving(Counter):
    """Proves a bound for its answer too."""

    def prove(self, problem, value):
        return Certificate(-1.0, "proved")


@pytest.mark.parametrize(("bound", "kept"), [(math.nan, -1.0), (-2.0, -1.0), (-0.5, -0.5)])
def test_the_higher_of_two_bounds_counts_and_none_that_is_no_number(masked, bound, kept):
    certificate = solve(masked, Proving(0, bound=bound)).certificate
    assert certificate is not None and certificate.lower_bound == kept


# -- choose


def test_choose_takes_the_first_that_accepts(masked, linked):
    assert choose(masked) == Restore()
    assert choose(linked) == Chain((GreedyObs(), ChannelSwaps(), Restore()))
    assert solve(linked).objective == solve(linked, choose(linked)).objective


@pytest.fixture
def large():
    """Every row of [64, 300] keeps another half: 64 factors of 150 inputs each."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 300, generator=generator) @ torch.randn(300, 300, generator=generator)
    loss = LayerLoss.of(torch.randn(64, 300, generator=generator), InputMoments.from_samples(inputs), 0.01)
    return MaskedLeastSquares(loss, RowWise(150).project(torch.rand(64, 300, generator=generator)))


def test_choose_takes_gradients_for_a_large_mask_of_every_row_and_loses_nothing(large):
    assert choose(large) == ConjugateGradients(GRADIENT_TOLERANCE)
    chosen, exact = solve(large), solve(large, Restore())
    # Both prove it: the two gaps are of lower bounds of one optimum.
    assert chosen.gap is not None
    assert chosen.gap < 1e-6
    assert chosen.objective == pytest.approx(exact.objective, rel=1e-6)
    assert chosen.violation == 0


def test_choose_restores_where_factors_are_few_or_gradients_could_prove_nothing(large):
    assert choose(replace(large, mask=large.mask[:1])) == Restore()
    assert choose(replace(large, mask=large.mask & (torch.arange(300) < 100))) == Restore()
    assert choose(replace(large, loss=large.loss.damped(0.0))) == Restore()


def test_choose_lists_every_reason(masked):
    foreign = Foreign(masked.loss)
    with pytest.raises(NoSolver) as caught:
        choose(foreign)
    message = str(caught.value)
    assert "Foreign" in message
    for solver in candidates():
        assert f"{solver.label}: {solver.refusal(foreign)}" in message
    with pytest.raises(NoSolver):
        solve(foreign)


# -- Chain


def test_a_chain_passes_each_answer_on(masked):
    chain = Chain((Counter(2), Counter(3)))
    solution = solve(masked, chain)
    assert solution.value.tolist() == [[8.0, 5.0]]
    assert chain.label == "Counter > Counter"
    # Two, the change of stage, and three.
    assert solution.steps == 6


def test_a_chain_gives_the_weight_it_has_when_the_limit_comes(masked):
    solution = solve(masked, Chain((Counter(5), Counter(5))), max_steps=3)
    assert solution.status is Status.STEP_LIMIT
    assert solution.value.tolist() == [[6.0, 3.0]]


def test_a_chain_is_its_stages(linked):
    ranked = solve(linked, FaspMetric())
    refit = solve(linked, Restore(), start=ranked.value)
    assert torch.equal(solve(linked, Chain((FaspMetric(), Restore()))).value, refit.value)
    assert torch.equal(solve(linked, Chain((FaspMetric(),))).value, ranked.value)
    nested = Chain((Chain((FaspMetric(),)), Chain((Restore(),))))
    assert torch.equal(solve(linked, nested).value, refit.value)


def test_a_chain_collects_notes_and_keeps_the_best_bound(masked):
    stages = (Counter(1, note="first", bound=0.5), Counter(1, bound=0.2), Counter(1, note="last"))
    solution = solve(masked, Chain(stages))
    assert solution.notes == ("first", "last")
    assert solution.certificate == Certificate(0.5, "said so")
    assert solve(masked, Chain((Counter(1), Counter(1)))).certificate is None


def test_a_chain_remembers_what_each_stage_left(masked, linked):
    solution = solve(masked, Chain((Counter(2), Counter(3))))
    record = next(record for record in solution.history if record.label == "Counter")
    assert record.steps == 2
    assert record.seconds >= 0
    assert record.objective == masked.objective(solve(masked, Counter(2)).value)
    ranked = solve(linked, FaspMetric())
    for chain in (Chain((FaspMetric(), Restore())), Chain((Chain((FaspMetric(), Restore())), Restore()))):
        [first, *_] = solve(linked, chain).history
        assert (first.label, first.objective) == ("FaspMetric", ranked.objective)
    assert [r.label for r in solve(linked, chain).history] == ["FaspMetric", "FaspMetric > Restore"]


def test_a_chain_ends_as_its_last_stage_does(masked):
    assert solve(masked, Chain((Counter(1), Counter(1, Status.STALLED)))).status is Status.STALLED


def test_a_chain_refuses_what_any_stage_refuses(masked, linked):
    for chain in (Chain((FaspMetric(), Restore())), Chain((Restore(), Magnitude()))):
        assert "refuses" in chain.refusal(masked)
        assert chain.refusal(linked) is None
    assert "empty" in Chain(()).refusal(masked)
    with pytest.raises(NoSolver, match="empty"):
        solve(masked, Chain(()))


def test_frozen_objects_stay_as_they_are(masked):
    with pytest.raises(AttributeError):
        masked.mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(AttributeError):
        Restore().factor_dtype = torch.float32
    assert replace(masked) is not masked


def test_the_former_name_of_unsupported_is_an_error():
    with pytest.raises(TypeError, match="Old defines why_not, which is called unsupported now"):

        class Old(DirectSolver):
            def why_not(self, problem):
                return None
