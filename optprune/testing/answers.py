"""What the laws share: a solver's answer, solved once for all of them, and how close to the optimum it must be."""

import torch
from torch import Tensor

from optprune.problems import LayerLoss, Problem
from optprune.solvers import AnySolver, Solution, solve

RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""how close to the optimum an exact answer must be, by dtype: the promise, not what happens to hold"""
_LAST: list[tuple[Problem, AnySolver, Solution]] = []


def tolerance(problem: Problem, objective: float) -> float:
    """By how much an objective may miss an optimum of that size."""
    return RELATIVE[problem.loss.weight.dtype] * abs(objective)


def named(problem: Problem, solver: AnySolver) -> str:
    """How a law that is broken begins its sentence."""
    return f"{solver.label} on a {problem.kind} problem"


def answer(problem: Problem, solver: AnySolver) -> Solution:
    """What the solver answers: solved once for all the laws that only look at the answer."""
    if _LAST and _LAST[0][0] is problem and _LAST[0][1] is solver:
        return _LAST[0][2]
    before = problem.fingerprint()
    solution = solve(problem, solver)
    # Here and not only in its own law: on a problem that is no longer the same, other laws would speak first.
    assert problem.fingerprint() == before, f"{named(problem, solver)}: it changed the problem"
    _LAST[:] = [(problem, solver, solution)]
    return solution


def output_change(loss: LayerLoss, first: Tensor, second: Tensor) -> float:
    """E|(V1 - V2) x*|^2 plus the ridge's share."""
    change = first.double() - second.double()
    gram = loss.gram.double()
    return float(((change @ gram) * loss.weigh(change)).sum())
