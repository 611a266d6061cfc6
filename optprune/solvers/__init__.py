"""Solvers, one algorithm per file. A solver knows problems but no models; `solve` runs it, and the problem measures."""

from optprune.solvers.admm import Admm
from optprune.solvers.base import Answer, AnySolver, Certificate, DirectSolver, Record, Solution, Solver, Status
from optprune.solvers.chain import Chain
from optprune.solvers.channel_order import best_permutation, channel_order
from optprune.solvers.channel_swaps import ChannelSwaps
from optprune.solvers.conjugate_gradients import ConjugateGradients
from optprune.solvers.experts import (
    ChosenExperts,
    ExpertElimination,
    ExpertFrequency,
    ExpertScore,
    ExpertSolver,
    Reap,
    choose_experts,
)
from optprune.solvers.files import load_solution, save_solution
from optprune.solvers.fista import Fista
from optprune.solvers.fista_path import FistaPath
from optprune.solvers.fistapruner import FistaPruner
from optprune.solvers.given_scores import GivenScores
from optprune.solvers.greedy_obs import GreedyObs, removal_curve
from optprune.solvers.grid_beam import GridBeam
from optprune.solvers.gridded import Gptq, GridDescent, RoundToNearest
from optprune.solvers.hard_threshold import HardThreshold
from optprune.solvers.perspective import PerspectiveBound
from optprune.solvers.proximal_admm import ProximalAdmm
from optprune.solvers.ranking import FaspMetric, FlapMetric, Magnitude, Random, Ranking, UnitRanking, Wanda
from optprune.solvers.refitted_swaps import RefittedSwaps
from optprune.solvers.removal_bound import RemovalBound
from optprune.solvers.restore import Restore
from optprune.solvers.run import choose, solve
from optprune.solvers.spap import Spap
from optprune.solvers.sparsegpt import SparseGpt
from optprune.solvers.swaps import Swaps
from optprune.solvers.value_basis import best_basis, nested_basis

__all__ = [
    "Admm",
    "Answer",
    "AnySolver",
    "Certificate",
    "Chain",
    "ChannelSwaps",
    "ChosenExperts",
    "ConjugateGradients",
    "DirectSolver",
    "ExpertElimination",
    "ExpertFrequency",
    "ExpertScore",
    "ExpertSolver",
    "FaspMetric",
    "Fista",
    "FistaPath",
    "FistaPruner",
    "FlapMetric",
    "GivenScores",
    "Gptq",
    "GreedyObs",
    "GridBeam",
    "GridDescent",
    "HardThreshold",
    "Magnitude",
    "PerspectiveBound",
    "ProximalAdmm",
    "Random",
    "Ranking",
    "Reap",
    "Record",
    "RefittedSwaps",
    "RemovalBound",
    "Restore",
    "RoundToNearest",
    "Solution",
    "Solver",
    "Spap",
    "SparseGpt",
    "Status",
    "Swaps",
    "UnitRanking",
    "Wanda",
    "best_basis",
    "best_permutation",
    "channel_order",
    "choose",
    "choose_experts",
    "load_solution",
    "nested_basis",
    "removal_curve",
    "save_solution",
    "solve",
]
