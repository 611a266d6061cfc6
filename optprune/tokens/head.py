"""The problem of the rows that receive the probability of removed tokens, and its solver."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optprune.numerics.linalg import eigh
from optprune.numerics.precision import full_precision
from optprune.tokens.states import States

AT_ONCE = 2048
"""the number of states whose logits are in memory at a time"""
SMALLEST = 1e-3
"""the least eigenvalue of the Gram matrix that is inverted as it is, over the mean of all"""


@dataclass(frozen=True, eq=False)
class HeadMatching:
    """minimise  sum_n w_n D(q_n || p_n(V)) / sum_n w_n + ridge / 2 * tr(C (V - V0) A (V - V0)^T)   over V

        p_n(V)_i = exp(v_i h_n + b_i) / (exp(z0_n) + sum_j exp(v_j h_n + b_j))
        A = sum_n w_n h_n h_n^T / sum_n w_n,    C = diag(c),    c = sum_n w_n q_n / sum_n w_n

    V [receiving, hidden] are the rows of the head that receive the probability of removed tokens, h_n its inputs, q_n
    the targets, and z0_n the logarithm of what all other tokens take, whose rows stay. D is the Kullback-Leibler
    divergence in nats; the targets and the other tokens are one distribution. C and A are its curvature at the
    targets as a product, as in K-FAC (Martens and Grosse 2015, arXiv 1503.05671), so that the ridge is a mean square
    change of logits, weighed by the probability of the token.

    Convex, since logarithms of sums of exponentials are. A row is probable in few states, and without the ridge it
    would fit these alone.
    """

    states: States
    start: Tensor
    """V0 [receiving, hidden], float32"""
    bias: Tensor | None = None
    """b [receiving] where the head has one"""
    ridge: float = 0.0
    gram: Tensor = field(init=False)
    """A [hidden, hidden], float32"""
    probable: Tensor = field(init=False)
    """c [receiving], float32"""

    def __post_init__(self) -> None:
        hidden, weights = self.states.hidden, self.states.weights
        total = sum(
            part.t().float() @ weight
            for part, weight in zip(self.states.targets.split(AT_ONCE), weights.split(AT_ONCE), strict=True)
        )
        object.__setattr__(self, "probable", total / weights.sum())
        object.__setattr__(self, "gram", (hidden * weights[:, None]).t() @ hidden / weights.sum())

    def divergence(self, rows: Tensor, states: States | None = None) -> float:
        """Return the mean divergence in nats for rows V, by default on the states of the problem."""
        states, total = states or self.states, 0.0
        for first in range(0, len(states), AT_ONCE):
            part = states[slice(first, first + AT_ONCE)]
            targets, logits = part.targets.float(), self.logits(part, rows)
            whole = torch.logaddexp(logits.logsumexp(1), part.others)
            rest = (1 - targets.sum(1)).clamp(min=0)
            entropy = torch.special.entr(targets).sum(1) + torch.special.entr(rest)
            crossed = whole - (targets * logits).sum(1) - rest * part.others
            total += float((part.weights * (crossed - entropy)).double().sum())
        return total / float(states.weights.sum())

    def objective(self, rows: Tensor) -> float:
        """Return the value to minimise."""
        change = rows - self.start
        squares = ((change @ self.gram) * change).sum(1)
        return self.divergence(rows) + self.ridge / 2 * float(self.probable @ squares)

    def logits(self, states: States, rows: Tensor) -> Tensor:
        """Return the logits [n, receiving] of some states for rows V."""
        found = states.hidden @ rows.t()
        return found if self.bias is None else found + self.bias

    def slopes(self, states: States, logits: Tensor) -> Tensor:
        """Return w_n (p_n - q_n) [n, receiving] for logits: the gradient of the summed divergence at the logits."""
        whole = torch.logaddexp(logits.logsumexp(1), states.others)
        return ((logits - whole[:, None]).exp() - states.targets) * states.weights[:, None]


@dataclass(frozen=True)
class MatchedHead:
    """Rows that were fitted, with the divergences of held-out states in nats."""

    rows: Tensor
    before: float
    after: float
    epochs: int
    """the number of passes over the states to the rows; 0 where no pass lowered the divergence"""


@torch.no_grad()
@full_precision()
def match_head(
    problem: HeadMatching, held_out: States, *, epochs: int = 2, change: float = 0.3, batch: int = 512, seed: int = 0
) -> MatchedHead:
    """Return the rows with the least divergence on held-out states among those after each pass, and the start.

    Adam (Kingma and Ba, 2015) on the rows in the basis in which the Gram matrix of the hidden states is the identity,
    where a step changes the logits of all states alike: by about `change` nats in the first steps, and by less and
    less. A pass takes three products of [n, hidden] by [hidden, receiving]; the memory is four times that of the rows.
    """
    values, basis = eigh(problem.gram.double())
    roots = values.clamp(min=SMALLEST * float(values.mean())).rsqrt()
    whiten = (basis * roots @ basis.t()).float()
    generator, states = torch.Generator().manual_seed(seed), problem.states
    rate = change / problem.start.shape[1]
    moved, mean, square = (torch.zeros_like(problem.start) for _ in range(3))
    before = problem.divergence(problem.start, held_out)
    best, least, best_epoch = problem.start, before, 0
    steps, step = epochs * math.ceil(len(states) / batch), 0
    for epoch in range(1, epochs + 1):
        for places in torch.randperm(len(states), generator=generator).to(moved.device).split(batch):
            part = states[places]
            inputs = part.hidden @ whiten
            logits = problem.logits(part, problem.start).addmm_(inputs, moved.t())
            slope = problem.slopes(part, logits).t() @ inputs / len(places)
            slope += problem.ridge * problem.probable[:, None] * moved
            step += 1
            mean.lerp_(slope, 0.1)
            square.mul_(0.99).addcmul_(slope, slope, value=0.01)
            now = rate * (1 + math.cos(math.pi * step / steps)) / 2 / (1 - 0.9**step)
            moved.addcdiv_(mean, (square / (1 - 0.99**step)).sqrt_().add_(1e-12), value=-now)
        rows = problem.start + moved @ whiten
        found = problem.divergence(rows, held_out)
        if found < least:
            best, least, best_epoch = rows, found, epoch
    return MatchedHead(best, before, least, best_epoch)
