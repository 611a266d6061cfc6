"""One layer: its problem stated, solved, the answer checked, written into the model, and put into words."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from optprune.calibration.moments_pass import Collected
from optprune.errors import NumericalError, StrictError
from optprune.metric import OutputMetric
from optprune.models import BlockAllocation, Decoder, LinkedLayers, Target
from optprune.models.surgery import write
from optprune.moments import InputMoments
from optprune.objectives import LayerContext
from optprune.problems import LayerLoss, Problem
from optprune.recipe import Recipe
from optprune.report import LayerReport
from optprune.solvers import Solution, Status, solve
from optprune.solvers.ridge import HeldOut, refit


@dataclass(frozen=True, eq=False)
class LayerTask:
    """A layer of a model, and what is to become of it."""

    decoder: Decoder
    block: int
    target: Target
    wanted: BlockAllocation
    """what its block is to keep"""
    recipe: Recipe
    metric: OutputMetric | None

    @property
    def name(self) -> str:
        """The layer's full name."""
        return self.decoder.name(self.block, self.target.path)

    @property
    def units(self) -> LinkedLayers | None:
        """How its units link it with other layers, where units are pruned."""
        return None if self.target.kind is None else self.target.kind.layers(self.decoder, self.block)

    def context(self, moments: InputMoments) -> LayerContext:
        """What an objective is given, with the moments of the layer's inputs."""
        layer, recipe, units = self.decoder.layer(self.block, self.target.path), self.recipe, self.units
        fit_bias = recipe.fit_bias and layer.bias is not None
        loss = LayerLoss.of(layer.weight, moments, recipe.damping, fit_bias=fit_bias, metric=self.metric)
        asked = layer.out_features, layer.in_features, self.wanted
        link = None if units is None else units.link
        return LayerContext(self.name, self.block, loss, self.target.keep(*asked), link, self.target.pattern(*asked))


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """What became of a layer."""

    report: LayerReport
    zeros: int
    """how many of its weights are zero"""
    due: int
    """how many the budget makes zero, but for rounding, where single weights go"""


def prune_layer(task: LayerTask, collected: Collected) -> PrunedLayer:
    """Solve a layer from what was collected of its inputs, and write the answer into the model.

    NumericalError where the answer is not finite or breaks its pattern, StrictError where a strict recipe has a note.
    """
    began, layer = time.perf_counter(), task.decoder.layer(task.block, task.target.path)
    context = task.context(collected.moments[task.target.tap])
    answer = _answer(task, context, collected.held_out.get(task.target.tap))
    value = task.decoder.rounded(answer.solution.value).to(layer.weight.dtype)
    bias = None
    if layer.bias is not None and answer.problem.loss.fit_bias:
        bias = task.decoder.rounded(layer.bias + answer.problem.loss.bias_change(value.to(context.loss.weight)))
    write(layer, value, bias)
    kept, total = _narrow(task, answer, value)
    # A pattern that is not the recipe's may round the count of every row.
    due = total - context.keep - layer.out_features // 2 if task.target.kind is None else 0
    report = _report(task, answer, value, kept, total, began)
    if task.recipe.strict and report.notes:
        raise StrictError(f"{task.name}: {report.notes[0]} (strict mode makes this an error)")
    return PrunedLayer(report, int((layer.weight == 0).sum()), due)


@dataclass(frozen=True, eq=False)
class _Answer:
    """A layer's solution, of the problem that it is of after a refit."""

    problem: Problem
    solution: Solution
    held_out: InputMoments | None
    held_out_error: float | None
    """the layer's error on held-out tokens, where a refit measured it"""

    def error_apart(self, written: Tensor) -> float | None:
        """E|V x* - W x|^2 / E|W x|^2 on the tokens kept apart, where there are any."""
        if self.held_out is None or self.held_out_error is not None:
            return self.held_out_error
        return HeldOut.of(self.problem.loss, self.held_out).relative_error(written)


def _answer(task: LayerTask, context: LayerContext, held_out: InputMoments | None) -> _Answer:
    recipe, problem = task.recipe, task.recipe.state(context)
    solution = solve(problem, recipe.solver)
    _check(solution, task.name)
    if held_out is None or recipe.refit is None or not recipe.refit.dampings:
        return _Answer(problem, solution, held_out, None)
    dampings, join = recipe.refit.dampings, recipe.recovery is None
    refitted = refit(problem, solution, held_out, dampings, recipe.solver, join=join)
    _check(refitted.solution, task.name)
    return _Answer(refitted.problem, refitted.solution, held_out, refitted.held_out_error)


def _check(solution: Solution, name: str) -> None:
    """Raise NumericalError where an answer is not finite or breaks the pattern."""
    if solution.status is Status.NONFINITE or not bool(torch.isfinite(solution.value).all()):
        raise NumericalError(f"{name}: {Status.NONFINITE.value}")
    if solution.violation > 0:
        raise NumericalError(f"{name}: the solver's answer breaks the pattern by {solution.violation:g}")


def _narrow(task: LayerTask, answer: _Answer, written: Tensor) -> tuple[int, int]:
    """How many units or weights are kept, and of how many; units that are not kept are deleted from the block."""
    units = task.units
    if units is None:
        return int((written != 0).sum()), written.numel()
    # What an input with a weight makes stays whatever the problem says of it: the outputs do not change here.
    choice = units.link.reading(answer.problem.inputs(answer.solution.value) | (written != 0).any(0))
    task.decoder.keep_units(task.block, units, choice)
    return int(choice.sum()), choice.numel()


def _report(task: LayerTask, answer: _Answer, value: Tensor, kept: int, total: int, began: float) -> LayerReport:
    """What there is to say of a layer: `value` is the weight as it was written, `began` a perf_counter."""
    problem, solution, solver = answer.problem, answer.solution, task.recipe.solver
    loss = problem.loss
    written = value.to(loss.weight)
    return LayerReport(
        name=task.name,
        kind=problem.kind,
        solver=solver.label if solver else "chosen by the problem",
        relative_error=loss.relative_error(written),
        held_out_error=answer.error_apart(written),
        status=solution.status.name.lower(),
        objective=solution.objective,
        lower_bound=None if solution.certificate is None else solution.certificate.lower_bound,
        gap=solution.gap,
        damping=float(loss.damping.mean()),
        tokens=loss.moments.tokens,
        seconds=time.perf_counter() - began,
        kept=kept,
        units=total,
        dead_inputs=int(loss.moments.dead.sum()),
        notes=_notes(loss, solution),
        stages=tuple(asdict(record) for record in solution.history),
    )


def _notes(loss: LayerLoss, solution: Solution) -> tuple[str, ...]:
    dead, notes = int(loss.moments.dead.sum()), list(solution.notes)
    if solution.status is not Status.CONVERGED:
        notes.append(solution.status.value)
    if dead:
        notes.append(f"{dead} inputs were zero on every calibration token")
    if loss.moments.tokens < loss.moments.width:
        notes.append(f"fewer calibration tokens ({loss.moments.tokens}) than inputs ({loss.moments.width})")
    return tuple(notes)


def summary(layers: Sequence[LayerReport]) -> tuple[str, ...]:
    """One sentence for each kind of note, with the number of layers it concerns."""
    alike: dict[str, list[str]] = {}
    for layer in layers:
        for note in layer.notes:
            alike.setdefault("".join("N" if character.isdigit() else character for character in note), []).append(note)
    return tuple(f"{len(notes)} layers: {notes[0]}" for notes in alike.values())
