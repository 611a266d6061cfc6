"""Solvers: one algorithm a file. A solver knows problems, never models; `solve` runs it and the problem measures."""

from optprune.solvers.admm import Admm
from optprune.solvers.auto import choose
from optprune.solvers.base import Answer, DirectSolver, Solver
from optprune.solvers.chain import Chain
from optprune.solvers.columns import FaspMetric, MagnitudeColumns, RandomColumns, RankedUnits
from optprune.solvers.conjugate_gradients import ConjugateGradients
from optprune.solvers.entries import Magnitude, RankedEntries, Wanda
from optprune.solvers.fista import Fista
from optprune.solvers.fista_path import FistaPath
from optprune.solvers.fistapruner import FistaPruner
from optprune.solvers.hard_threshold import HardThreshold
from optprune.solvers.perspective import PerspectiveBound
from optprune.solvers.restore import Restore
from optprune.solvers.run import solve
from optprune.solvers.solution import Certificate, Record, Solution, Status
from optprune.solvers.sparsegpt import SparseGpt
from optprune.solvers.swaps import Swaps

__all__ = [
    "Admm",
    "Answer",
    "Certificate",
    "Chain",
    "ConjugateGradients",
    "DirectSolver",
    "FaspMetric",
    "Fista",
    "FistaPath",
    "FistaPruner",
    "HardThreshold",
    "Magnitude",
    "MagnitudeColumns",
    "PerspectiveBound",
    "RandomColumns",
    "RankedEntries",
    "RankedUnits",
    "Record",
    "Restore",
    "Solution",
    "Solver",
    "SparseGpt",
    "Status",
    "Swaps",
    "Wanda",
    "choose",
    "solve",
]
