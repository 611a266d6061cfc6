"""SPAP: the choice of units by a penalty on the dropped columns and alternating minimisation, then a refit."""

import math
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.patterns import SlotWise
from optprune.problems import Problem, StructuredProblem
from optprune.solvers.base import Solver, check_options
from optprune.solvers.inverse import InverseForm, refusal
from optprune.solvers.solution import Status

Scale = Literal["inverse", "gram", "unit"]


@dataclass(frozen=True, eq=False)
class SpapState:
    """The two blocks of variables, V and the choice, and where the schedule stands."""

    form: InverseForm
    scale: Float[Tensor, " in"]
    """omega"""
    weight: Float[Tensor, "out in"]
    """the minimiser in V for the choice before the last z-step"""
    diagonal: Float[Tensor, " in"]
    """of the inverse of the penalised A that goes with it"""
    choice: Bool[Tensor, " units"]
    keep: int
    """how many units of each slot the current stage keeps"""
    stage: int
    rho: float
    settled: bool
    """whether the last z-step found nothing cheaper"""


@final
@dataclass(frozen=True)
class Spap(Solver[SpapState]):
    r"""Alternating minimisation of the penalised problem in V and in the choice, with a growing penalty.

        F(V, z) = f(V) + rho / 2 sum_j (1 - z_j) sum_{c in unit j} omega_c |V_c|^2

    V-step, in closed form: V = B (A + rho diag((1 - z) omega))^-1, computed as a change of the minimiser V0 = B A^-1 on
    the dropped columns P alone: V = V0 - V0_P (A^-1_PP + diag(1 / (rho omega_P)))^-1 A^-1_P.
    z-step, exact: keep the units with the largest sum of omega_c |V_c|^2 (in each slot).
    When the choice has settled, rho grows by `growth`, from `first` to `last`.

    min_V F(V, z) is a minimum of functions linear in z, so it is concave in z, with slope -rho / 2 omega |V_j|^2: the
    z-step is a Frank-Wolfe step of length one. At fixed rho F never rises, and as there are finitely many choices and
    each is left for a strictly lower F, the alternation ends in finitely many steps, at a choice and without rounding.

    The scale decides what the first choice looks like, and the alternation rarely leaves it: `inverse` omega =
    1 / diag(A^-1), the score of Optimal Brain Surgeon, `gram` omega = diag(A), `unit` omega = 1 (in units of the mean
    of diag(A)). With `stages` > 1 the number of dropped units grows in as many stages to its final one, at the penalty
    `last`, and the scale `inverse` follows: at the beginning of a stage omega_c = 1 / H_cc for the kept columns, H the
    inverse of the penalised A. Accepts structured and linked problems; the start is not used. Follow it with a refit.

    A step costs |P|^3 / 3 + |P|^2 in + out |P| in; memory 2 in^2 + 3 out in, all in float64.
    Reference: SPAP (arXiv 2505.03373), a reconstruction from its abstract; scales and continuation are ours.
    """

    scale: Scale = "inverse"
    first: float = 0.1
    growth: float = 10.0
    last: float = 1000.0
    stages: int = 8

    def __post_init__(self) -> None:
        check_options(self)

    def why_not(self, problem: Problem) -> str | None:
        return refusal(problem, "drops")

    def init(self, problem: Problem, start: Tensor) -> SpapState:
        assert isinstance(problem, StructuredProblem)
        form = InverseForm.of(problem.loss)
        scale = self._column_scale(problem, form.inverse.diagonal())
        keep = self._keep(problem, 1)
        choice = _cheapest_penalty(problem, keep, scale, form.minimiser)
        rho = self.first if self.stages == 1 else self.last
        return SpapState(form, scale, form.minimiser, form.inverse.diagonal(), choice, keep, 1, rho, False)

    def step(self, problem: Problem, state: SpapState) -> SpapState:
        assert isinstance(problem, StructuredProblem)
        if state.settled:
            # Nothing but the schedule moves, so that every step either lowers F or is one of the schedule's.
            if state.stage < self.stages:
                state = self._next_stage(problem, state)
            else:
                state = replace(state, rho=state.rho * self.growth)
        weight, diagonal = penalised_minimiser(problem, state.form, state.rho * state.scale, state.choice)
        choice = _cheapest_penalty(problem, state.keep, state.scale, weight)
        before, after = (_penalty(problem, state.scale, weight, mask) for mask in (state.choice, choice))
        # Among equals the choice stays as it is: that is what makes the number of steps finite.
        settled = not after < before
        choice = state.choice if settled else choice
        return replace(state, weight=weight, diagonal=diagonal, choice=choice, settled=settled)

    def done(self, problem: Problem, state: SpapState) -> Status | None:
        finished = state.settled and state.stage == self.stages and state.rho * self.growth > self.last
        return Status.CONVERGED if finished else None

    def value(self, problem: Problem, state: SpapState) -> Tensor:
        assert isinstance(problem, StructuredProblem)
        mask = problem.mask(state.choice)
        if state.stage < self.stages:
            keep = problem.pattern.keep
            mask = problem.mask(_cheapest_penalty(problem, keep, state.scale, state.weight * mask))
        return torch.where(mask, state.weight, 0.0).to(problem.loss.weight)

    def notes(self, state: SpapState) -> tuple[str, ...]:
        return state.form.notes

    def _next_stage(self, problem: StructuredProblem, state: SpapState) -> SpapState:
        """Drop more units, by the scale that goes with those dropped so far."""
        kept = problem.mask(state.choice)[0]
        scale = torch.where(kept, self._column_scale(problem, state.diagonal), state.scale)
        keep = self._keep(problem, state.stage + 1)
        choice = _cheapest_penalty(problem, keep, scale, state.weight)
        return replace(state, scale=scale, keep=keep, stage=state.stage + 1, choice=choice)

    def _column_scale(self, problem: StructuredProblem, inverse: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
        """omega, positive and in the unit of A, so that rho has none; from the diagonal of the inverse."""
        gram = problem.loss.gram.double().diagonal()
        # Never zero: a dead input would have an infinite 1 / omega.
        mean = gram.mean() if bool(gram.mean() > 0) else torch.ones_like(gram[0])
        match self.scale:
            case "inverse":
                return 1 / inverse
            case "gram":
                return gram.clamp(min=mean * torch.finfo(gram.dtype).eps)
            case "unit":
                return mean.expand_as(gram)

    def _keep(self, problem: StructuredProblem, stage: int) -> int:
        """How many units of a slot a stage keeps: the drop is spread evenly over the stages, the last one drops all."""
        most, least = problem.channels.units // problem.channels.slot_count, problem.pattern.keep
        return most - math.ceil((most - least) * stage / self.stages)


def penalised_minimiser(
    problem: StructuredProblem, form: InverseForm, strength: Float[Tensor, " in"], choice: Bool[Tensor, " units"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " in"]]:
    """argmin_V f(V) + 1/2 sum over the dropped columns c of strength_c |V_c|^2, and diag((A + penalty)^-1)."""
    dropped = problem.channels.columns[~choice].reshape(-1)
    part = form.inverse[dropped]
    factor = torch.linalg.cholesky(part[:, dropped] + torch.diag(1 / strength[dropped]))
    lower = torch.linalg.solve_triangular(factor, part, upper=False)
    right = torch.linalg.solve_triangular(factor, form.minimiser[:, dropped].T, upper=False)
    diagonal = form.inverse.diagonal()
    # Positive in exact arithmetic; where A is nearly singular rounding may eat all of it.
    left = (diagonal - lower.square().sum(0)).clamp(min=diagonal * torch.finfo(diagonal.dtype).eps)
    return form.minimiser - right.T @ lower, left


def _cheapest_penalty(
    problem: StructuredProblem, keep: int, scale: Float[Tensor, " in"], weight: Float[Tensor, "out in"]
) -> Bool[Tensor, " units"]:
    """The choice of `keep` units of each slot with the least penalty on the rest, exactly."""
    channels = problem.channels
    return SlotWise(channels.slots, keep).project(channels.sum_columns((scale * weight.square()).sum(0)))


def _penalty(
    problem: StructuredProblem, scale: Float[Tensor, " in"], weight: Float[Tensor, "out in"], choice: Tensor
) -> float:
    return float(problem.channels.sum_columns((scale * weight.square()).sum(0))[~choice].sum())
