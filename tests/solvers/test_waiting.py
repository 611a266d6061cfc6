"""How often solvers wait for the device, a pretended one: each look at a number, each shape that hangs on numbers.

How much a solver looks must not grow with the rows or columns of the layer, so all is counted on two sizes.
"""

import pytest
import torch

from optprune.grids import Grid
from optprune.moments import InputMoments
from optprune.numerics.tensors import kth_largest, median_among, places
from optprune.patterns import NM, RowWise, Unstructured
from optprune.penalties import L1, ColumnGroups
from optprune.problems import (
    Channels,
    GridLeastSquares,
    LayerLoss,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.solvers import (
    Admm,
    Chain,
    ChannelSwaps,
    ConjugateGradients,
    Fista,
    FistaPath,
    FistaPruner,
    Gptq,
    GreedyObs,
    GridBeam,
    GridDescent,
    HardThreshold,
    ProximalAdmm,
    RefittedSwaps,
    Spap,
    SparseGpt,
    Swaps,
)
from optprune.solvers.gridded import RESTORING
from tests.helpers.moved import moved
from tests.helpers.pretend import set_up, watched
from tests.helpers.solver_table import SOLVERS

SIZES = ((12, 32), (24, 64))


def loss(out, width):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return LayerLoss.of(torch.randn(out, width, generator=generator), InputMoments.from_samples(inputs), 0.01)


def problems(out, width):
    """One of each kind and pattern, on the device."""
    layer = loss(out, width)
    pairs = Channels(torch.arange(width).reshape(-1, 2), torch.arange(width // 2) // (width // 4))
    largest = float(layer.linear.abs().max())
    kinds = {
        "unstructured": SparseLeastSquares(layer, Unstructured(out * width // 2)),
        "rows": SparseLeastSquares(layer, RowWise(width // 2)),
        "2:4": SparseLeastSquares(layer, NM(2, 4)),
        "mask": MaskedLeastSquares(layer, layer.weight.abs() > 0.5),
        "channels": StructuredLeastSquares(layer, Channels.of(width), width // 2),
        "pairs of two heads": StructuredLeastSquares(layer, pairs, width // 4),
        "l1": PenalisedLeastSquares(layer, L1(0.3 * largest)),
        "groups": PenalisedLeastSquares(layer, ColumnGroups(0.3 * largest)),
        "grid": GridLeastSquares(layer, Grid(4, 8), layer.weight.abs() > 0.5),
    }
    return moved(tuple(kinds.items()), set_up())


PROBLEMS = [(f"{name}, {out} x {width}", problem) for out, width in SIZES for name, problem in problems(out, width)]
MOST = {
    # The mask is counted once a step, and its slots; every third step also how much of it moved.
    Admm: 4 / 3,
    # How the exchange changes the loss, and the loss after it.
    ChannelSwaps: 2,
    # Whether all rows are done.
    ConjugateGradients: 1,
    # Only where it measures, twelve times at two of the first twenty steps.
    Fista: 1.2,
    # The same, and the sizes of two residuals.
    ProximalAdmm: 1,
    # The mask, the new weights of the penalty, the end.
    FistaPath: 3,
    # The mask, the two errors.
    FistaPruner: 2,
    # The mask, whether it is the one before.
    HardThreshold: 2,
    # How much a sweep gains, and whether anything moves.
    GridDescent: 1,
    # How many rows gain, where those that end are, how much the rows lose, which exchange weights, and
    # whether the best pair gains.
    RefittedSwaps: 5,
    # Which rows gain, how many weights move between rows, whether the best pair gains, and which rows those are.
    Swaps: 4,
}
"""looks a step, beside those before the first"""
CODES = 2 * 16 + 2
"""looks for the codes of a start on a grid of 16 integers: which blocks have a scale, and which are left"""
DIRECT = 18
"""looks of a solver without steps, all in all: at the scores, and at what is factorised"""
MORE = {Fista: 10, ProximalAdmm: 10, GridDescent: CODES, Gptq: RESTORING, GridBeam: RESTORING}
"""looks beside those, of a solver that measures a gap: at Cholesky factors that prove what is regular, and a bound; of
one that begins with the codes of its start; and of one that first refits on the mask, once in each step of that"""


def looks(problem, solver):
    """The looks before the first step and in some steps, and how many steps those were."""
    with watched() as found:
        state = solver.init(problem, problem.start())
        before, steps = len(found.waits), 0
        # A measurement of the gap comes every ten steps.
        while steps < (20 if isinstance(solver, Fista | ProximalAdmm) else 8) and solver.done(problem, state) is None:
            state = solver.step(problem, state)
            steps += 1
    # The last look finds that it is over, or that it is not.
    return before, len(found.waits) - before, steps + 1


@pytest.mark.e2e
@pytest.mark.parametrize("solver", [one for one in SOLVERS if not isinstance(one, Chain)], ids=lambda one: one.label)
def test_a_solver_waits_for_the_device_a_few_times_at_most(solver):
    accepted = [(name, problem) for name, problem in PROBLEMS if solver.refusal(problem) is None]
    assert accepted
    for name, problem in accepted:
        if isinstance(solver, Spap):
            continue
        before, later, steps = looks(problem, solver)
        assert before <= DIRECT + MORE.get(type(solver), 0), name
        assert later <= MOST.get(type(solver), 0) * steps, name


def test_spap_looks_a_few_times_at_every_exchange(monkeypatch):
    """A step may make many exchanges, away from a choice and back."""
    tried, lower = [], Spap._lower

    def counted(self, tableau, gain):
        tried.append(tableau)
        return lower(self, tableau, gain)

    monkeypatch.setattr(Spap, "_lower", counted)
    for name, problem in PROBLEMS:
        if Spap().refusal(problem) is None:
            tried.clear()
            _, later, steps = looks(problem, Spap())
            # Where a tableau is new its choice is counted and its cost is read; a core is checked as all channels are,
            # and each exchange of a walk looks once.
            assert later <= 5 * len(tried) + (10 + Spap().walk) * steps, name


def test_greedy_elimination_looks_once_for_many_columns():
    fewer, more = (looks(problem, GreedyObs())[0] for name, problem in PROBLEMS if name.startswith("channels"))
    # Sixteen more columns go, and sixty-four of them are carried out at once.
    assert more - fewer <= 1


@pytest.mark.parametrize(("pattern", "most"), [("unstructured", 2), ("rows", 2), ("2:4", 3)])
def test_sparsegpt_launches_two_kernels_a_column_and_four_a_group(pattern, most):
    launched, looked = {}, {}
    for out, width in SIZES:
        problem = dict(problems(out, width))[pattern]
        for block in (width // 2, width):
            with watched() as found:
                SparseGpt(block=block).answer(problem, problem.loss.weight)
            launched[block, width], looked[block, width] = len(found.launches), len(found.waits)
    (_, small), (_, large) = SIZES
    assert launched[large, large] - launched[small, small] == most * (large - small)
    # One look for the mask of a block.
    assert looked[large // 2, large] - looked[large, large] <= 1


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_the_median_of_some_is_found_where_nothing_may_be_cut_out(count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(3, 8, generator=generator)
    mask = torch.zeros(24, dtype=torch.bool)
    mask[torch.randperm(24, generator=generator)[:count]] = True
    mask = mask.reshape(3, 8)
    device = set_up()
    with watched() as found:
        there = median_among(values.to(device), mask.to(device))
        where = places(mask.reshape(-1).to(device), count)
    # The two copies of the mask and the one of the values.
    assert len(found.waits) == 3
    assert torch.equal(there.cpu(), values[mask].median())
    assert torch.equal(where.cpu(), mask.reshape(-1).nonzero()[:, 0])
    assert torch.equal(kth_largest(values, torch.tensor(2)), kth_largest(values, 2))
