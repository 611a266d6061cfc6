"""Every concrete kind of problem and every concrete solver, found by inspection, and which of them go together."""

import pytest
import torch

from optprune.problems import Problem
from optprune.solvers import (
    Admm,
    Chain,
    ChannelSwaps,
    ConjugateGradients,
    FaspMetric,
    Gptq,
    GreedyObs,
    GridBeam,
    GridDescent,
    PerspectiveBound,
    Random,
    Restore,
    Solver,
    SparseGpt,
    Swaps,
    Wanda,
)
from optprune.testing.strategies import concrete

# What cannot be made without arguments is made here; everything else by its defaults.
MADE_BY_HAND = {
    Chain: [
        Chain((FaspMetric(), Restore())),
        Chain((Restore(), FaspMetric())),
        Chain(()),
        Chain((Wanda(), ConjugateGradients())),
        Chain((Admm(), ConjugateGradients(), Swaps(), Restore())),
        Chain((GreedyObs(), ChannelSwaps(), Restore())),
        Chain((Gptq(), GridDescent())),
    ],
    # Sixteen roundings of each row are for the default; the laws hold for three as well.
    GridBeam: [GridBeam(3, 2)],
    # Its bound is a bound after every step; two hundred of them are for larger matrices.
    PerspectiveBound: [PerspectiveBound(most=20)],
}
# Answers drawn at random depend on the problem's content bit for bit, so they do not follow a change of names.
AT_RANDOM = (Random,)
# These go through the columns in the order of their names, so only their rows may be renamed.
IN_ORDER = (SparseGpt, Gptq, GridBeam, GridDescent)


def in_order(solver):
    """Return whether a solver, or a stage of a chain, goes through the columns in their order."""
    return any(isinstance(stage, IN_ORDER) for stage in getattr(solver, "stages", (solver,)))


KINDS = concrete(Problem)
SOLVERS = [solver for cls in concrete(Solver) for solver in (MADE_BY_HAND[cls] if cls in MADE_BY_HAND else [cls()])]
DTYPES = [torch.float64, torch.float32]

by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
by_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.label or "empty chain")

SPARSE = ("FistaPath", "FistaPruner", "RefittedSwaps", "SparseGpt", "Swaps", "Wanda")
# Which pairs are accepted, in full: a solver that starts to refuse what it solved would otherwise pass every test.
ACCEPTED = {
    ("MaskedLeastSquares", "Restore"),
    *(
        ("GridLeastSquares", name)
        for name in ("RoundToNearest", "Gptq", "GridBeam", "GridDescent", "Gptq > GridDescent")
    ),
    *(
        ("StructuredLeastSquares", solver)
        for solver in (
            "ChannelSwaps",
            "FaspMetric",
            "FaspMetric > Restore",
            "FlapMetric",
            "GreedyObs",
            "GreedyObs > ChannelSwaps > Restore",
            "RemovalBound",
            "Restore > FaspMetric",
            "Spap",
        )
    ),
    ("PenalisedLeastSquares", "Fista"),
    ("PenalisedLeastSquares", "ProximalAdmm"),
    ("MaskedLeastSquares", "ConjugateGradients"),
    *(
        (kind, solver)
        for kind in ("SparseLeastSquares", "StructuredLeastSquares")
        for solver in (
            "Admm",
            "ConjugateGradients",
            "HardThreshold",
            "Magnitude",
            "PerspectiveBound",
            "Random",
            "Restore",
        )
    ),
    *(("SparseLeastSquares", solver) for solver in SPARSE),
    ("SparseLeastSquares", "Wanda > ConjugateGradients"),
    ("SparseLeastSquares", "Admm > ConjugateGradients > Swaps > Restore"),
}

PAIRS = [(kind, solver) for kind in KINDS for solver in SOLVERS if (kind.__name__, solver.label) in ACCEPTED]

by_pair = pytest.mark.parametrize(
    ("kind", "solver"), PAIRS, ids=[f"{kind.__name__}-{solver.label}" for kind, solver in PAIRS]
)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
