"""The sweep tableau of a choice of units: what dropping, returning and exchanging units costs, all else refitted."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.numerics import linalg
from optprune.numerics.selection import places
from optprune.problems import Channels
from optprune.solvers.inverse import half_trace, unit_blocks
from optprune.work import DOUBLE, inverse, product

EXCHANGE = 8e7
"""the flops in whose time an exchange among a few units is found: many small operations, whatever the widths"""


@dataclass(frozen=True, eq=False)
class Exchange:
    """A kept and a dropped unit that change places, and by how much the loss changes."""

    change: float
    leaving: Int[Tensor, " 1"]
    entering: Int[Tensor, " 1"]


@dataclass(frozen=True, eq=False)
class Tableau:
    r"""The inverse M of a positive definite [n, n] matrix, swept on the dropped columns P, unit by unit.

    The choice costs F = 1/2 tr(V0_P N V0_P^T), N = (M_PP)^-1. With M = A^-1 that is the rise of a layer's loss when P
    is dropped and the rest refitted; a ridge rho omega on dropped columns, in place of dropping them, makes it
    M = A^-1 + diag(1 / (rho omega)). A sweep is a principal pivot: the tableau of another choice follows from it. How
    many units change sides is known to Python, so that no sweep waits for the device.
    """

    channels: Channels
    minimiser: Float[Tensor, "out n"]
    """V0, unit by unit"""
    matrix: Float[Tensor, "n n"]
    """-N on P, X = N M_PK between, and M_KK - M_KP N M_PK on what is kept"""
    rows: Float[Tensor, "out n"]
    """Y = V0_P N on P, and V0_K - Y M_PK, the best weight of the choice, on what is kept"""
    choice: Bool[Tensor, " units"]
    kept: int
    """how many units the choice keeps"""

    @classmethod
    def of(
        cls,
        channels: Channels,
        inverse: Float[Tensor, "in in"],
        minimiser: Float[Tensor, "out in"],
        choice: Bool[Tensor, " units"],
    ) -> "Tableau":
        """The tableau of a choice, from scratch: n^2 |P| products."""
        flat = channels.columns.reshape(-1)
        weight = minimiser[:, flat]
        everything, dropped = torch.ones_like(choice), len(choice) - int(choice.sum())
        tableau = cls(channels, weight, inverse[flat[:, None], flat], weight, everything, len(choice))
        return tableau.exchanged(places(~choice, dropped), flat[:0])

    @property
    def each(self) -> int:
        """The columns of a unit."""
        return self.channels.columns.shape[1]

    @cached_property
    def cost(self) -> float:
        """F of the choice: one look at the device."""
        dropped = self.columns(self.dropped)
        return float((self.minimiser[:, dropped] * self.rows[:, dropped]).sum()) / 2

    @property
    def dropped(self) -> Int[Tensor, " dropped"]:
        """The units that are dropped, ascending."""
        return places(~self.choice, len(self.choice) - self.kept)

    def worth(self) -> Float[Tensor, " units"]:
        """What F rises by when a kept unit alone is dropped, and falls by when a dropped one alone returns."""
        return half_trace(*self._blocks())

    def exchanged(self, leaving: Int[Tensor, " p"], entering: Int[Tensor, " q"]) -> "Tableau":
        """The tableau after some kept units leave and some dropped ones enter: n^2 products for each column of them."""
        choice = self.choice.clone()
        choice[leaving], choice[entering] = False, True
        matrix, rows = self.matrix, self.rows
        for units, sign in ((entering, -1), (leaving, 1)):
            if len(units):
                matrix, rows = _sweep(matrix, rows, self.columns(units.sort().values), sign)
        kept = self.kept + len(entering) - len(leaving)
        return replace(self, matrix=matrix, rows=rows, choice=choice, kept=kept)

    def change(self, leaving: Int[Tensor, " p"], entering: Int[Tensor, " q"]) -> Float[Tensor, ""]:
        """What F changes by when these units leave and those enter, together: p^3 + q^3 + out (p + q)^2 products."""
        p, q = self.columns(leaving), self.columns(entering)
        pivot = -self.matrix[q[:, None], q]
        across = self.matrix[q[:, None], p]
        pulled = linalg.try_solve(pivot, torch.cat([across, self.rows[:, q].T], 1))
        gained = (pulled[:, len(p) :] * self.rows[:, q].T).sum() / 2
        block = self.matrix[p[:, None], p] + across.T @ pulled[:, : len(p)]
        weight = self.rows[:, p] + self.rows[:, q] @ pulled[:, : len(p)]
        return (linalg.try_solve(block, weight.T) * weight.T).sum() / 2 - gained

    def best_of_slots(self, score: Float[Tensor, " units"], count: int) -> Int[Tensor, " best"]:
        """The `count` units of every slot with the largest scores, ascending; of equal ones the first."""
        by_slot = self.channels.by_slot
        rank = score[by_slot].argsort(dim=1, descending=True, stable=True)[:, :count]
        return by_slot.gather(1, rank).reshape(-1).sort().values

    def best_exchange(self, candidates: int, barred: Bool[Tensor, " units"] | None = None) -> Exchange | None:
        """The best exchange of two units of a slot, both among its candidates and not barred; None if there is none.

        The candidates are the kept units that cost least and the dropped ones that would gain most. All slots keep
        equally many. One look at the device.
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
        # Candidates of different slots have no exchange between them, and what is barred fills up where others are few.
        together = (channels.slots[q][:, None] == channels.slots[p]) & dropped[q][:, None] & kept[p]
        change = torch.where(together, change, torch.inf)
        best = change.argmin()[None]
        least = float(change.reshape(-1)[best])
        return None if least == torch.inf else Exchange(least, p[best % len(p)], q[best // len(p)])

    def _blocks(self) -> tuple[Float[Tensor, "units each each"], Float[Tensor, "units each each"]]:
        """The diagonal blocks of the matrix and of rows^T rows, positive definite on both sides."""
        blocks, grams = unit_blocks(self.matrix, self.rows, self.each)
        return torch.where(self.choice[:, None, None], blocks, -blocks), grams

    def columns(self, units: Int[Tensor, " k"]) -> Int[Tensor, " columns"]:
        """The rows and columns of the matrix that belong to units."""
        return (units[:, None] * self.each + torch.arange(self.each, device=units.device)).reshape(-1)


def tableau_flops(outputs: int, inputs: int) -> float:
    """Return the flops of a tableau from scratch that drops a quarter of the units."""
    dropped = inputs // 4
    return inverse(dropped) + DOUBLE * product(inputs + outputs, dropped, inputs)


def _sweep(
    matrix: Float[Tensor, "n n"], rows: Float[Tensor, "out n"], pivots: Int[Tensor, " k"], sign: int
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "out n"]]:
    """Take the pivots from the kept to the dropped columns (sign 1) or back (sign -1)."""
    inverse = linalg.try_inverse(matrix[pivots[:, None], pivots])
    across = inverse @ matrix[pivots]
    down = rows[:, pivots] @ inverse
    matrix = torch.addmm(matrix, matrix[:, pivots], across, alpha=-1)
    rows = torch.addmm(rows, rows[:, pivots], across, alpha=-1)
    matrix[pivots] = sign * across
    matrix[:, pivots] = sign * across.T
    matrix[pivots[:, None], pivots] = -inverse
    rows[:, pivots] = sign * down
    return matrix, rows
