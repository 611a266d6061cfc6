"""Local search over single weights: exchange a kept for a dropped one at the exact gain with its row refitted."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from optprune.numerics import linalg
from optprune.numerics.tensors import places
from optprune.patterns import NM, Unstructured
from optprune.problems import SparseLeastSquares
from optprune.solvers.base import Solver, Status, check_options, measuring, unfitted
from optprune.solvers.inverse import InverseForm, cost_rounding
from optprune.solvers.swaps import exchanges_refused, pairs_of_rows
from optprune.work import DOUBLE, Work, factor, inverse, product, sweeps

BATCH_BYTES = 1 << 26
"""the memory of the tableaus of the rows that are solved together"""
REFRESH = 64
"""exchanges of a row after which its tableau is computed anew, to remove the rounding of its updates"""
EXCHANGES_PER_INPUT = 0.03
"""the usual number of exchanges of a row for each of its inputs, after ADMM, `Swaps` and a refit"""


@dataclass(frozen=True, eq=False)
class RefittedSwapsState:
    """The weight, the rows to search, and what every other row would lose or gain. A step writes over these arrays."""

    form: InverseForm
    start: Float[Tensor, "out in"]
    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    batch: "Batch | None"
    """the rows that make exchanges now"""
    pending: Int[Tensor, " k"]
    """the rows that are to make exchanges after the batch"""
    cost: Float[Tensor, " out"]
    """the least rise of the loss when a row drops one more weight"""
    leaving: Int[Tensor, " out"]
    """the input of the weight whose removal raises the loss least"""
    gain: Float[Tensor, " out"]
    """the largest fall of the loss when a row keeps one more weight"""
    entering: Int[Tensor, " out"]
    """the input of the weight whose return lowers the loss most"""
    losses: Float[Tensor, " out"]
    """the loss of every row beyond that of its unconstrained minimum"""
    before: Float[Tensor, "out in"] | None = None
    """the weight before weights moved between rows, until all rows that this changed are refitted"""


@final
@dataclass(frozen=True)
class RefittedSwaps(Solver[SparseLeastSquares, RefittedSwapsState]):
    r"""In every round each row makes the best exchange of a kept weight p for a dropped one q, all others refitted.

    With P the dropped inputs of a row, N = (A^-1_PP)^-1, y_P = v0_P N, X = N A^-1_PK, H = (A_KK)^-1 and v the refitted
    weights, taking q back gains y_q^2 / (2 N_qq), and dropping p afterwards costs v'_p^2 / (2 H'_pp),

        v'_p = v_p + y_q X_qp / N_qq,   H'_pp = H_pp + X_qp^2 / N_qq:

    the exact change of the row's loss. Row-wise and unstructured patterns try the `candidates` cheapest p and the most
    gainful q of a row; N:M patterns try every pair of a group. An unstructured pattern also moves weights from rows
    that lose little to rows that gain more. The method is monotone, and its answer is refitted. It stops when no
    exchange of candidates gains more than `tolerance` of a row's loss.

    A step makes an exchange in each of as many rows as fit into 64 MiB. Every row has a tableau [in, in] in float64 of
    its own: in^3 products to make it, and a pass over it for each exchange. So it is for layers of a few thousand
    inputs at most. Run it after `Swaps`, which is quick. Memory: the batch of tableaus and in^2.
    Reference: the local search of OSSCAR (arXiv 2403.12983), for single weights; exact gains by sweeping are ours.
    """

    accepts = (SparseLeastSquares,)

    candidates: int = 32
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        # Tableaus with half of the inputs dropped, twice for every row, and passes in float64 for each exchange.
        half = inputs // 2
        tableau = DOUBLE * (inverse(half) + product(half, half, inputs) + product(inputs, half, inputs))
        row = 2 * tableau + EXCHANGES_PER_INPUT * inputs * sweeps(12, inputs, inputs)
        flops = measuring(outputs, inputs, coupled=coupled) + factor(inputs) + inverse(inputs) + outputs * row
        batch = 3 * max(BATCH_BYTES, 8 * (inputs + 2) ** 2)
        return Work(flops, unfitted(outputs, inputs, coupled=coupled) + batch)

    def unsupported(self, problem: SparseLeastSquares) -> str | None:
        return exchanges_refused(problem)

    def monotone(self, problem: SparseLeastSquares) -> bool:
        return True

    def init(self, problem: SparseLeastSquares, start: Tensor) -> RefittedSwapsState:
        form, mask = InverseForm.of(problem.loss), problem.support(start)
        start = torch.where(mask, start, 0.0)
        every = torch.arange(len(start), device=start.device)
        scores, indices = torch.zeros_like(form.minimiser[:, 0]), torch.zeros_like(every)
        found = (scores, indices, scores.clone(), indices.clone(), scores.clone())
        return RefittedSwapsState(form, start, start.clone(), mask, None, every, *found)

    def step(self, problem: SparseLeastSquares, state: RefittedSwapsState) -> RefittedSwapsState:
        rounding, pattern = cost_rounding(problem.loss), problem.pattern
        batch, pending, before = state.batch, state.pending, state.before
        if batch is None:
            count = max(1, BATCH_BYTES // (8 * (state.mask.shape[1] + 2) ** 2))
            rows, pending = pending[:count], pending[count:]
            batch = Batch.of(state.form, state.mask[rows], rows, rounding / len(state.mask), self.tolerance)
        batch.exchange(state, self.candidates, pattern.m if isinstance(pattern, NM) else None)
        if batch.rounds == REFRESH:
            batch.write(state, torch.arange(len(batch.rows), device=batch.rows.device))
            pending = torch.cat([batch.rows, pending])
        if not len(batch.rows) or batch.rounds == REFRESH:
            batch = None
        if batch is None and not len(pending):
            before = None
            if isinstance(pattern, Unstructured):
                pending = _between_rows(state, rounding + self.tolerance * float(state.losses.mean()))
                before = state.weight.clone() if len(pending) else None
        return replace(state, batch=batch, pending=pending, before=before)

    def done(self, problem: SparseLeastSquares, state: RefittedSwapsState) -> Status | None:
        return None if state.batch is not None or len(state.pending) else Status.CONVERGED

    def value(self, problem: SparseLeastSquares, state: RefittedSwapsState) -> Tensor:
        weight = state.weight if state.before is None else state.before
        # Where A is singular, or nearly so, the refit is inexact.
        if state.form.notes and problem.objective(weight) > problem.objective(state.start):
            return state.start.clone()
        return weight.clone()

    def notes(self, state: RefittedSwapsState) -> tuple[str, ...]:
        return state.form.notes


def _between_rows(state: RefittedSwapsState, threshold: float) -> Int[Tensor, " k"]:
    """Move weights in the masks, from rows that lose little to rows that gain more, one per row; return those rows."""
    givers, takers = pairs_of_rows(state.cost, state.gain, threshold)
    state.mask[givers, state.leaving[givers]] = False
    state.mask[takers, state.entering[takers]] = True
    return torch.cat([givers, takers])


@dataclass(eq=False)
class Batch:
    """Some rows with the tableau of each: [[A^-1, v0^T], [v0, 0]] swept on the row's dropped inputs P, see `Tableau`.

    So place `in` holds y on P, the refitted weights v on the kept inputs K, and -2 times the row's cost. Place `in` + 1
    is for no input: rows that drop less than others point to it.
    """

    rows: Int[Tensor, " k"]
    mask: Bool[Tensor, "k in"]
    tableau: Float[Tensor, "k n n"]
    """-N on P, X between P and K, and (A_KK)^-1 on K"""
    threshold: Float[Tensor, " k"]
    """the least gain that counts: above rounding, and worth a round"""
    rounds: int = 0

    @classmethod
    def of(
        cls,
        form: InverseForm,
        mask: Bool[Tensor, "k in"],
        rows: Int[Tensor, " k"],
        rounding: float,
        tolerance: float,
    ) -> "Batch":
        """Return the tableaus of masks, computed from scratch."""
        width = mask.shape[1]
        inverse, minimiser = pad(form.inverse, (0, 2, 0, 2)), pad(form.minimiser[rows], (0, 2))
        dropped = width - mask.sum(1)
        most = int(dropped.max())
        # The dropped inputs of each row, ascending, and then the place of no input.
        index = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        real = torch.arange(most, device=mask.device) < dropped[:, None]
        index = torch.where(real, index, width + 1)
        removed = inverse[index]
        removed[..., width] = minimiser.gather(1, index)
        columns = index[:, None, :].expand(-1, most, -1)
        corner = removed.gather(2, columns)
        corner.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1.0)
        corner = torch.cholesky_inverse(linalg.cholesky(corner))
        across = corner @ removed
        tableau = torch.baddbmm(inverse, removed.transpose(1, 2), across, alpha=-1)
        tableau[:, width] += minimiser
        tableau[:, :, width] += minimiser
        across.scatter_(2, columns, -corner)
        tableau.scatter_(1, index[:, :, None].expand_as(across), across)
        tableau.scatter_(2, index[:, None, :].expand(-1, width + 2, -1), across.transpose(1, 2))
        return cls(rows, mask, tableau, rounding - tolerance * tableau[:, width, width] / 2)

    def costs(self) -> Float[Tensor, " k"]:
        """Return the loss of every row beyond that of its unconstrained minimum."""
        return -self.tableau[:, -2, -2] / 2

    def weights(self) -> Float[Tensor, "k in"]:
        """Return the refitted weights of the rows."""
        return torch.where(self.mask, self.tableau[:, -2, :-2], 0.0)

    def worth(self) -> tuple[Float[Tensor, "k in"], Float[Tensor, "k in"]]:
        """Return the rise of the loss when a kept weight goes, and its fall when a dropped one returns.

        Where a weight is not kept, or not dropped, it is infinite, or minus infinity.
        """
        pivot, value = self._parts()
        worth = value.square() / (2 * pivot)
        usable = pivot > 0
        return (
            torch.where(self.mask & usable, worth, torch.inf),
            torch.where(~self.mask & usable, worth, -torch.inf),
        )

    def best(
        self, candidates: int, group: int | None
    ) -> tuple[Float[Tensor, " k"], Int[Tensor, " k"], Int[Tensor, " k"]]:
        """Return the best exchange of every row: (change, leaving, entering).

        It is among the candidates of the row, or with a `group` among all pairs of that many consecutive inputs.
        """
        (cost, gain), (pivot, value) = self.worth(), self._parts()
        count, width = self.mask.shape
        each = torch.arange(count, device=pivot.device)
        if group is None:
            most = min(candidates, width)
            p, q = cost.topk(most, dim=1, largest=False).indices, gain.topk(most, dim=1).indices
            p, q = p[:, None], q[:, None]
        else:
            index = torch.arange(width, device=pivot.device).reshape(1, -1, group)
            p = q = index.expand(count, -1, -1)
        across = self.tableau[each[:, None, None, None], q[..., :, None], p[..., None, :]]
        at = each[:, None, None]
        pulled = across / pivot[at, q][..., :, None]
        after = pivot[at, p][..., None, :] + across * pulled
        left = value[at, p][..., None, :] + value[at, q][..., :, None] * pulled
        change = left.square() / (2 * after) - gain[at, q][..., :, None]
        possible = (cost[at, p] < torch.inf)[..., None, :] & (gain[at, q] > -torch.inf)[..., :, None] & (after > 0)
        change, flat = torch.where(possible, change, torch.inf).flatten(1).min(1)
        size = p.shape[2]
        part, entering, leaving = flat // size**2, flat // size % size, flat % size
        return change, p[each, part, leaving], q[each, part, entering]

    def exchange(self, state: RefittedSwapsState, candidates: int, group: int | None) -> None:
        """Make the best exchange of every row, in place; rows that have none that gains go into the state and end."""
        change, leaving, entering = self.best(candidates, group)
        staying = self._end(state, change < -self.threshold)
        if len(staying):
            self._pivot(leaving[staying], entering[staying])
        self.rounds += 1

    def _pivot(self, leaving: Int[Tensor, " k"], entering: Int[Tensor, " k"]) -> None:
        """Let a dropped weight enter and a kept one leave in every row, in place, by two pivots in one pass."""
        each, tableau = torch.arange(len(self.rows), device=leaving.device), self.tableau
        first, second = tableau[each, entering], tableau[each, leaving]
        pivot, crossing = first[each, entering, None], first[each, leaving, None]
        second = second - first * (crossing / pivot)
        second[each, entering] = -(crossing / pivot)[:, 0]
        other = second[each, leaving, None]
        pivots = torch.stack([first / pivot, second / other], 1)
        tableau.baddbmm_(torch.stack([first, second], 2), pivots, alpha=-1)
        row = -first / pivot - second * (second[each, entering, None] / other)
        row[each, entering] = -(1 / pivot + second[each, entering, None].square() / other)[:, 0]
        column = second / other
        column[each, leaving] = -1 / other[:, 0]
        row[each, leaving] = column[each, entering]
        for place, values in ((entering, row), (leaving, column)):
            tableau[each, place], tableau[each, :, place] = values, values
        self.mask[each, leaving], self.mask[each, entering] = False, True

    def _end(self, state: RefittedSwapsState, stays: Bool[Tensor, " k"]) -> Int[Tensor, " staying"]:
        """Write the finished rows into the state, remove them, and return the former places of those that stay."""
        every, count = len(stays), int(stays.sum())
        order = torch.arange(count, device=stays.device)
        if count < every:
            ended = places(~stays, every - count)
            self.write(state, ended)
            # Rows from the end move into the places of those that ended: no other tableau is copied.
            moved = int((ended < count).sum())
            holes, movers = ended[:moved], places(stays, count)[count - moved :]
            order[holes] = movers
            for part in (self.rows, self.mask, self.tableau, self.threshold):
                part[holes] = part[movers]
            self.rows, self.mask, self.tableau = self.rows[:count], self.mask[:count], self.tableau[:count]
            self.threshold = self.threshold[:count]
        return order

    def write(self, state: RefittedSwapsState, which: Int[Tensor, " some"]) -> None:
        """Write some rows into the state, in place: their weights and masks, and what they would lose and gain."""
        rows, (cost, gain) = self.rows[which], self.worth()
        state.weight[rows] = self.weights()[which].to(state.weight)
        state.mask[rows], state.losses[rows] = self.mask[which], self.costs()[which]
        for inputs, values, found in (
            (state.leaving, state.cost, cost.min(1)),
            (state.entering, state.gain, gain.max(1)),
        ):
            values[rows], inputs[rows] = found.values[which], found.indices[which]

    def _parts(self) -> tuple[Float[Tensor, "k in"], Float[Tensor, "k in"]]:
        """Return H_pp of kept and N_qq of dropped inputs, positive but for rounding, and v and y."""
        diagonal = self.tableau.diagonal(dim1=1, dim2=2)[:, :-2]
        return torch.where(self.mask, diagonal, -diagonal), self.tableau[:, -2, :-2]
