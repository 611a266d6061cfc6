"""SPAP: the choice of units by a growing penalty on dropped columns and alternating minimisation, then a refit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError
from optprune.numerics import linalg
from optprune.problems import Channels, StructuredLeastSquares
from optprune.solvers.base import Solver, Status, check_options, measuring, unfitted
from optprune.solvers.inverse import EXCHANGE, InverseForm, Tableau, cost_rounding, tableau_flops
from optprune.work import Work, factor, inverse, product

TENURE = 4
"""the exchanges of a walk before a moved unit may be moved again"""
Descend = Callable[[Tableau], Tableau | None]
"""the tableau of a choice that costs less, found by exchanges; None where there is none"""


@final
@dataclass(frozen=True, eq=False)
class Core:
    """The choice among some units of a tableau with all others fixed: exactly the same problem with few units.

    Its cost differs from that of the whole choice by a constant. Its steps cost as much as a few columns, whatever the
    width of the layer.
    """

    whole: Tableau
    units: Int[Tensor, " core"]
    """the indices of the core's units in the whole tableau"""
    tableau: Tableau
    """the tableau of the core alone"""

    @classmethod
    def of(cls, whole: Tableau, candidates: int) -> "Core | None":
        """Return the core of the cheapest kept and the most valuable dropped units; None where one side is empty.

        It has `candidates` units of each side, equally many of every slot.
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
        channels = Channels(
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
        # With all units kept the tableau holds the inverse and the minimiser of the core's problem.
        base = part.exchanged(index[:0], index[len(few[0]) :])
        return cls(whole, units, Tableau.of(channels, base.matrix, base.rows, part.choice))

    def searched(self, descend: Descend, *, depth: int, walk: int, enough: float) -> Tableau | None:
        """Return the whole tableau after a search for a choice that costs less by `enough`; None where it found none.

        Units of every slot are dropped one after another and others return, or the other way round, up to `depth` of
        them; then `walk` exchanges are made in a row, each the best that moves no unit moved just before. From
        either result it descends.
        """
        for count in range(1, depth + 1):
            for drop_first in (True, False):
                away = excursion(self.tableau, count, drop_first=drop_first)
                if away is not None and (found := self._lower(away, descend, enough)) is not None:
                    return found
        away = self._walk(walk, enough)
        return None if away is None else self._lower(away, descend, enough)

    def _lower(self, away: Tableau, descend: Descend, enough: float) -> Tableau | None:
        """Return the whole tableau after a descent from another choice, where it ends lower, else None."""
        while (lower := descend(away)) is not None:
            away = lower
        if not away.cost < self.tableau.cost - enough:
            return None
        left, came = self.tableau.choice & ~away.choice, away.choice & ~self.tableau.choice
        return self.whole.exchanged(self.units[left], self.units[came])

    def _walk(self, steps: int, enough: float) -> Tableau | None:
        """Return the first tableau of a walk that costs less by `enough`."""
        tableau, change = self.tableau, 0.0
        moved = torch.full_like(tableau.choice, -TENURE, dtype=torch.long)
        # Some unit of each side is always free to move.
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
    """Return the tableau after `depth` units of every slot were dropped and others returned; None if too few exist."""
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


Scale = Literal["inverse", "gram", "unit"]

CHANGES_PER_PENALTY = 3
"""the products [out, in] x [in, in] in whose time the choice settles under a penalty, on layers like SmolLM2's"""


@dataclass(frozen=True, eq=False)
class SpapState:
    """The two blocks of variables, V and the choice, both in the tableau, and the position in the schedule."""

    form: InverseForm
    scale: Float[Tensor, " in"]
    """omega"""
    tableau: Tableau
    """the tableau of A^-1 + diag(1 / (rho omega))"""
    rho: float
    gain: float
    """what a lower F must be lower by"""
    settled: bool
    """whether the last z-step found nothing lower"""
    searched: bool
    """whether the core of the choice, at the last penalty, has nothing lower"""
    changes: int
    """the number of changes of the choice"""


@final
@dataclass(frozen=True)
class Spap(Solver[StructuredLeastSquares, SpapState]):
    r"""Alternating minimisation of the penalised problem in V and in the choice, with a growing penalty.

        F(V, z) = f(V) + rho / 2 sum_j (1 - z_j) sum_{c in unit j} omega_c |V_c|^2

    V-step, in closed form: V = B (A + rho diag((1 - z) omega))^-1. With V0 = B A^-1, M = A^-1 + diag(1 / (rho omega)),
    the dropped columns P and Y = V0_P (M_PP)^-1 it is V0 - Y A^-1_P, and min_V F(V, z) = f(V0) + 1/2 tr(Y V0_P^T):
    the penalty is a ridge on A^-1.
    z-step, with the response of V: the worth of a kept unit is the rise of F when it alone is dropped, that of a
    dropped one the fall of F when it alone returns, both in closed form. The dropped units worth more than kept ones of
    their slot change places with them, the best pairs first: all such pairs if that lowers F, else half of them, and so
    on; where no number of them does, the best single exchange of `candidates` by `candidates` units, at its exact
    change. When no exchange lowers F by more than `tolerance` of it, rho grows by `growth`, from `first` to `last`. At
    the last penalty the core is searched, the `candidates` units of each side whose place is most in doubt, all others
    fixed: d of them are dropped one after another and d others return, or the other way round, for d up to `depth`;
    then `walk` exchanges are made in a row, each the best that moves no unit moved just before. Where this ends lower,
    the alternation continues from there.

    At fixed rho F never rises, and as there are finitely many choices and each is left for a strictly lower F, the
    alternation ends in finitely many steps, at a choice and without rounding. A z-step by |V_j|^2 alone, which is the
    slope of the concave function min_V F(V, z), changes nothing: once penalised, a column is too small to return.

    For rho -> 0 the best choice is the ranking by omega_c |V0_c|^2, for rho -> infinity F is the cost of removal.
    The scale selects the ranking: `inverse` omega = 1 / diag(A^-1), the score of Optimal Brain Surgeon, `gram`
    omega = diag(A), `unit` omega = 1 (in units of the mean of diag(A)). Accepts structured problems; the
    start is not used. Follow it with a refit.

    A z-step reads from the device five times at most. A new penalty costs n^2 |P| + n |P| out, n the columns of units,
    a change of the choice as much for the columns that change, a search of the core as much as a few columns; memory 4
    n^2 + 4 out n, all in float64. Reference: SPAP (arXiv 2505.03373), a reconstruction from its abstract; z-step,
    scales and the search of the core are ours.
    """

    accepts = (StructuredLeastSquares,)

    scale: Scale = "inverse"
    first: float = 1.0
    growth: float = 100.0
    last: float = 1e4
    depth: int = 8
    walk: int = 50
    candidates: int = 16
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_options(self, may_be_zero=("depth", "walk", "tolerance"))
        if not (self.first <= self.last and (self.growth > 1 or self.first == self.last)):
            raise InputError(
                f"the penalty of {self.label} cannot grow from {self.first:g} to {self.last:g} by {self.growth:g}: "
                "give a last that is not below first, and a growth above 1"
            )

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        penalties = 1 + math.ceil(math.log(self.last / self.first, self.growth)) if self.last > self.first else 1
        changes = CHANGES_PER_PENALTY * penalties * product(outputs, inputs, inputs)
        # Excursions of 1, 2, ... units out and back, twice, then the walk.
        searched = (2 * self.depth * (self.depth + 1) + self.walk) * EXCHANGE
        flops = measuring(outputs, inputs, coupled=coupled) + factor(inputs) + inverse(inputs)
        flops += penalties * tableau_flops(outputs, inputs) + changes + searched
        return Work(flops, unfitted(outputs, inputs, coupled=coupled))

    def init(self, problem: StructuredLeastSquares, start: Tensor) -> SpapState:
        form = InverseForm.of(problem.loss)
        scale = self._column_scale(problem, form)
        size = problem.channels.sum_columns((scale * form.minimiser.square()).sum(0))
        tableau = _penalised(problem, form, self.first * scale, problem.pattern.project(size))
        return SpapState(form, scale, tableau, self.first, cost_rounding(problem.loss), False, False, 0)

    def step(self, problem: StructuredLeastSquares, state: SpapState) -> SpapState:
        """Make a step that lowers F, or a step of the schedule where no exchange lowers F."""
        if not state.settled:
            lower = self._lower(state.tableau, self._enough(state.tableau, state.gain))
            if lower is None:
                return replace(state, settled=True)
            return replace(state, tableau=lower, changes=state.changes + 1)
        if state.rho < self.last:
            rho = min(state.rho * self.growth, self.last)
            tableau = _penalised(problem, state.form, rho * state.scale, state.tableau.choice)
            return replace(state, tableau=tableau, rho=rho, settled=False)
        lower = self._core(state.tableau, state.gain)
        if lower is None:
            return replace(state, searched=True)
        return replace(state, tableau=lower, settled=False, changes=state.changes + 1)

    def done(self, problem: StructuredLeastSquares, state: SpapState) -> Status | None:
        return Status.CONVERGED if state.searched else None

    def value(self, problem: StructuredLeastSquares, state: SpapState) -> Tensor:
        mask = problem.mask(state.tableau.choice)
        return torch.where(mask, penalised_minimiser(state), 0.0).to(problem.loss.weight)

    def notes(self, state: SpapState) -> tuple[str, ...]:
        return state.form.notes

    def _column_scale(self, problem: StructuredLeastSquares, form: InverseForm) -> Float[Tensor, " in"]:
        """Return omega, positive and in the unit of A, so that rho has no unit."""
        gram = problem.loss.gram.double().diagonal()
        # Never zero, because a dead input would have an infinite 1 / omega.
        mean = gram.mean() if bool(gram.mean() > 0) else torch.ones_like(gram[0])
        match self.scale:
            case "inverse":
                return 1 / form.inverse.diagonal()
            case "gram":
                return gram.clamp(min=mean * torch.finfo(gram.dtype).eps)
            case "unit":
                return mean.expand_as(gram)

    def _enough(self, tableau: Tableau, gain: float) -> float:
        return max(self.tolerance * tableau.cost, gain)

    def _lower(self, tableau: Tableau, enough: float) -> Tableau | None:
        """Return the tableau after a z-step and its V-step; None where no exchange lowers F by `enough`."""
        leaving, entering = _pairs(tableau)
        halves = [len(leaving) >> turn for turn in range(len(leaving).bit_length())]
        # All pairs are read first: the halves, which together cost less, are mostly not needed.
        for counts in (halves[:1], halves[1:]):
            changes = [tableau.change(leaving[:count], entering[:count]) for count in counts]
            for count, change in zip(counts, linalg.numbers(*changes) if changes else (), strict=True):
                if change < -enough:
                    return tableau.exchanged(leaving[:count], entering[:count])
        found = tableau.best_exchange(self.candidates)
        if found is None or not found.change < -enough:
            return None
        return tableau.exchanged(found.leaving, found.entering)

    def _core(self, tableau: Tableau, gain: float) -> Tableau | None:
        """Return the tableau after a search among the units in doubt; None where it finds nothing lower."""
        core = Core.of(tableau, self.candidates) if self.depth or self.walk else None
        if core is None:
            return None
        enough = self._enough(tableau, gain)
        return core.searched(lambda away: self._lower(away, enough), depth=self.depth, walk=self.walk, enough=enough)


def _penalised(
    problem: StructuredLeastSquares, form: InverseForm, strength: Float[Tensor, " in"], choice: Tensor
) -> Tableau:
    """Return the tableau of a choice whose dropped columns c cost strength_c / 2 |V_c|^2."""
    return Tableau.of(problem.channels, form.inverse + torch.diag(1 / strength), form.minimiser, choice)


def penalised_minimiser(state: SpapState) -> Float[Tensor, "out in"]:
    """Return argmin_V F(V, z) for the state's choice and penalty."""
    tableau = state.tableau
    dropped = (~tableau.choice).nonzero()[:, 0]
    multiplier = tableau.rows.reshape(len(tableau.rows), -1, tableau.each)[:, dropped].flatten(1)
    return state.form.minimiser - multiplier @ state.form.inverse[tableau.channels.columns[dropped].reshape(-1)]


def _pairs(tableau: Tableau) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Return kept units, and the dropped ones of their slots that are worth more, the best pairs first.

    In every slot the cheapest kept unit goes with the most valuable dropped one, and so on.
    """
    worth, channels = tableau.worth(), tableau.channels
    order = channels.by_slot
    kept, value = tableau.choice[order], worth[order]
    pairs = min(tableau.kept, channels.units - tableau.kept) // channels.slot_count
    cost, cheapest = torch.where(kept, value, torch.inf).sort(dim=1, stable=True)
    gain, most_valuable = torch.where(kept, -torch.inf, value).sort(dim=1, descending=True, stable=True)
    better = (gain - cost)[:, :pairs].reshape(-1)
    found = better.argsort(descending=True, stable=True)[: int((better > 0).sum())]
    leaving, entering = (order.gather(1, rank)[:, :pairs].reshape(-1)[found] for rank in (cheapest, most_valuable))
    return leaving, entering
