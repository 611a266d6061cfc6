"""The choice of a solver: the first of a short list, best first, that accepts the problem."""

from optprune.errors import NoSolver
from optprune.problems import Problem
from optprune.solvers.admm import Admm
from optprune.solvers.base import Solver
from optprune.solvers.chain import Chain
from optprune.solvers.channel_swaps import ChannelSwaps
from optprune.solvers.conjugate_gradients import ConjugateGradients
from optprune.solvers.fista import Fista
from optprune.solvers.greedy_obs import GreedyObs
from optprune.solvers.restore import Restore
from optprune.solvers.swaps import Swaps

CANDIDATES: tuple[Solver, ...] = (
    Chain((GreedyObs(), ChannelSwaps(), Restore())),
    Fista(),
    Chain((Admm(haste=0.3), ConjugateGradients(), Swaps(), ConjugateGradients())),
    Restore(),
    Chain((Admm(haste=0.3), ConjugateGradients())),
)


def choose(problem: Problem) -> Solver:
    """The solver optprune recommends for a problem; NoSolver lists every candidate's reason for refusing."""
    reasons = []
    for solver in CANDIDATES:
        reason = solver.why_not(problem)
        if reason is None:
            return solver
        reasons.append(f"{solver.label}: {reason}")
    raise NoSolver(f"no solver accepts a {type(problem).__name__}; " + "; ".join(reasons))
