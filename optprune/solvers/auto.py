"""The choice of a solver: the first of a short list, best first, that accepts the problem.

Restoration is chosen by size as well: with a large mask for every row, gradients prove as much in less time.
"""

from optprune.errors import NoSolver
from optprune.problems import MaskedLeastSquares, Problem
from optprune.solvers.admm import Admm
from optprune.solvers.base import AnySolver
from optprune.solvers.chain import Chain
from optprune.solvers.channel_swaps import ChannelSwaps
from optprune.solvers.conjugate_gradients import ConjugateGradients
from optprune.solvers.greedy_obs import GreedyObs
from optprune.solvers.proximal_admm import ProximalAdmm
from optprune.solvers.restore import Restore
from optprune.solvers.swaps import Swaps

CANDIDATES: tuple[AnySolver, ...] = (
    Chain((GreedyObs(), ChannelSwaps(), Restore())),
    ProximalAdmm(),
    Chain((Admm(haste=0.3), ConjugateGradients(), Swaps(), ConjugateGradients())),
    Chain((Admm(haste=0.3), ConjugateGradients())),
    Restore(),
    ConjugateGradients(),
)

ROW_FACTORS = 1e8
"""multiplications, about a tenth of a second, above which a Cholesky factor for every row is no longer worth it"""
GRADIENTS = ConjugateGradients(1e-5)
"""the solver that, on layers of a real model, proves a gap of 1e-6 or less, in a tenth of the time of restoration"""


def choose(problem: Problem) -> AnySolver:
    """The solver optprune recommends for a problem; NoSolver lists every candidate's reason for refusing."""
    if isinstance(problem, MaskedLeastSquares) and _costly_to_factorise(problem):
        return GRADIENTS
    reasons: list[str] = []
    for solver in CANDIDATES:
        reason = solver.refusal(problem)
        if reason is None:
            return solver
        reasons.append(f"{solver.label}: {reason}")
    raise NoSolver(f"no solver accepts a {type(problem).__name__}; " + "; ".join(reasons))


def _costly_to_factorise(problem: MaskedLeastSquares) -> bool:
    """Whether masks that differ from row to row ask for too many factors, and damping lets gradients certify."""
    rows, most = problem.mask.shape[0], int(problem.mask.sum(1).max())
    damped = bool((problem.loss.damping > 0).all())
    return rows > 1 and damped and rows * most**3 > ROW_FACTORS
