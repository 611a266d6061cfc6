"""Local search over single weights: exchange a kept for a dropped one at the exact gain with its row refitted."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from optprune.numerics import linalg
from optprune.numerics.tensors import places
from optprune.patterns import Exchanges
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.solvers.base import Solver, Status, check_options, measuring, unfitted
from optprune.solvers.inverse import InverseForm, cost_rounding, inverted
from optprune.solvers.swaps import among_rows, exchanges_of, pairs_of_rows, unknown_exchanges
from optprune.work import DOUBLE, Work, factor, inverse, product, sweeps

BATCH_BYTES = 1 << 26
"""the memory of the tableaus of the rows that are solved together"""
MOST_COUPLED = 1024
"""the most weights that are exchanged together where a full output metric couples rows"""
COUPLED = (
    "the full output metric couples all {} weights, of which it exchanges at most " + str(MOST_COUPLED) + " together: "
    "take its diagonal"
)
SINGULAR_METRIC = "singular output metric: weights were chosen with a ridge of {:.1e} of its mean diagonal added to it"
REFRESH = 64
"""exchanges of a row after which its tableau is computed anew, to remove the rounding of its updates"""
EXCHANGES_PER_INPUT = 0.03
"""the usual number of exchanges of a row for each of its inputs, after ADMM, `Swaps` and a refit"""


@dataclass(frozen=True, eq=False)
class NormalForm:
    """f(V) = 1/2 tr(V A V^T) - tr(V B^T) up to a constant, row by row, in float64; with a ridge where A is singular.

    Where a full metric S couples the rows, all weights are one row, and A and B are S x A and S B.
    """

    gram: Float[Tensor, "n n"]
    target: Float[Tensor, "rows n"]
    least: Float[Tensor, " rows"]
    """minus twice the unconstrained minimum of each row"""
    notes: tuple[str, ...]

    @classmethod
    def of(cls, loss: LayerLoss) -> "NormalForm":
        """Return the form of a loss."""
        inverse, gram = InverseForm.of(loss), loss.gram.to(torch.float64, copy=True)
        gram.diagonal().add_(inverse.ridge)
        target, minimiser, notes = loss.weight.double() @ gram, inverse.minimiser, inverse.notes
        if loss.pull is not None:
            target -= loss.pull.double()
        if loss.coupled:
            assert loss.metric is not None
            metric = loss.metric.matrix
            _, share, ridge = inverted(metric, 4 * len(metric) * torch.finfo(metric.dtype).eps)
            notes = (*notes, SINGULAR_METRIC.format(share)) if share else notes
            metric = metric.to(torch.float64, copy=True)
            metric.diagonal().add_(ridge)
            gram, target = torch.kron(metric, gram), (metric @ target).reshape(1, -1)
            minimiser = minimiser.reshape(1, -1)
        return cls(gram, target, (minimiser * target).sum(1), notes)


@dataclass(frozen=True, eq=False)
class RefittedSwapsState:
    """The weight, the rows to search, and what every other row would lose or gain. A step writes over these arrays.

    Where a full metric couples the rows, all of them are one row here.
    """

    form: NormalForm
    start: Float[Tensor, "out in"]
    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    free: Bool[Tensor, "out in"]
    """the weights that the pattern lets change places"""
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

    the exact change of the row's loss. The pattern says which exchanges keep it (`Pattern.exchanges`). Of a row the
    `candidates` cheapest p and the most gainful q are tried, and every pair of a group with N:M patterns. Unstructured
    patterns and limits of rows also move weights from rows that lose little to rows that gain more. The method is
    monotone, and its answer is refitted. It stops when no exchange of candidates gains more than `tolerance` of a row's
    loss.

    A full output metric S couples the rows. All weights then are one row with the Hessian S x A, of which every pair
    that the pattern admits is tried. Layers of more than `MOST_COUPLED` weights are refused.

    A step makes an exchange in each of as many rows as fit into 64 MiB. Every row has a tableau [in, in] in float64 of
    its own: in^3 products to make it, and a pass over it for each exchange. So it is for layers of a few thousand
    inputs at most. Run it after `Swaps`, which is quick. Memory: the batch of tableaus and in^2.
    Reference: the local search of OSSCAR (arXiv 2403.12983), for single weights; exact gains by sweeping are ours.
    """

    accepts = (SparseLeastSquares,)

    candidates: int = 32
    tolerance: float = 1e-6
    depth: int = 3
    """the number of exchanges that need not gain before one that does"""

    def __post_init__(self) -> None:
        check_options(self, may_be_zero=("depth",))

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        # Tableaus with half of the inputs dropped, twice for every row, and passes in float64 for each exchange.
        half = inputs // 2
        tableau = DOUBLE * (inverse(half) + product(half, half, inputs) + product(inputs, half, inputs))
        row = 2 * tableau + EXCHANGES_PER_INPUT * inputs * sweeps(12, inputs, inputs)
        flops = measuring(outputs, inputs, coupled=coupled) + factor(inputs) + inverse(inputs) + outputs * row
        batch = 3 * max(BATCH_BYTES, 8 * (inputs + 2) ** 2)
        return Work(flops, unfitted(outputs, inputs, coupled=coupled) + batch)

    def unsupported(self, problem: SparseLeastSquares) -> str | None:
        count = problem.loss.weight.numel()
        too_many = COUPLED.format(count) if problem.loss.coupled and count > MOST_COUPLED else None
        return unknown_exchanges(problem) or too_many

    def monotone(self, problem: SparseLeastSquares) -> bool:
        return True

    def init(self, problem: SparseLeastSquares, start: Tensor) -> RefittedSwapsState:
        loss, mask = problem.loss, problem.support(start)
        form, free = NormalForm.of(loss), exchanges_of(problem).free(mask)
        start = torch.where(mask, start, 0.0)
        if loss.coupled:
            start, mask, free = (part.reshape(1, -1) for part in (start, mask, free))
        every = torch.arange(len(start), device=start.device)
        scores, indices = torch.zeros_like(form.least), torch.zeros_like(every)
        found = (scores, indices, scores.clone(), indices.clone(), scores.clone())
        return RefittedSwapsState(form, start, start.clone(), mask, free, None, every, *found)

    def step(self, problem: SparseLeastSquares, state: RefittedSwapsState) -> RefittedSwapsState:
        rounding, exchanges, loss = cost_rounding(problem.loss), exchanges_of(problem), problem.loss
        batch, pending, before = state.batch, state.pending, state.before
        if batch is None:
            count = max(1, BATCH_BYTES // (8 * (state.mask.shape[1] + 2) ** 2))
            rows, pending = pending[:count], pending[count:]
            batch = Batch.of(state, rows, rounding / len(state.mask), self.tolerance)
        search = Search(self.candidates, self.depth, exchanges.group)
        if loss.coupled:
            pairs = exchanges.pairs(batch.mask.reshape(loss.weight.shape))
            search = replace(search, group=state.mask.shape[1], pairs=pairs)
        batch.exchange(state, search)
        # A search that began anew at every refresh would never end.
        refresh = batch.rounds >= REFRESH and not batch.searching
        if refresh:
            batch.write(state, torch.arange(len(batch.rows), device=batch.rows.device))
            pending = torch.cat([batch.rows, pending])
        if not len(batch.rows) or refresh:
            batch = None
        if batch is None and not len(pending):
            before = None
            if exchanges.limits is not None and not loss.coupled:
                pending = _between_rows(state, exchanges, rounding + self.tolerance * float(state.losses.mean()))
                before = state.weight.clone() if len(pending) else None
        return replace(state, batch=batch, pending=pending, before=before)

    def done(self, problem: SparseLeastSquares, state: RefittedSwapsState) -> Status | None:
        return None if state.batch is not None or len(state.pending) else Status.CONVERGED

    def value(self, problem: SparseLeastSquares, state: RefittedSwapsState) -> Tensor:
        shape = problem.loss.weight.shape
        weight = (state.weight if state.before is None else state.before).reshape(shape)
        start = state.start.reshape(shape)
        # Where A is singular, or nearly so, the refit is inexact.
        if state.form.notes and not problem.objective(weight) <= problem.objective(start):
            return start.clone()
        return weight.clone()

    def notes(self, state: RefittedSwapsState) -> tuple[str, ...]:
        return state.form.notes


def _between_rows(state: RefittedSwapsState, exchanges: Exchanges, threshold: float) -> Int[Tensor, " k"]:
    """Move weights in the masks, from rows that lose little to rows that gain more, one per row; return those rows."""
    givers, takers = pairs_of_rows(*among_rows(exchanges, state.mask, state.cost, state.gain), threshold)
    state.mask[givers, state.leaving[givers]] = False
    state.mask[takers, state.entering[takers]] = True
    return torch.cat([givers, takers])


@dataclass(frozen=True, eq=False)
class Search:
    """The exchanges that are tried in a row."""

    candidates: int
    """the number of kept weights that cost least, and of dropped ones that gain most"""
    depth: int = 0
    """the number of exchanges that need not gain before one that does"""
    group: int | None = None
    """the number of consecutive inputs of which all pairs are tried in place of the candidates"""
    pairs: Bool[Tensor, "n n"] | None = None
    """the admissible pairs, [entering, leaving], where not all of the whole row are"""


@dataclass(eq=False)
class Batch:
    """Some rows with the tableau of each: [[A^-1, v0^T], [v0, 0]] swept on the row's dropped inputs P, see `Tableau`.

    It is computed from A_KK of the kept inputs K, which may be regular where A is not, as N = A_PP - A_PK H A_KP,
    X = -A_PK H and y_P = B_P - B_K H A_KP with H = (A_KK)^-1. So place `in` holds y on P, the refitted weights v on K,
    and -2 times the row's cost. Place `in` + 1 is for no input: rows that keep less than others point to it.
    """

    rows: Int[Tensor, " k"]
    mask: Bool[Tensor, "k in"]
    free: Bool[Tensor, "k in"]
    """the weights that may change places"""
    tableau: Float[Tensor, "k n n"]
    """-N on P, X between P and K, and (A_KK)^-1 on K"""
    threshold: Float[Tensor, " k"]
    """the least gain that counts: above rounding, and worth a round"""
    risen: Float[Tensor, " k"]
    """the rise of each row's loss since it had no exchange that gains; 0 before"""
    away: Int[Tensor, " k"]
    """the number of exchanges since then"""
    rounds: int = 0
    searching: int = 0
    """the number of rows that have gone on by an exchange that does not gain"""

    @classmethod
    def of(cls, state: RefittedSwapsState, rows: Int[Tensor, " k"], rounding: float, tolerance: float) -> "Batch":
        """Return the tableaus of some rows, computed from scratch."""
        form, mask = state.form, state.mask[rows]
        width = mask.shape[1]
        gram, target = pad(form.gram, (0, 2, 0, 2)), pad(form.target[rows], (0, 2))
        kept = mask.sum(1)
        most = int(kept.max())
        # The kept inputs of each row, ascending, and then the place of no input.
        index = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        real = torch.arange(most, device=mask.device) < kept[:, None]
        index = torch.where(real, index, width + 1)
        used = gram[index]
        used[..., width] = target.gather(1, index)
        columns = index[:, None, :].expand(-1, most, -1)
        corner = used.gather(2, columns)
        corner.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1.0)
        # Where A_KK is singular but for rounding the answer is checked at the end.
        corner = torch.cholesky_inverse(linalg.try_cholesky(corner)[0])
        across = corner @ used
        tableau = torch.baddbmm(gram, used.transpose(1, 2), across, alpha=-1)
        tableau[:, :width, :width].neg_()
        tableau[:, width, :width] += target[:, :width]
        tableau[:, :width, width] += target[:, :width]
        tableau[:, width, width].neg_().sub_(form.least[rows])
        across[..., :width].neg_()
        across.scatter_(2, columns, corner)
        tableau.scatter_(1, index[:, :, None].expand_as(across), across)
        tableau.scatter_(2, index[:, None, :].expand(-1, width + 2, -1), across.transpose(1, 2))
        threshold = rounding - tolerance * tableau[:, width, width].clamp(max=0) / 2
        return cls(
            rows=rows,
            mask=mask,
            free=state.free[rows],
            tableau=tableau,
            threshold=threshold,
            risen=torch.zeros_like(threshold),
            away=torch.zeros_like(rows),
        )

    def costs(self) -> Float[Tensor, " k"]:
        """Return the loss of every row beyond that of its unconstrained minimum."""
        return -self.tableau[:, -2, -2] / 2

    def weights(self) -> Float[Tensor, "k in"]:
        """Return the refitted weights of the rows."""
        return torch.where(self.mask, self.tableau[:, -2, :-2], 0.0)

    def worth(self) -> tuple[Float[Tensor, "k in"], Float[Tensor, "k in"]]:
        """Return the rise of the loss when a kept weight goes, and its fall when a dropped one returns.

        Where a weight is not kept, or not dropped, or may not change places, it is infinite, or minus infinity.
        """
        pivot, value = self._parts()
        worth = value.square() / (2 * pivot)
        usable = (pivot > 0) & self.free
        return (
            torch.where(self.mask & usable, worth, torch.inf),
            torch.where(~self.mask & usable, worth, -torch.inf),
        )

    def best(self, search: "Search") -> tuple[Float[Tensor, " k"], Int[Tensor, " k"], Int[Tensor, " k"]]:
        """Return the best exchange of every row: (change, leaving, entering)."""
        (cost, gain), (pivot, value) = self.worth(), self._parts()
        count, width = self.mask.shape
        each = torch.arange(count, device=pivot.device)
        if search.group is None:
            most = min(search.candidates, width)
            p, q = cost.topk(most, dim=1, largest=False).indices, gain.topk(most, dim=1).indices
            p, q = p[:, None], q[:, None]
        else:
            index = torch.arange(width, device=pivot.device).reshape(1, -1, search.group)
            p = q = index.expand(count, -1, -1)
        across = self.tableau[each[:, None, None, None], q[..., :, None], p[..., None, :]]
        at = each[:, None, None]
        pulled = across / pivot[at, q][..., :, None]
        after = pivot[at, p][..., None, :] + across * pulled
        left = value[at, p][..., None, :] + value[at, q][..., :, None] * pulled
        change = left.square() / (2 * after) - gain[at, q][..., :, None]
        possible = (cost[at, p] < torch.inf)[..., None, :] & (gain[at, q] > -torch.inf)[..., :, None] & (after > 0)
        possible = possible if search.pairs is None else possible & search.pairs
        change, flat = torch.where(possible, change, torch.inf).flatten(1).min(1)
        size = p.shape[2]
        part, entering, leaving = flat // size**2, flat // size % size, flat % size
        return change, p[each, part, leaving], q[each, part, entering]

    def exchange(self, state: RefittedSwapsState, search: "Search") -> None:
        """Make the best exchange of every row, in place; rows that have ended are removed.

        A row without one that gains is written into the state, and goes on by the best that there is.
        """
        change, leaving, entering = self.best(search)
        risen = self.risen + change
        gains = risen < -self.threshold
        onward = ~gains & (self.away < search.depth) & (change < torch.inf)
        found, stays = ~gains & (self.away == 0), gains | onward
        first, count, self.searching = linalg.numbers(found.sum(), stays.sum(), onward.sum())
        if first:
            self.write(state, places(found, first))
        staying = self._keep(stays, count)
        if count:
            leaving, entering, gains = leaving[staying], entering[staying], gains[staying]
            self._pivot(leaving, entering)
            self.risen = torch.where(gains, 0.0, risen[staying])
            self.away = torch.where(gains, 0, self.away + 1)
            each = torch.arange(count, device=staying.device)
            self.free[each, entering] = False
            self.free = torch.where(gains[:, None], state.free[self.rows], self.free)
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

    def _keep(self, stays: Bool[Tensor, " k"], count: int) -> Int[Tensor, " staying"]:
        """Remove the rows that do not stay, and return the former places of those that do."""
        every, order = len(stays), torch.arange(count, device=stays.device)
        if count < every:
            ended = places(~stays, every - count)
            # Rows from the end move into the places of those that ended: no other tableau is copied.
            moved = int((ended < count).sum())
            holes, movers = ended[:moved], places(stays, count)[count - moved :]
            order[holes] = movers
            for name in ("rows", "mask", "free", "tableau", "threshold", "risen", "away"):
                part = getattr(self, name)
                part[holes] = part[movers]
                setattr(self, name, part[:count])
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
