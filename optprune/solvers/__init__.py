"""Solvers: one algorithm a file. A solver knows problems, never models; `solve` runs it and the problem measures."""

from optprune.solvers.auto import choose
from optprune.solvers.base import Answer, DirectSolver, Solver
from optprune.solvers.chain import Chain
from optprune.solvers.columns import FaspMetric, MagnitudeColumns, RandomColumns, RankedUnits
from optprune.solvers.restore import Restore
from optprune.solvers.run import solve
from optprune.solvers.solution import Certificate, Record, Solution, Status

__all__ = [
    "Answer",
    "Certificate",
    "Chain",
    "DirectSolver",
    "FaspMetric",
    "MagnitudeColumns",
    "RandomColumns",
    "RankedUnits",
    "Record",
    "Restore",
    "Solution",
    "Solver",
    "Status",
    "choose",
    "solve",
]
