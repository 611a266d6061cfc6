"""Best-swap local search: exchange a kept weight for a dropped one wherever that provably lowers the loss."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.numerics.tensors import places
from optprune.patterns import Exchanges
from optprune.problems import SparseLeastSquares
from optprune.solvers.base import Solver, Status, check_options, measuring, unfitted
from optprune.work import Work, sweeps

REFRESH = 64
"""rounds after which the gradient is computed anew, to remove the rounding of its updates"""
COUPLED = "it exchanges weights row by row, and the full output metric couples the rows: take its diagonal"
ROUNDS_PER_INPUT = 0.09
"""the usual rounds until no row gains, over the inputs, from Wanda with a refit on layers like those of SmolLM2"""


@dataclass(frozen=True, eq=False)
class SwapsState:
    """The weight with its gradient V A - B, and the rows that may still improve. A step writes over these arrays."""

    weight: Float[Tensor, "out in"]
    gradient: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    free: Bool[Tensor, "out in"]
    """the weights that the pattern lets change places"""
    threshold: Float[Tensor, ""]
    """the least gain above rounding"""
    rounds: int
    active: Int[Tensor, " k"]
    """the rows that changed in the last round; the others have no exchange that gains"""


@final
@dataclass(frozen=True)
class Swaps(Solver[SparseLeastSquares, SwapsState]):
    r"""In every round each row makes the best exchange of a kept weight p for a dropped one q, if it gains.

    With g = V A - B, setting v_p to 0 costs r_p = -g_p v_p + A_pp v_p^2 / 2, and giving a dropped q its best value
    then gains (g_q - v_p A_pq)^2 / (2 A_qq), so the exact change of the loss is

        r_p - (g_q - v_p A_pq)^2 / (2 A_qq).

    The pattern says which exchanges keep it (`Pattern.exchanges`). Of a row the `candidates` cheapest p and the most
    gainful q are tried (all of them where it has fewer), and every pair of a group with N:M patterns. Unstructured
    patterns and limits of rows also move weights between rows, from those with the cheapest p to those with the most
    gainful q. All other weights stay, so the method is monotone; follow it with a refit and repeat.

    A round reads from the device once, for the rows that gain, and where weights move between rows twice more, for
    those that do. It costs a few passes over the rows that changed in the last one, and where weights move between rows
    over [out, in]. Stops when no row gains.
    Reference: SparseSwaps (arXiv 2512.10922) for the exact gains with fixed weights; the entering value is ours.
    """

    accepts = (SparseLeastSquares,)

    candidates: int = 32

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        candidates = min(self.candidates, inputs)
        step = sweeps(35, outputs, inputs) + sweeps(30, outputs, candidates, candidates)
        flops = measuring(outputs, inputs, coupled=coupled) + ROUNDS_PER_INPUT * inputs * step
        return Work(flops, unfitted(outputs, inputs, coupled=coupled))

    def unsupported(self, problem: SparseLeastSquares) -> str | None:
        return unknown_exchanges(problem) or (COUPLED if problem.loss.coupled else None)

    def monotone(self, problem: SparseLeastSquares) -> bool:
        return True

    def init(self, problem: SparseLeastSquares, start: Tensor) -> SwapsState:
        loss = problem.loss
        rounding = loss.constant * torch.finfo(start.dtype).eps / start.shape[0]
        threshold = torch.as_tensor(rounding, dtype=start.dtype, device=start.device)
        every = torch.arange(start.shape[0], device=start.device)
        mask = problem.support(start)
        # A copy, because steps write into it.
        weight = torch.where(mask, start, 0.0)
        free = exchanges_of(problem).free(mask)
        return SwapsState(weight, loss.gradient(weight), mask, free, threshold, 0, every)

    def step(self, problem: SparseLeastSquares, state: SwapsState) -> SwapsState:
        gram, exchanges = problem.loss.gram, exchanges_of(problem)
        among = _rows_of(state, state.active)
        removal = _removal_cost(among, gram)
        if exchanges.group is None:
            change, leaving, entering = _best_in_rows(among, gram, removal, self.candidates)
        else:
            change, leaving, entering = _best_in_groups(among, gram, removal, exchanges.group)
        gains = (change < -state.threshold).nonzero()[:, 0]
        active = state.active[gains]
        _drop(state, gram, active, leaving[gains])
        _enter(state, gram, active, entering[gains])
        if exchanges.limits is not None:
            changed = torch.cat([active, _between_rows(state, gram, exchanges)])
            active = torch.zeros_like(state.mask[:, 0]).index_fill_(0, changed, True).nonzero()[:, 0]
        rounds = state.rounds + 1
        gradient = problem.loss.gradient(state.weight) if rounds % REFRESH == 0 else state.gradient
        return replace(state, gradient=gradient, rounds=rounds, active=active)

    def done(self, problem: SparseLeastSquares, state: SwapsState) -> Status | None:
        return None if state.active.numel() else Status.CONVERGED

    def value(self, problem: SparseLeastSquares, state: SwapsState) -> Tensor:
        return state.weight.clone()


def _rows_of(state: SwapsState, rows: Int[Tensor, " k"]) -> SwapsState:
    """Return the state of some rows alone."""
    if rows.numel() == state.weight.shape[0]:
        return state
    parts = (state.weight, state.gradient, state.mask, state.free)
    weight, gradient, mask, free = (part[rows] for part in parts)
    return replace(state, weight=weight, gradient=gradient, mask=mask, free=free)


def _removal_cost(state: SwapsState, gram: Float[Tensor, "in in"]) -> Float[Tensor, "out in"]:
    """Return the cost of removing each kept weight, others fixed; infinite where it is not kept or must stay."""
    cost = state.weight * (state.weight * gram.diagonal() / 2 - state.gradient)
    return torch.where(state.mask & state.free, cost, torch.inf)


def _entry_gain(state: SwapsState, gram: Float[Tensor, "in in"]) -> Float[Tensor, "out in"]:
    """Return the gain of giving each dropped weight its best value, others fixed; 0 where an input is dead.

    It is minus infinity where the weight is not dropped, or must stay so.
    """
    diagonal = gram.diagonal()
    gain = state.gradient.square() / (2 * torch.where(diagonal > 0, diagonal, torch.inf))
    return torch.where(state.mask | ~state.free, -torch.inf, gain)


def _best_in_rows(
    state: SwapsState, gram: Float[Tensor, "in in"], removal: Float[Tensor, "out in"], candidates: int
) -> tuple[Float[Tensor, " out"], Int[Tensor, " out"], Int[Tensor, " out"]]:
    """Return the best exchange of every row among its cheapest p and most gainful q: (change, p, q)."""
    count = min(candidates, removal.shape[1])
    cost, leaving = removal.topk(count, dim=1, largest=False)
    gain, entering = _entry_gain(state, gram).topk(count, dim=1)
    value = state.weight.gather(1, leaving)
    coupling = gram[leaving[:, :, None], entering[:, None, :]]
    slope = state.gradient.gather(1, entering)[:, None, :] - value[:, :, None] * coupling
    diagonal = gram.diagonal()[entering][:, None, :]
    change = cost[:, :, None] - slope.square() / (2 * torch.where(diagonal > 0, diagonal, torch.inf))
    # A row that keeps all or none of its weights has no exchange.
    change = torch.where((cost < torch.inf)[:, :, None] & (gain > -torch.inf)[:, None, :], change, torch.inf)
    best, index = change.flatten(1).min(1)
    return best, leaving.gather(1, (index // count)[:, None])[:, 0], entering.gather(1, (index % count)[:, None])[:, 0]


def _best_in_groups(
    state: SwapsState, gram: Float[Tensor, "in in"], removal: Float[Tensor, "out in"], m: int
) -> tuple[Float[Tensor, " out"], Int[Tensor, " out"], Int[Tensor, " out"]]:
    """Return the best exchange of every row over all pairs within a group: (change, p, q)."""
    rows, width = removal.shape
    groups = width // m
    index = torch.arange(width, device=gram.device).reshape(groups, m)
    blocks = gram[index[:, :, None], index[:, None, :]]
    shape = (rows, groups, m)
    slope = state.gradient.reshape(shape)[:, :, None, :] - state.weight.reshape(shape)[..., None] * blocks
    diagonal = gram.diagonal().reshape(groups, 1, m)
    change = removal.reshape(shape)[..., None] - slope.square() / (2 * torch.where(diagonal > 0, diagonal, torch.inf))
    kept = (state.mask | ~state.free).reshape(shape)
    change = torch.where(kept[:, :, None, :], torch.inf, change)
    best, flat = change.flatten(1).min(1)
    group, leaving, entering = flat // (m * m), flat // m % m, flat % m
    return best, group * m + leaving, group * m + entering


def _drop(state: SwapsState, gram: Float[Tensor, "in in"], rows: Int[Tensor, " k"], columns: Int[Tensor, " k"]) -> None:
    """Set one weight of each given row to zero, in place."""
    value = state.weight[rows, columns]
    state.weight[rows, columns] = 0
    state.mask[rows, columns] = False
    state.gradient[rows] -= value[:, None] * gram[columns]


def _enter(
    state: SwapsState, gram: Float[Tensor, "in in"], rows: Int[Tensor, " k"], columns: Int[Tensor, " k"]
) -> None:
    """Give one dropped weight of each given row its best value, in place."""
    diagonal = gram[columns, columns]
    value = -state.gradient[rows, columns] / torch.where(diagonal > 0, diagonal, torch.inf)
    state.weight[rows, columns] = value
    state.mask[rows, columns] = True
    state.gradient[rows] += value[:, None] * gram[columns]


def _between_rows(state: SwapsState, gram: Float[Tensor, "in in"], exchanges: Exchanges) -> Int[Tensor, " k"]:
    """Move weights, in place, from rows that lose little to rows that gain more, one per row; return those rows."""
    cost, leaving = _removal_cost(state, gram).min(1)
    gain, entering = _entry_gain(state, gram).max(1)
    cost, gain = among_rows(exchanges, state.mask, cost, gain)
    givers, takers = pairs_of_rows(cost, gain, state.threshold)
    if len(givers) == 0:
        return givers
    _drop(state, gram, givers, leaving[givers])
    _enter(state, gram, takers, entering[takers])
    return torch.cat([givers, takers])


def pairs_of_rows(
    cost: Float[Tensor, " out"], gain: Float[Tensor, " out"], threshold: Float[Tensor, ""] | float
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
    """Return pairs of rows: those that lose least by one weight less, and those that gain most by one weight more.

    Every pair lowers the loss by more than the threshold. No row gives and takes.
    """
    givers, takers = cost.argsort(stable=True), gain.argsort(descending=True, stable=True)
    # The t cheapest and the t most gainful rows: every pairing of them gains.
    first = (cost[givers] + threshold < gain[takers]).long().cumprod(0).bool()
    gives = torch.zeros_like(first).index_put_((givers,), first)
    free = first & ~gives[takers]
    count = int(free.sum())
    if count or len(cost) < 2:
        return givers[:count], takers[places(free, count)]
    # The cheapest row may also be the most gainful one: the best pair of two different rows.
    giving, taking = givers[:2], takers[:2]
    rise = (cost[giving][:, None] - gain[taking]).masked_fill(giving[:, None] == taking, torch.inf).flatten()
    found = torch.where(rise < -threshold, rise, torch.inf)
    if not float(found.min()) < torch.inf:
        return givers[:0], takers[:0]
    best = found.argmin()[None]
    return giving[best // 2], taking[best % 2]


def among_rows(
    exchanges: Exchanges, mask: Bool[Tensor, "out in"], cost: Float[Tensor, " out"], gain: Float[Tensor, " out"]
) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """Return the costs of one weight less and the gains of one more, infinite where the row's limits forbid it."""
    less, more = exchanges.giving(mask)
    return torch.where(less, cost, torch.inf), torch.where(more, gain, -torch.inf)


def exchanges_of(problem: SparseLeastSquares) -> Exchanges:
    """Return the exchanges of a problem whose pattern knows them."""
    found = problem.pattern.exchanges()
    assert found is not None
    return found


def unknown_exchanges(problem: SparseLeastSquares) -> str | None:
    """Return why single weights cannot be exchanged under the pattern, in one sentence; None when they can."""
    if problem.pattern.exchanges() is None:
        return f"it does not know which exchanges the pattern {type(problem.pattern).__name__} allows"
    return None
