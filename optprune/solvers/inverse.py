"""The layer loss around its unconstrained minimum, and the costs of removals, for Optimal Brain Surgeon methods."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import NumericalError
from optprune.numerics import linalg
from optprune.numerics.tensors import places
from optprune.problems import Channels, LayerLoss
from optprune.solvers.spectrum import ScaledGram
from optprune.work import DOUBLE, Work, factor, inverse, product, storage, sweeps

SINGULAR = "singular Gram matrix: units were chosen with a ridge of {:.1e} of its mean diagonal added to it"
INACCURATE = "nearly singular Gram matrix: the costs of choices by its inverse have few correct digits"
"""the note where a variance inflation factor is above `MOST_INFLATION`"""

MOST_INFLATION = torch.finfo(torch.float64).eps ** -0.5
"""the largest variance inflation factor A_jj (A^-1)_jj at which a block of A^-1 is inverted with correct digits"""

LARGEST = 1e-3
"""the largest ridge that is tried, as a share of the mean diagonal"""
COLUMNS = 1024
"""the number of columns squared at a time"""


@dataclass(frozen=True, eq=False)
class InverseForm:
    r"""f(V) = f(V0) + 1/2 tr((V - V0) A (V - V0)^T) with V0 = B A^-1, by A^-1 and V0 in float64.

    Removing the columns P and refitting the others gives V = V0 - V0_P (A^-1_PP)^-1 A^-1_P and costs
    1/2 tr(V0_P (A^-1_PP)^-1 V0_P^T). Where A is singular, or could be within its own rounding, a ridge towards the
    original weights of the size of that rounding is added to it, and `notes` says so. A damped A is used without a
    ridge in float64, unless the damping is below the rounding of the moments and A is indefinite. `notes` also says
    where A is so near to a singular matrix that a block of its inverse cannot be inverted accurately. Where there are
    notes, an answer may be worse than the start.

    Reference: Optimal Brain Surgeon (Hassibi and Stork, 1992).
    """

    inverse: Float[Tensor, "in in"]
    minimiser: Float[Tensor, "out in"]
    notes: tuple[str, ...]
    ridge: float
    """the addend of the diagonal of A; zero where A is regular"""

    @classmethod
    def of(cls, loss: LayerLoss) -> "InverseForm":
        # An eigenvalue of A is known to about this share of its size in the dtype that A was given in.
        dtype = torch.float64 if bool((loss.damping > 0).all()) else loss.gram.dtype
        inverse, share, ridge = inverted(loss.gram, 4 * len(loss.gram) * torch.finfo(dtype).eps)
        notes = (SINGULAR.format(share),) if share else ()
        inflation = inverse.diagonal() * loss.gram.diagonal()
        if not notes and bool((inflation > MOST_INFLATION).any()):
            notes = (INACCURATE,)
        weight = loss.weight.double()
        # The ridge pulls to the original weights, like damping, so V0 = W - (W A - B) A^-1 holds with it too.
        return cls(inverse, weight if loss.pull is None else weight - loss.pull.double() @ inverse, notes, ridge)

    def without(self, columns: Int[Tensor, " removed"]) -> Float[Tensor, "out in"]:
        """Return the best weight whose given columns are zero."""
        factor = linalg.cholesky(self.inverse[columns[:, None], columns])
        multiplier = torch.cholesky_solve(self.minimiser[:, columns].T, factor).T
        made_up = multiplier @ self.inverse[columns]
        weight = torch.sub(self.minimiser, made_up, out=made_up)
        # The update has left rounding in place of zeros.
        weight[:, columns] = 0
        return weight


def inverted(matrix: Float[Tensor, "n n"], known: float) -> tuple[Float[Tensor, "n n"], float, float]:
    """Return M^-1 in float64, and the ridge that was added to M: as a share of its mean diagonal, and itself.

    There is none unless M, or M less the share `known` of its mean diagonal, to which its eigenvalues are known, is
    indefinite. It is the first of a rounding, 8 and 64 times that, ..., that makes M positive definite: the error of
    float32 averages of many tokens may be larger than a rounding of their entries.
    """
    size, share = float(matrix.diagonal().double().mean()), 0.0
    room = linalg.by_columns(matrix, torch.float64)
    room.diagonal().sub_(known * size)
    singular = bool(linalg.cholesky_in_place(room))
    # Anew in the same place: there is no more than one copy but what a factorisation takes.
    room.copy_(matrix)
    if singular:
        share = 4 * len(matrix) * torch.finfo(matrix.dtype).eps
        while size > 0 and share < LARGEST:
            room.diagonal().add_(share * size)
            failed = bool(linalg.cholesky_in_place(room))
            room.copy_(matrix)
            if not failed:
                break
            share *= 8
    # Nothing but zeros is as good as the identity.
    ridge = share * size if size > 0 or not singular else 1.0
    room.diagonal().add_(ridge)
    if bool(linalg.cholesky_in_place(room)):
        raise NumericalError("the Gram matrix is indefinite: collect it again, or raise the damping")
    return torch.cholesky_inverse(room, out=room), share, ridge


def cost_rounding(loss: LayerLoss) -> float:
    """Return the rounding of a choice's cost, a sum over inputs in float64: a rounding of the constant for each."""
    return loss.constant * len(loss.damping) * torch.finfo(torch.float64).eps


def unit_blocks(
    matrix: Float[Tensor, "n n"], rows: Float[Tensor, "out n"], each: int
) -> tuple[Float[Tensor, "units each each"], Float[Tensor, "units each each"]]:
    """Return the diagonal blocks M_gg of a matrix and V_g^T V_g of rows V, for units of `each` consecutive columns."""
    index = torch.arange(len(matrix), device=matrix.device).reshape(-1, each)
    if each == 1:
        squares = torch.cat([part.square().sum(0) for part in torch.split(rows, COLUMNS, 1)])
        return matrix.diagonal()[:, None, None].clone(), squares[:, None, None]
    parts = rows.T.reshape(-1, each, len(rows))
    return matrix[index[:, :, None], index[:, None, :]], parts @ parts.transpose(1, 2)


def half_trace(blocks: Float[Tensor, "*b k k"], grams: Float[Tensor, "*b k k"]) -> Float[Tensor, "*b"]:
    """Return 1/2 tr(H^-1 G) for positive definite blocks H."""
    if blocks.shape[-1] == 1:
        return grams[..., 0, 0] / blocks[..., 0, 0] / 2
    # Rounding may have left a block that is not positive definite, whose cost has no meaning.
    factor, _ = linalg.try_cholesky(blocks)
    return torch.cholesky_solve(grams, factor).diagonal(dim1=-2, dim2=-1).sum(-1) / 2


EXCHANGE = 8e7
"""the time of an exchange among a few units, in flops: many small operations, whatever the widths"""


@dataclass(frozen=True, eq=False)
class Exchange:
    """A kept and a dropped unit that change places, and the change of the loss."""

    change: float
    leaving: Int[Tensor, " 1"]
    entering: Int[Tensor, " 1"]


@dataclass(frozen=True, eq=False)
class Tableau:
    r"""The inverse M of a positive definite [n, n] matrix, swept on the dropped columns P, unit by unit.

    The choice costs F = 1/2 tr(V0_P N V0_P^T), N = (M_PP)^-1. With M = A^-1 that is the rise of a layer's loss when P
    is dropped and the rest refitted; a ridge rho omega on dropped columns, in place of dropping them, makes it
    M = A^-1 + diag(1 / (rho omega)). A sweep is a principal pivot: the tableau of another choice follows from it. How
    many units change sides is known to Python, so no sweep waits for the device.
    """

    channels: Channels
    minimiser: Float[Tensor, "out n"]
    """V0, unit by unit"""
    matrix: Float[Tensor, "n n"]
    """-N on P, X = N M_PK between P and K, and M_KK - M_KP N M_PK on the kept columns K"""
    rows: Float[Tensor, "out n"]
    """Y = V0_P N on P, and V0_K - Y M_PK, the best weight of the choice, on K"""
    choice: Bool[Tensor, " units"]
    kept: int
    """the number of units that the choice keeps"""

    @classmethod
    def of(
        cls,
        channels: Channels,
        inverse: Float[Tensor, "in in"],
        minimiser: Float[Tensor, "out in"],
        choice: Bool[Tensor, " units"],
    ) -> "Tableau":
        """Return the tableau of a choice, computed from scratch by n^2 |P| products."""
        flat = channels.columns.reshape(-1)
        weight = minimiser[:, flat]
        everything, dropped = torch.ones_like(choice), len(choice) - int(choice.sum())
        tableau = cls(channels, weight, inverse[flat[:, None], flat], weight, everything, len(choice))
        return tableau.exchanged(places(~choice, dropped), flat[:0])

    @property
    def each(self) -> int:
        """The number of columns of a unit."""
        return self.channels.columns.shape[1]

    @cached_property
    def cost(self) -> float:
        """F of the choice; reads from the device once."""
        dropped = self.columns(self.dropped)
        return float((self.minimiser[:, dropped] * self.rows[:, dropped]).sum()) / 2

    @property
    def dropped(self) -> Int[Tensor, " dropped"]:
        """The units that are dropped, ascending."""
        return places(~self.choice, len(self.choice) - self.kept)

    def worth(self) -> Float[Tensor, " units"]:
        """Return the rise of F when a kept unit alone is dropped, and its fall when a dropped one alone returns."""
        return half_trace(*self._blocks())

    def exchanged(self, leaving: Int[Tensor, " p"], entering: Int[Tensor, " q"]) -> "Tableau":
        """Return the tableau after kept units leave and dropped ones enter, by n^2 products per column of them."""
        choice = self.choice.clone()
        choice[leaving], choice[entering] = False, True
        matrix, rows = self.matrix, self.rows
        for units, sign in ((entering, -1), (leaving, 1)):
            if len(units):
                matrix, rows = _sweep(matrix, rows, self.columns(units.sort().values), sign)
        kept = self.kept + len(entering) - len(leaving)
        return replace(self, matrix=matrix, rows=rows, choice=choice, kept=kept)

    def change(self, leaving: Int[Tensor, " p"], entering: Int[Tensor, " q"]) -> Float[Tensor, ""]:
        """Return the change of F when units leave and enter together, by p^3 + q^3 + out (p + q)^2 products."""
        p, q = self.columns(leaving), self.columns(entering)
        pivot = -self.matrix[q[:, None], q]
        across = self.matrix[q[:, None], p]
        pulled = linalg.try_solve(pivot, torch.cat([across, self.rows[:, q].T], 1))
        gained = (pulled[:, len(p) :] * self.rows[:, q].T).sum() / 2
        block = self.matrix[p[:, None], p] + across.T @ pulled[:, : len(p)]
        weight = self.rows[:, p] + self.rows[:, q] @ pulled[:, : len(p)]
        return (linalg.try_solve(block, weight.T) * weight.T).sum() / 2 - gained

    def best_of_slots(self, score: Float[Tensor, " units"], count: int) -> Int[Tensor, " best"]:
        """Return the `count` units of every slot with the largest scores, ascending; of equal ones the first."""
        by_slot = self.channels.by_slot
        rank = score[by_slot].argsort(dim=1, descending=True, stable=True)[:, :count]
        return by_slot.gather(1, rank).reshape(-1).sort().values

    def best_exchange(self, candidates: int, barred: Bool[Tensor, " units"] | None = None) -> Exchange | None:
        """Return the best exchange of two units of a slot, both candidates and not barred; None if there is none.

        The candidates are the kept units that cost least and the dropped ones that gain most. All slots keep
        equally many. Reads from the device once.
        """
        channels, each = self.channels, self.each
        blocks, grams = self._blocks()
        value = half_trace(blocks, grams)
        free = torch.ones_like(self.choice) if barred is None else ~barred
        kept, dropped = self.choice & free, ~self.choice & free
        sides = self.kept // channels.slot_count, (channels.units - self.kept) // channels.slot_count
        if min(sides) == 0:
            return None
        p, q = (
            self.best_of_slots(torch.where(side, score, -torch.inf), min(candidates, most))
            for side, score, most in zip((kept, dropped), (-value, value), sides, strict=True)
        )
        columns_p, columns_q = self.columns(p), self.columns(q)
        across = self.matrix[columns_q[:, None], columns_p].reshape(len(q), each, len(p), each).transpose(1, 2)
        product = (self.rows[:, columns_q].T @ self.rows[:, columns_p]).reshape(len(q), each, len(p), each)
        pulled = linalg.try_solve(blocks[q][:, None], across)
        mixed = product.transpose(1, 2).transpose(2, 3) @ pulled
        after = blocks[p] + across.transpose(2, 3) @ pulled
        gram = grams[p] + mixed + mixed.transpose(2, 3) + pulled.transpose(2, 3) @ grams[q][:, None] @ pulled
        change = half_trace(after, gram) - value[q][:, None]
        # Candidates of different slots are not exchanged; barred units are candidates where others are few.
        together = (channels.slots[q][:, None] == channels.slots[p]) & dropped[q][:, None] & kept[p]
        change = torch.where(together, change, torch.inf)
        best = change.argmin()[None]
        least = float(change.reshape(-1)[best])
        return None if least == torch.inf else Exchange(least, p[best % len(p)], q[best // len(p)])

    def _blocks(self) -> tuple[Float[Tensor, "units each each"], Float[Tensor, "units each each"]]:
        """Return the diagonal blocks of the matrix and of rows^T rows, positive definite for kept and dropped units."""
        blocks, grams = unit_blocks(self.matrix, self.rows, self.each)
        return torch.where(self.choice[:, None, None], blocks, -blocks), grams

    def columns(self, units: Int[Tensor, " k"]) -> Int[Tensor, " columns"]:
        """Return the rows and columns of the matrix that belong to units."""
        return (units[:, None] * self.each + torch.arange(self.each, device=units.device)).reshape(-1)


def tableau_flops(outputs: int, inputs: int) -> float:
    """Return the flops of a tableau from scratch that drops a quarter of the units."""
    dropped = inputs // 4
    return inverse(dropped) + DOUBLE * product(inputs + outputs, dropped, inputs)


def _sweep(
    matrix: Float[Tensor, "n n"], rows: Float[Tensor, "out n"], pivots: Int[Tensor, " k"], sign: int
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "out n"]]:
    """Move the pivots from the kept to the dropped columns (sign 1) or back (sign -1).

    Only the rows of the pivots are read, never their columns: many sweeps would amplify a rounding by which the matrix
    is not symmetric.
    """
    pivot = matrix[pivots]
    inverse = linalg.try_inverse(pivot[:, pivots])
    inverse = (inverse + inverse.T) / 2
    across = inverse @ pivot
    down = rows[:, pivots] @ inverse
    matrix = torch.addmm(matrix, pivot.T, across, alpha=-1)
    rows = torch.addmm(rows, rows[:, pivots], across, alpha=-1)
    matrix[pivots] = sign * across
    matrix[:, pivots] = sign * across.T
    matrix[pivots[:, None], pivots] = -inverse
    rows[:, pivots] = sign * down
    return matrix, rows


def inverse_gram(loss: LayerLoss) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out in"]]:
    """Return A^-1 and the minimiser B A^-1, fresh tensors, in float64. Raise NumericalError where A is singular."""
    scaled = ScaledGram.of(loss)
    factor = scaled.factor()
    if factor is None:
        raise NumericalError(
            "the Gram matrix is not positive definite by more than rounding (fewer tokens than inputs, or dead inputs, "
            "without damping): damp the loss, e.g. by 0.01"
        )
    inverse = torch.cholesky_inverse(factor, out=factor).div_(scaled.scale[:, None]).div_(scaled.scale)
    weight = loss.weight.double()
    return inverse, weight.clone() if loss.pull is None else weight - loss.pull.double() @ inverse


def entry_costs(loss: LayerLoss) -> Float[Tensor, "out in"]:
    r"""Return S_ii v_ij^2 / (2 (A^-1)_jj), v = B A^-1: the rise of f when weight ij goes and its row is refitted.

    Exact for a diagonal metric; under a full one other rows stay as they are, so it is an upper bound of the rise.
    Raise NumericalError where A is singular, unless it is zero, and so the costs. Cost: in^3. Reference: Hassibi and
    Stork (1992).
    """
    if loss.dead:
        return torch.zeros_like(loss.weight)
    inverse, weight = inverse_gram(loss)
    costs = weight.square() / (2 * inverse.diagonal())
    return (costs if loss.metric is None else loss.metric.diagonal.double()[:, None] * costs).to(loss.weight)


def entry_costs_work(outputs: int, inputs: int, *, coupled: bool = False) -> Work:
    """Return the work of `entry_costs` for a weight [outputs, inputs]; `unit_costs` of single columns takes less."""
    flops = factor(inputs) + inverse(inputs) + DOUBLE * product(outputs, inputs, inputs)
    form = (16.0, 28.0, 8.0) if coupled else (16.0, 12.0)
    return Work(flops + sweeps(10, outputs, inputs), storage(outputs, inputs, *form))


def unit_costs(loss: LayerLoss, channels: Channels) -> Float[Tensor, " units"]:
    r"""Return 1/2 tr(S V_C ((A^-1)_CC)^-1 V_C^T), V = B A^-1: the rise of f when a unit's columns C go.

    All other weights are refitted. Exact for every metric, as all rows lose the same columns. Zero where A is. Cost:
    in^3.
    """
    if loss.dead:
        return torch.zeros_like(loss.weight[0, channels.columns[:, 0]])
    inverse, weight = inverse_gram(loss)
    block = inverse[channels.columns[:, :, None], channels.columns[:, None, :]]
    # [units, columns, out], for the unit's own small system.
    removed, weighed = (v.T[channels.columns] for v in (weight, loss.weigh(weight)))
    return ((linalg.solve(block, removed) * weighed).sum((1, 2)) / 2).to(loss.weight)
