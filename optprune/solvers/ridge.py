"""The ridge of the last refit, chosen for each layer on held-out tokens, which then join the fitted tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError
from optprune.moments import InputMoments
from optprune.problems import LayerLoss, Problem
from optprune.solvers.base import AnySolver, Record, Solution
from optprune.solvers.chain import Chain
from optprune.solvers.conjugate_gradients import ConjugateGradients
from optprune.solvers.restore import Restore
from optprune.solvers.run import answer, choose, solve


@dataclass(frozen=True)
class Refitted:
    """A layer's answer, refitted under the ridge chosen on held-out tokens."""

    problem: Problem
    """the problem with that ridge, over the tokens of the final fit"""
    solution: Solution
    held_out_error: float
    """E|V x* - W x|^2 / E|W x|^2 on the held-out tokens, for the answer that was not fitted to them"""


def last_refit(solver: AnySolver) -> Restore | ConjugateGradients | None:
    """Return the refit that a solver ends with, or None where it ends otherwise."""
    last = solver.stages[-1] if isinstance(solver, Chain) and solver.stages else solver
    return last if isinstance(last, Restore | ConjugateGradients) else None


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The loss of a layer's answer on held-out tokens, without a ridge, with the bias of the fitted tokens.

    The tokens are held out in this layer only: the metric, a global budget and refits of earlier blocks use all tokens.
    """

    fitted: LayerLoss
    held_out: LayerLoss

    @classmethod
    def of(cls, loss: LayerLoss, held_out: InputMoments) -> "HeldOut":
        """Return the losses of a layer on the fitted and on the held-out tokens."""
        return cls(loss, LayerLoss.of(loss.weight, held_out, fit_bias=loss.fit_bias, metric=loss.metric))

    def value(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the held-out loss, in the metric where there is one."""
        drift = self._drift(weight)[:, None]
        return self.held_out.value(weight) + float((drift * self.held_out.weigh(drift)).sum()) / 2

    def relative_error(self, weight: Float[Tensor, "out in"]) -> float:
        """Return E|V x* - W x|^2 / E|W x|^2 without the metric; of centred outputs W x where the bias is fitted."""
        scale, drift = self.held_out.plain.signal, float(self._drift(weight).square().sum())
        return self.held_out.relative_error(weight) + (drift / scale if scale > 0 else 0.0)

    def _drift(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """Return the difference of the fitted bias from the best one for the held-out tokens."""
        if not self.fitted.fit_bias:
            return torch.zeros_like(self.fitted.weight[:, 0])
        return self.fitted.bias_change(weight) - self.held_out.bias_change(weight)


def refit(
    problem: Problem,
    solution: Solution,
    held_out: InputMoments,
    dampings: Sequence[float],
    solver: AnySolver | None = None,
    *,
    join: bool = True,
) -> Refitted:
    """Refit an answer on its support under each damping, and keep the one with the least loss on held-out tokens.

    The loss is that of the problem, with its output metric, and without a ridge; a damping is a share of the mean
    diagonal of the Gram matrix, as in a recipe. `solver` is the one that gave the answer: the refit is its last stage.
    With `join` the held-out tokens are then fitted too, under the chosen ridge. Costs a refit for each damping and one
    more. A lower bound of the answer is dropped. Raises InputError where the solver that the problem chooses ends
    without a refit.
    """
    loss, last = problem.loss, last_refit(choose(problem) if solver is None else solver)
    if last is None:
        raise InputError(
            f"refit.dampings needs a refit at the end, and a {problem.kind} problem is solved without one: "
            "name a solver that ends with restore or conjugate_gradients"
        )
    losses_of = HeldOut.of(loss, held_out)
    value = best_value = solution.value
    losses = list[float]()
    for damping in dampings:
        # A path: each answer is near the previous one. Only one damped Gram matrix is in memory at a time.
        value = answer(replace(problem, loss=loss.damped(damping)), last, value)
        losses.append(losses_of.value(value))
        if losses[-1] == min(losses) and losses.index(losses[-1]) == len(losses) - 1:
            best_value = value
    best = losses.index(min(losses))
    tokens = replace(loss, moments=loss.moments.merge(held_out)) if join else loss
    fitted = replace(problem, loss=tokens.damped(dampings[best]))
    refitted = solve(fitted, last, start=best_value)
    record = Record("before the refit", solution.steps, solution.seconds, fitted.objective(solution.value))
    return Refitted(
        fitted,
        replace(
            refitted,
            certificate=None,
            history=(*solution.history, record),
            # Notes of both without repetition.
            notes=tuple(dict.fromkeys((*solution.notes, *refitted.notes))),
        ),
        losses_of.relative_error(best_value),
    )
