"""The core of a choice of units: the few whose place is in doubt, and a search that leaves its local optima."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from optprune.problems import ChannelGroups
from optprune.solvers.tableau import Tableau

TENURE = 4
"""the exchange of a walk after which a unit may be moved again, counted from the one that has moved it"""
Descent = Callable[[Tableau], Tableau | None]
"""the tableau of a choice that costs less, found by exchanges; None where there is none"""


@final
@dataclass(frozen=True, eq=False)
class Core:
    """The choice among some units of a tableau with all others held: the same problem, exactly, of a few units.

    Its cost differs from that of the whole choice by a constant. Its steps cost what a few columns cost, whatever the
    width of the layer.
    """

    whole: Tableau
    units: Int[Tensor, " core"]
    """which units of the whole tableau they are"""
    tableau: Tableau
    """the tableau of the core alone"""

    @classmethod
    def of(cls, whole: Tableau, candidates: int) -> "Core | None":
        """The core of the cheapest kept and the most valuable dropped units: None where one side is empty.

        It has `candidates` units of either side, and equally many of every slot.
        """
        slots, worth = whole.channels.slot_count, whole.worth()
        sides = whole.kept // slots, (whole.channels.units - whole.kept) // slots
        most = max(candidates // slots, 1)
        if min(sides) == 0:
            return None
        few = [
            whole.best_of_slots(torch.where(side, score, -torch.inf), min(most, size))
            for side, score, size in zip((whole.choice, ~whole.choice), (-worth, worth), sides, strict=True)
        ]
        units = torch.cat(few)
        index = torch.arange(len(units), device=units.device)
        columns = whole.columns(units)
        channels = ChannelGroups(
            torch.arange(len(columns), device=units.device).reshape(len(units), -1), whole.channels.slots[units]
        )
        part = replace(
            whole,
            channels=channels,
            minimiser=whole.rows[:, columns],
            matrix=whole.matrix[columns[:, None], columns],
            rows=whole.rows[:, columns],
            choice=whole.choice[units],
            kept=len(few[0]),
        )
        # With all of them kept the tableau holds the inverse and the minimiser of the core's own problem.
        base = part.exchanged(index[:0], index[len(few[0]) :])
        return cls(whole, units, Tableau.of(channels, base.matrix, base.rows, part.choice))

    def searched(self, descend: Descent, *, depth: int, walk: int, enough: float) -> Tableau | None:
        """The whole tableau after a search has found a choice that costs less by `enough`; None where it has not.

        Units of every slot are dropped one after another and others return, or the other way round, up to `depth` of
        them; then `walk` exchanges are made in a row, each the best that moves no unit moved just before. Where either
        comes to, it descends from there.
        """
        for count in range(1, depth + 1):
            for drop_first in (True, False):
                away = excursion(self.tableau, count, drop_first=drop_first)
                if away is not None and (found := self._lower(away, descend, enough)) is not None:
                    return found
        away = self._walk(walk, enough)
        return None if away is None else self._lower(away, descend, enough)

    def _lower(self, away: Tableau, descend: Descent, enough: float) -> Tableau | None:
        """The whole tableau after a descent from elsewhere, where that ends lower."""
        while (lower := descend(away)) is not None:
            away = lower
        if not away.cost < self.tableau.cost - enough:
            return None
        left, came = self.tableau.choice & ~away.choice, away.choice & ~self.tableau.choice
        return self.whole.exchanged(self.units[left], self.units[came])

    def _walk(self, steps: int, enough: float) -> Tableau | None:
        """The first tableau of a walk that costs less by `enough`."""
        tableau, change = self.tableau, 0.0
        moved = torch.full_like(tableau.choice, -TENURE, dtype=torch.long)
        # Some unit of either side is always free to move.
        slots = tableau.channels.slot_count
        free = min(tableau.kept, tableau.channels.units - tableau.kept) // slots
        tenure = min(TENURE, free)
        for step in range(steps):
            found = tableau.best_exchange(tableau.channels.units, moved > step - tenure)
            if found is None:
                return None
            tableau, change = tableau.exchanged(found.leaving, found.entering), change + found.change
            moved[found.leaving] = moved[found.entering] = step
            if change < -enough:
                return tableau
        return None


def excursion(tableau: Tableau, depth: int, *, drop_first: bool) -> Tableau | None:
    """The tableau after `depth` units of every slot were dropped and others returned; None where there are too few."""
    slots = tableau.channels.slot_count
    if min(tableau.kept, tableau.channels.units - tableau.kept) // slots < depth:
        return None
    barred: Bool[Tensor, " units"] = torch.zeros_like(tableau.choice)
    for drop in [drop_first] * depth + [not drop_first] * depth:
        free = (tableau.choice if drop else ~tableau.choice) & ~barred
        worth = tableau.worth()
        moving = tableau.best_of_slots(torch.where(free, -worth if drop else worth, -torch.inf), 1)
        nothing = moving[:0]
        tableau = tableau.exchanged(*((moving, nothing) if drop else (nothing, moving)))
        barred[moving] = True
    return tableau
