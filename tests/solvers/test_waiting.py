"""How often a step of a solver waits for the device: each look at a number, and each shape that hangs on numbers."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from optprune.moments import InputMoments
from optprune.patterns import NM, RowWise, Unstructured
from optprune.problems import LayerLoss, MaskedLeastSquares, SparseLeastSquares
from optprune.solvers import Admm, ConjugateGradients, FistaPath, HardThreshold, SparseGpt, Swaps, solve

LOOKS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal", "unique"}
"""functions of torch that end only when the device has computed what they are given"""
OUT, WIDTH = 24, 64


class Looks(TorchFunctionMode):
    """Counts the looks at what a device has computed, on a CPU as well."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.count += name in LOOKS
        if name in ("__getitem__", "__setitem__"):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.count += any(isinstance(place, torch.Tensor) and place.dtype == torch.bool for place in places)
        return func(*args, **(kwargs or {}))


def loss():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return LayerLoss.of(torch.randn(OUT, WIDTH, generator=generator), InputMoments.from_samples(inputs), 0.01)


PROBLEMS = {
    "unstructured": SparseLeastSquares(loss(), Unstructured(OUT * WIDTH // 2)),
    "rows": SparseLeastSquares(loss(), RowWise(WIDTH // 2)),
    "2:4": SparseLeastSquares(loss(), NM(2, 4)),
}
MOST = {
    # The mask is counted once a step; every third step also how much of it moved.
    Admm(): 4 / 3,
    # Whether all rows are done.
    ConjugateGradients(): 1,
    HardThreshold(): 2,
    # The mask, those that the median is of, the new weights, the end; a test for a restart at two of ten inner steps.
    FistaPath(): 6,
    # Which rows gain, how many weights move between rows and which rows those are.
    Swaps(): 4,
}


def looks_a_step(problem, solver):
    """The looks of some steps of a solver, beside those before the first."""
    with Looks() as looks:
        state = solver.init(problem, problem.start())
        before, steps = looks.count, 0
        while steps < 30 and solver.done(problem, state) is None:
            state = solver.step(problem, state)
            steps += 1
        # The last look finds that it is over, or that it is not.
        return (looks.count - before) / (steps + 1)


@pytest.mark.parametrize("pattern", PROBLEMS)
@pytest.mark.parametrize("solver", MOST, ids=lambda solver: solver.label)
def test_a_step_waits_for_the_device_a_few_times_at_most(solver, pattern):
    assert looks_a_step(PROBLEMS[pattern], solver) <= MOST[solver]


def test_gradients_on_a_mask_look_once_a_step():
    problem = PROBLEMS["rows"]
    fixed = MaskedLeastSquares(problem.loss, problem.start() != 0)
    assert looks_a_step(fixed, ConjugateGradients()) <= 1


def test_sparsegpt_looks_once_a_block_and_never_at_a_column():
    with Looks() as looks:
        solve(PROBLEMS["unstructured"], SparseGpt(block=8))
    with Looks() as fewer:
        solve(PROBLEMS["unstructured"], SparseGpt(block=16))
    assert looks.count - fewer.count <= 3 * (WIDTH // 8 - WIDTH // 16)
