"""The choice of experts: elimination by exact costs with swaps, and the scores of other methods."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.problems import ExpertChoice
from optprune.problems.experts import router_gates
from optprune.work import Work, sweeps

ENOUGH = 1e-12
"""the least relative decrease of a cost by a swap; less is rounding"""
USUAL_SWEEPS = 2
"""the usual number of sweeps until no swap helps"""


@dataclass(frozen=True, eq=False)
class ChosenExperts:
    """A choice with its objective and violation, measured by the problem."""

    kept: Bool[Tensor, "experts"]
    objective: float
    violation: float
    lower_bound: float | None
    """the least cost of all choices, where all were tried"""


class ExpertSolver(ABC):
    """A method to choose experts: it proposes a set, and the problem measures it."""

    @abstractmethod
    def choice(self, problem: ExpertChoice) -> Bool[Tensor, "experts"]:
        """Return the mask of the experts to keep, as many as the problem says."""

    @abstractmethod
    def work(self, experts: int, keep: int, *, chosen: int, tokens: int) -> Work:
        """Return the work of a choice among `experts`, of which the router chooses `chosen` for each token.

        The bytes are those of the products of the answers in float64, in which costs are measured.
        """

    def exact(self, problem: ExpertChoice) -> bool:
        """Return whether no other choice is promised to cost less."""
        return False

    def of_block(self, block: int) -> "ExpertSolver":
        """Return the method for one block of a model; for most it is the same for all."""
        return self

    def refusal(self, experts: Sequence[int]) -> str | None:
        """Return why it cannot choose in blocks with so many experts, 0 in those without; None if it can."""
        return None

    @property
    def label(self) -> str:
        """The name in reports."""
        return type(self).__name__


def _evaluation(experts: int, chosen: int, tokens: int) -> Work:
    """Return the work of one evaluation of the cost of a choice."""
    flops = sweeps(40, tokens, experts) + sweeps(10, tokens, 2 * chosen, 2 * chosen)
    return Work(flops, 8.0 * tokens * experts**2)


def choose_experts(problem: ExpertChoice, solver: ExpertSolver) -> ChosenExperts:
    """Return the choice of a solver, measured by the problem."""
    with torch.no_grad():
        kept = solver.choice(problem)
        cost = problem.objective(kept)
    bound = cost if solver.exact(problem) else None
    return ChosenExperts(kept, cost, problem.violation(kept), bound)


@final
@dataclass(frozen=True)
class ExpertElimination(ExpertSolver):
    """Remove one expert after another, each the one whose removal costs least; then swap.

    A swap restores a removed expert and removes the kept one that then costs least, where this lowers
    the cost; sweeps over the removed experts continue until none helps, or `sweeps` are done. Where there are at most
    `exhaustive` sets, all are tried instead, and the best is the answer. Costs are exact (`ExpertChoice`).

    The elimination takes the work of k (E - keep) evaluations of the cost, a sweep that of k (E - keep) again.
    """

    sweeps: int = 10
    exhaustive: int = 2000

    def work(self, experts: int, keep: int, *, chosen: int, tokens: int) -> Work:
        sets = math.comb(experts, keep)
        # The elimination, and the sweeps until none helps.
        turns = 1 + min(self.sweeps, USUAL_SWEEPS)
        evaluations = sets if sets <= self.exhaustive else turns * chosen * (experts - keep)
        return _evaluation(experts, chosen, tokens) * (1 + evaluations)

    def exact(self, problem: ExpertChoice) -> bool:
        return math.comb(problem.experts, problem.keep) <= self.exhaustive

    def choice(self, problem: ExpertChoice) -> Bool[Tensor, "experts"]:
        if self.exact(problem):
            return min(every_choice(problem), key=problem.objective)
        return self._swapped(problem, eliminated(problem))

    def _swapped(self, problem: ExpertChoice, kept: Bool[Tensor, "experts"]) -> Bool[Tensor, "experts"]:
        cost = problem.objective(kept)
        for _ in range(self.sweeps):
            before = cost
            for expert in (number for number in range(problem.experts) if not kept[number]):
                more = kept.clone()
                more[expert] = True
                costs = problem.removal_costs(more)
                least = int(costs.argmin())
                if float(costs[least]) < cost * (1 - ENOUGH):
                    cost, kept = float(costs[least]), more
                    kept[least] = False
            if cost == before:
                break
        return kept


def eliminated(problem: ExpertChoice) -> Bool[Tensor, "experts"]:
    """Return the experts that a greedy elimination keeps."""
    order, _ = elimination(problem)
    return without(problem, order)


def elimination(problem: ExpertChoice) -> tuple[list[int], list[float]]:
    """Return the experts in the order of a greedy elimination until `keep` are left, and the cost after each."""
    kept, order, costs = without(problem, []), list[int](), list[float]()
    while problem.experts - len(order) > problem.keep:
        removals = problem.removal_costs(kept)
        order.append(int(removals.argmin()))
        costs.append(float(removals[order[-1]]))
        kept[order[-1]] = False
    return order, costs


def without(problem: ExpertChoice, gone: Sequence[int]) -> Bool[Tensor, "experts"]:
    """Return the mask of all experts but the given ones."""
    kept = torch.ones(problem.experts, dtype=torch.bool, device=problem.logits.device)
    kept[list(gone)] = False
    return kept


def every_choice(problem: ExpertChoice) -> Iterator[Bool[Tensor, "experts"]]:
    """Yield all feasible choices."""
    for experts in combinations(range(problem.experts), problem.keep):
        kept = torch.zeros(problem.experts, dtype=torch.bool, device=problem.logits.device)
        kept[list(experts)] = True
        yield kept


class ExpertScore(ExpertSolver):
    """Keep the experts with the largest scores, each by itself."""

    def work(self, experts: int, keep: int, *, chosen: int, tokens: int) -> Work:
        return _evaluation(experts, chosen, tokens) * 2

    @abstractmethod
    def score(self, problem: ExpertChoice) -> Float[Tensor, "experts"]:
        """Return the score of each expert in the dense mixture."""

    def choice(self, problem: ExpertChoice) -> Bool[Tensor, "experts"]:
        scores = self.score(problem)
        # Of experts with equal scores the first stay, on every device.
        kept = scores.argsort(descending=True, stable=True)[: problem.keep]
        return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, kept, True)


def _routed(problem: ExpertChoice) -> Bool[Tensor, "tokens experts"]:
    every = torch.ones(problem.experts, dtype=torch.bool, device=problem.logits.device)
    found = torch.zeros_like(problem.logits, dtype=torch.bool)
    return found.scatter_(1, problem.routed(every), True)


@final
@dataclass(frozen=True)
class Reap(ExpertScore):
    """S_j = mean over the tokens t routed to j of g_j(t) |y_j(t)|; an expert without tokens scores 0.

    Router-weighted expert activation pruning (REAP the Experts, arXiv 2510.13999, equation 9). g is the router's
    softmax over all experts, or its sigmoids, as in the authors' code by default; with `renormalised` it is the factor
    of an expert's output in the model, as in llm-compressor. The two differ where the model scales the weights of the
    chosen experts.
    """

    renormalised: bool = False

    def score(self, problem: ExpertChoice) -> Float[Tensor, "experts"]:
        routed = _routed(problem)
        if self.renormalised:
            gates = problem.weights(torch.ones_like(routed[0]))
        else:
            gates = router_gates(problem.logits.double(), sigmoids=problem.correction is not None)
        norms = problem.products.diagonal(dim1=1, dim2=2).double().clamp(min=0).sqrt()
        return (gates * norms * routed).sum(0) / routed.sum(0).clamp(min=1)


@final
@dataclass(frozen=True)
class ExpertFrequency(ExpertScore):
    """The number of tokens that the router sends to an expert."""

    def score(self, problem: ExpertChoice) -> Float[Tensor, "experts"]:
        return _routed(problem).sum(0).double()
