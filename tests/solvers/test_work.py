"""The work that every solver declares: flops that grow with the widths, and the peak of memory."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workspace import measured
from optprune.grids import Grid
from optprune.moments import InputMoments
from optprune.patterns import Unstructured
from optprune.penalties import L1
from optprune.problems import (
    Channels,
    GridLeastSquares,
    LayerLoss,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.recipe import load_recipe
from optprune.solvers import (
    Admm,
    Chain,
    ConjugateGradients,
    DirectSolver,
    ExpertSolver,
    Fista,
    FistaPath,
    FistaPruner,
    GreedyObs,
    PerspectiveBound,
    ProximalAdmm,
    Restore,
    SparseGpt,
    Wanda,
    solve,
)
from optprune.solvers.greedy_obs import removal_curve_work
from optprune.solvers.inverse import entry_costs_work
from optprune.solvers.value_basis import best_basis_work
from optprune.testing.strategies import concrete
from optprune.work import Work
from tests.helpers.memory import MIB, told
from tests.helpers.solver_table import (
    SOLVERS,
)

OUT, WIDTH = 384, 1536
BEYOND = 1.15
"""what does not grow as the formula says, such as the first use of a library's functions"""
LEAST = 1024
by_working_solver = pytest.mark.parametrize(
    "solver", [solver for solver in SOLVERS if solver != Chain(())], ids=lambda solver: solver.label
)


@by_working_solver
@pytest.mark.parametrize("coupled", [False, True], ids=["plain", "coupled"])
def test_work_is_positive_and_grows_with_both_widths(solver, coupled):
    least = solver.work(LEAST, LEAST, coupled=coupled)
    assert least.flops > 0 and least.bytes > 0 and least.passes == 0
    for shape in ((4 * LEAST, LEAST), (LEAST, 4 * LEAST)):
        more = solver.work(*shape, coupled=coupled)
        assert more.flops > 1.5 * least.flops and more.bytes > 1.5 * least.bytes, shape


@by_working_solver
def test_a_full_metric_adds_work(solver):
    plain, coupled = (solver.work(512, 64, coupled=coupled) for coupled in (False, True))
    assert coupled.flops > plain.flops and coupled.bytes >= plain.bytes


def test_a_solver_without_work_is_no_solver():
    class Silent(DirectSolver):
        def answer(self, problem, start):
            raise NotImplementedError

    with pytest.raises(TypeError, match="work"):
        Silent()


def test_a_chain_adds_the_flops_of_its_stages_and_takes_the_largest_peak():
    stages = (Wanda(), SparseGpt(), Restore())
    for out, width in ((64, 4096), (4096, 64)):
        each = [stage.work(out, width) for stage in stages]
        whole = Chain(stages).work(out, width)
        assert whole.flops == pytest.approx(sum(work.flops for work in each))
        assert whole.bytes == max(work.bytes for work in each)
    assert Chain(()).work(64, 64) == Work()
    assert (
        Chain((Admm(), ConjugateGradients())).cached_bytes
        == Admm().cached_bytes
        > 0
        == Chain((GreedyObs(), Restore())).cached_bytes
    )


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (Admm(), Admm(haste=0.3)),
        (Admm(most=5), Admm()),
        (ConjugateGradients(1e-2), ConjugateGradients(1e-4)),
        (Fista(1e-2), Fista(1e-6)),
        (ProximalAdmm(1e-2), ProximalAdmm(1e-6)),
        (FistaPath(inner_steps=5), FistaPath()),
        (FistaPruner(inner_steps=5), FistaPruner()),
        (GreedyObs(batch=8), GreedyObs()),
        (SparseGpt(block=32), SparseGpt()),
        (PerspectiveBound(most=20), PerspectiveBound()),
        (Wanda(), Wanda(by_row=True)),
    ],
    ids=str,
)
def test_options_that_ask_for_more_cost_more(less, more):
    assert less.work(OUT, WIDTH).flops < more.work(OUT, WIDTH).flops


@pytest.mark.e2e
@by_working_solver
def test_no_more_products_are_made_than_declared(solver):
    """Products alone are counted, where flops also hold factorisations and passes over memory: a bound from below.

    Inputs are nearly uncorrelated, so that iterations end soon: a plan counts on as many as real layers take.
    """
    out, width = 48, 96
    generator = torch.Generator().manual_seed(0)
    moments = InputMoments.from_samples(torch.randn(16 * width, width, generator=generator))
    loss = LayerLoss.of(torch.randn(out, width, generator=generator), moments, 0.01)
    units = torch.arange(width)
    problems = (
        SparseLeastSquares(loss, Unstructured(out * width // 2)),
        StructuredLeastSquares(loss, Channels(units[:, None], torch.zeros_like(units)), 3 * width // 4),
        MaskedLeastSquares(loss, torch.rand(1, width, generator=generator) < 0.75),
        PenalisedLeastSquares(loss, L1(0.1)),
        GridLeastSquares(loss, Grid(4, 32), torch.rand(out, width, generator=generator) < 0.75),
    )
    accepted = [problem for problem in problems if solver.refusal(problem) is None]
    assert accepted
    for problem in accepted:
        with FlopCounterMode(display=False) as counter:
            solve(problem, solver)
        assert counter.get_total_flops() <= solver.work(out, width).flops, problem.kind


@pytest.mark.e2e
@told
@pytest.mark.parametrize("recipe", ["fasp", pytest.param("structured_best", marks=pytest.mark.slow)])
def test_a_solve_takes_the_memory_that_its_solver_declares(recipe):
    chosen = load_recipe(recipe)
    stated = chosen.solver.work(OUT, WIDTH, coupled=chosen.metric is not None).bytes
    taken = measured(recipe, OUT, WIDTH)
    assert stated / 1.3 <= taken <= BEYOND * stated, f"{taken / MIB:.0f} MiB, stated {stated / MIB:.0f} MiB"


def test_a_coupling_metric_adds_memory_that_goes_with_the_outputs():
    for solver in (Admm(), GreedyObs(), Restore()):
        assert solver.work(4096, 64, coupled=True).bytes > 3 * solver.work(4096, 64).bytes


@pytest.mark.parametrize("cls", concrete(ExpertSolver), ids=lambda cls: cls.__name__)
def test_the_work_of_a_choice_of_experts_grows_with_experts_and_tokens(cls):
    least = cls().work(32, 24, chosen=2, tokens=100)
    assert least.flops > 0 and least.bytes > 0
    assert cls().work(32, 24, chosen=2, tokens=1000).flops == pytest.approx(10 * least.flops)
    assert cls().work(64, 48, chosen=2, tokens=100).flops > 1.5 * least.flops


@pytest.mark.parametrize("work", [removal_curve_work, entry_costs_work])
def test_the_work_of_costs_grows_with_both_widths(work):
    least = work(LEAST, LEAST)
    for shape in ((4 * LEAST, LEAST), (LEAST, 4 * LEAST)):
        assert work(*shape).flops > 1.1 * least.flops and work(*shape).bytes > 1.1 * least.bytes
    assert work(LEAST, LEAST, coupled=True).bytes > least.bytes
    assert best_basis_work(LEAST, LEAST).flops > 0
