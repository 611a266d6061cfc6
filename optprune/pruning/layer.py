"""One layer: its problem stated and solved, and the answer checked, written into the model and reported."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from optprune.errors import InputError, NumericalError, StrictError
from optprune.metric import OutputMetric
from optprune.models import BlockAllocation, Decoder, LinkedLayers, Target, reorderable
from optprune.models.surgery import write
from optprune.moments import InputMoments
from optprune.objectives import LayerContext, stated
from optprune.patterns import NM
from optprune.problems import GridLeastSquares, LayerLoss, Permutation, Problem, Rotation
from optprune.program import Method
from optprune.report import LayerReport
from optprune.solvers import Solution, Status, best_basis, best_permutation, solve
from optprune.solvers.ridge import HeldOut, refit
from optprune.system.wording import counted

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
"""a number in a note"""


@dataclass(frozen=True, eq=False)
class LayerTask:
    """A layer of a model to prune, with everything that decides its problem."""

    decoder: Decoder
    block: int
    target: Target
    wanted: BlockAllocation
    """the allocation of its block"""
    method: Method
    metrics: Mapping[str, OutputMetric]
    """the output metrics by the full name of the block's layers"""

    @property
    def name(self) -> str:
        """The layer's full name."""
        return self.decoder.name(self.block, self.target.path)

    @property
    def layer(self) -> nn.Linear:
        """The layer as it is now."""
        return self.decoder.layer(self.block, self.target.path)

    @property
    def units(self) -> LinkedLayers | None:
        """The links of its units with other layers, if units are pruned."""
        kind, path = self.target.kind, self.target.path
        return None if kind is None else kind.linked(self.decoder, self.block, path)

    @property
    def reordered(self) -> LinkedLayers | None:
        """The links of its inputs with the layers that make them, if the inputs of its weights may permute."""
        if not self.method.permuted or self.target.kind is not None:
            return None
        return reorderable(self.decoder, self.block, self.target.path, self.target.family.multiple)

    def context(self, moments: InputMoments) -> LayerContext:
        """Return the context of the objective, with the moments of the layer's inputs and on their device."""
        layer, method, units = self.layer, self.method, self.units
        metric = self.metrics.get(self.name)
        loss = self.target.loss(layer, moments, method.damping, fit_bias=method.fit_bias, metric=metric)
        sizes = layer.out_features, layer.in_features, self.wanted
        channels = None if units is None else units.channels.to(moments.mean.device)
        return LayerContext(
            self.name, self.block, loss, self.target.keep(*sizes), channels, self.target.pattern(*sizes)
        )


@dataclass(frozen=True, eq=False)
class SolvedLayer:
    """A layer's answer, before it is written into the model."""

    weight: Float[Tensor, "out in"]
    """the answer, in the layer's dtype"""
    bias: Float[Tensor, " out"] | None
    """the new bias; None if it is unchanged"""
    reads: Bool[Tensor, " _"]
    """the inputs that the answer may need, or the outputs where units are rows"""
    keep: int
    """number of units or weights that the budget leaves"""
    report: LayerReport
    basis: Rotation | Permutation | None = None
    """the rotation or permutation of the inputs that the answer is for, if it is not for the layer's own"""

    def to(self, device: torch.device) -> "SolvedLayer":
        """Return the answer on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        basis = None if self.basis is None else self.basis.to(device)
        weight, reads = self.weight.to(device), self.reads.to(device)
        return replace(self, weight=weight, bias=bias, reads=reads, basis=basis)


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """The report of a layer whose answer is written."""

    report: LayerReport
    zeros: int
    """number of its weights that are zero"""
    due: int
    """number of its weights that the budget makes zero at least, apart from rounding; none where units are removed"""
    most_zeros: int
    """number of its weights that may be zero: by the budget, before, or by a grid or a removal of units"""


def solve_layer(task: LayerTask, moments: InputMoments, held_out: InputMoments | None) -> SolvedLayer:
    """Return a layer's answer from the moments of its inputs and those on held-out tokens; the model is unchanged.

    The work and the answer are on the device of the moments. NumericalError where the answer is not finite or violates
    its pattern.
    """
    began, layer = time.perf_counter(), task.layer
    context, by_rows = task.context(moments), task.target.by_rows
    # Held-out inputs say nothing about a loss whose Gram matrix is that of outputs.
    answer, basis = _best_answer(task, context, None if by_rows else held_out)
    value = task.decoder.rounded(answer.solution.value).to(layer.weight.dtype)
    weight, bias = task.target.read(value, answer.problem.loss, layer)
    # Inputs with a nonzero weight stay whatever the problem says, because the outputs must not change here.
    reads = (value != 0).any(0)
    if task.target.kind is not None:
        reads = answer.problem.inputs(answer.solution.value) | reads
    bias = None if bias is None else task.decoder.rounded(bias)
    return SolvedLayer(weight, bias, reads, context.keep, _report(task, answer, value, began), basis)


def write_layer(task: LayerTask, solved: SolvedLayer) -> PrunedLayer:
    """Write a layer's answer into the model, and delete the units that it does not read from their block.

    StrictError where the recipe is strict and the report has a note.
    """
    layer, units, report = task.layer, task.units, solved.report
    before = int((layer.weight == 0).sum())
    write(layer, solved.weight, solved.bias)
    linked = units or task.reordered
    if linked is not None and solved.basis is not None:
        _apply_basis(task, linked, solved.basis)
    due, most = 0, None
    if units is None:
        # A custom pattern may round the count of every row.
        asked, rounding = solved.weight.numel() - solved.keep, layer.out_features // 2
        due = asked - rounding
        most = None if task.target.grid is not None else asked + rounding + before
    else:
        choice = units.channels.units_reading(solved.reads)
        _check_alike(task, int(choice.sum()))
        task.decoder.keep_units(task.block, units, choice)
        report = replace(report, kept=int(choice.sum()), units=choice.numel())
    if task.method.strict and report.notes:
        raise StrictError(f"{task.name}: {report.notes[0]} (strict mode makes this an error)")
    zeros = int((layer.weight == 0).sum())
    return PrunedLayer(report, zeros, due, zeros if most is None else most)


def _check_alike(task: LayerTask, kept: int) -> None:
    """Raise InputError where a custom objective makes the experts of a block differ in width."""
    kind, shape = task.target.kind, task.wanted.shape
    if kind is None or kept == kind.total(shape) or len(kind.layers(task.decoder, task.block)) == 1:
        return
    raise InputError(
        f"{task.name}: the objective keeps {counted(kept, 'unit')}, but every expert must keep {kind.total(shape)}: "
        "state problems that keep this number"
    )


def _apply_basis(task: LayerTask, units: LinkedLayers, basis: Rotation | Permutation) -> None:
    """Rotate or permute the rows of the layers that make a layer's inputs, slot by slot where units have slots."""
    rounded = task.decoder.rounded
    for path, rows in zip(units.producers, units.rows, strict=True):
        layer, own = task.decoder.layer(task.block, path), rows.reshape(-1)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.data[own] = rounded(basis.rows(parameter.detach()[own])).to(parameter.dtype)


@dataclass(frozen=True, eq=False)
class _Answer:
    """A layer's solution with its problem, which a refit replaces too."""

    problem: Problem
    solution: Solution
    held_out: InputMoments | None
    held_out_error: float | None
    """the layer's error on held-out tokens, if a refit measured it"""
    dead: int
    """number of the model's own inputs that were zero on every token (rotated ones are zero only up to rounding)"""

    def error_apart(self, written: Tensor) -> float | None:
        """Return E|V x* - W x|^2 / E|W x|^2 on the held-out tokens, if there are any."""
        if self.held_out is None or self.held_out_error is not None:
            return self.held_out_error
        return HeldOut.of(self.problem.loss, self.held_out).relative_error(written)


def _best_answer(
    task: LayerTask, context: LayerContext, held_out: InputMoments | None
) -> tuple[_Answer, Rotation | Permutation | None]:
    """Return the layer's solution and the basis of its inputs, which is rotated only if that loses less."""
    if task.reordered is not None and isinstance(context.pattern, NM):
        return _in_order(task, context, held_out, task.reordered, context.pattern)
    plain, kind, channels = _answer(task, context, held_out), task.target.kind, context.channels
    if kind is None or channels is None or not kind.rotated or not 0 < context.keep < channels.units:
        return plain, None
    loss = context.loss
    rotation = best_basis(loss, channels, context.keep // channels.slot_count)
    apart = None if held_out is None else rotation.moments(held_out)
    rotated = _answer(task, replace(context, loss=rotation.loss(loss)), apart)
    # Both are compared by the stated loss, because a refit may have chosen another ridge.
    if loss.value(rotation.back(rotated.solution.value)) < loss.value(plain.solution.value):
        return replace(rotated, dead=plain.dead), rotation
    return plain, None


def stated_problem(task: LayerTask, moments: InputMoments) -> Problem:
    """Return the problem of a layer from the moments of its inputs, as `solve_layer` gives it to the solver."""
    context = task.context(moments)
    if task.reordered is not None and isinstance(context.pattern, NM):
        order = best_permutation(context.loss, task.reordered.channels.to(context.loss.weight.device), context.pattern)
        context = replace(context, loss=order.loss(context.loss))
    return stated(task.method.objective, context)


def _in_order(
    task: LayerTask, context: LayerContext, held_out: InputMoments | None, units: LinkedLayers, pattern: NM
) -> tuple[_Answer, Permutation]:
    """Return the layer's solution with its inputs in the best order for the pattern, and that order."""
    loss = context.loss
    order = best_permutation(loss, units.channels.to(loss.weight.device), pattern)
    apart = None if held_out is None else order.moments(held_out)
    return _answer(task, replace(context, loss=order.loss(loss)), apart), order


def _answer(task: LayerTask, context: LayerContext, held_out: InputMoments | None) -> _Answer:
    method = task.method
    if task.target.grid is not None and context.keep == context.loss.weight.numel():
        return _on_grid(task, context.loss, context.loss.weight, held_out)
    problem = stated(method.objective, context)
    solution = solve(problem, method.solver)
    _check(solution, task.name)
    if task.target.grid is not None:
        return _on_grid(task, problem.loss, solution.value, held_out)
    if held_out is None or not method.dampings:
        return _Answer(problem, solution, held_out, None, _dead(problem))
    join = not method.moves_weights_later
    refitted = refit(problem, solution, held_out, method.dampings, method.solver, join=join)
    _check(refitted.solution, task.name)
    return _Answer(refitted.problem, refitted.solution, held_out, refitted.held_out_error, _dead(refitted.problem))


def _on_grid(task: LayerTask, loss: LayerLoss, weight: Tensor, held_out: InputMoments | None) -> _Answer:
    """Return the layer's solution on its grid, with the zeros of a weight, in the metric if the solver takes it."""
    grid, solver = task.target.grid, task.method.grid_solver
    assert grid is not None and solver is not None
    kept = weight != 0
    problem = GridLeastSquares(loss, grid, None if bool(kept.all()) else kept)
    if solver.refusal(problem) is not None:
        problem = replace(problem, loss=loss.plain)
    solution = solve(problem, solver, start=weight)
    _check(solution, task.name)
    return _Answer(problem, solution, held_out, None, _dead(problem))


def _dead(problem: Problem) -> int:
    return int(problem.loss.moments.dead.sum())


def _check(solution: Solution, name: str) -> None:
    """Raise NumericalError unless an answer is finite and keeps the pattern."""
    if solution.status is Status.NONFINITE or not bool(torch.isfinite(solution.value).all()):
        raise NumericalError(f"{name}: {Status.NONFINITE.value}")
    if solution.violation > 0:
        raise NumericalError(f"{name}: the solver's answer violates the pattern by {solution.violation:g}")


def _report(task: LayerTask, answer: _Answer, value: Tensor, began: float) -> LayerReport:
    """Return the report of a layer; `value` is the weight to write and `began` a perf_counter.

    If units are removed, `write_layer` corrects the number kept.
    """
    problem, solution, solver = answer.problem, answer.solution, task.method.solver
    loss = problem.loss
    written = value.to(loss.weight)
    error = loss.weighed_error(written) if task.target.by_rows else loss.relative_error(written)
    dead = 0 if task.target.by_rows else answer.dead
    return LayerReport(
        name=task.name,
        kind=problem.kind,
        solver=solver.label if solver else "chosen by the problem",
        relative_error=error,
        held_out_error=answer.error_apart(written),
        status=solution.status.name.lower(),
        objective=solution.objective,
        lower_bound=None if solution.certificate is None else solution.certificate.lower_bound,
        gap=solution.gap,
        damping=float(loss.damping.mean()),
        tokens=loss.moments.tokens,
        seconds=time.perf_counter() - began,
        kept=int((value != 0).sum()),
        units=value.numel(),
        dead_inputs=dead,
        notes=_notes(solution) if task.target.by_rows else _notes(solution) + _notes_on_inputs(loss, dead),
        stages=tuple(asdict(record) for record in solution.history),
    )


def _notes(solution: Solution) -> tuple[str, ...]:
    """Return the notes on an answer."""
    return (*solution.notes, *((solution.status.value,) if solution.status is not Status.CONVERGED else ()))


def _notes_on_inputs(loss: LayerLoss, dead: int) -> tuple[str, ...]:
    """Return warnings about a layer's calibration inputs: inputs that are always zero, too few tokens or directions."""
    notes, moments = list[str](), loss.moments
    if dead:
        notes.append(f"{counted(dead, 'input was', 'inputs were')} zero on every calibration token")
    if moments.tokens < moments.width:
        notes.append(f"fewer calibration tokens ({moments.tokens}) than inputs ({moments.width})")
    else:
        directions, inputs = moments.directions()
        # Of real text a few inputs may depend on others; half of them do not.
        if 2 * directions < inputs:
            notes.append(f"the calibration tokens vary in fewer directions ({directions}) than half of {inputs} inputs")
    return tuple(notes)


def summary(layers: Sequence[LayerReport]) -> tuple[str, ...]:
    """Return one sentence for each kind of note: how many layers have it, and the range of each number."""
    alike: dict[str, list[str]] = {}
    for layer in layers:
        for note in layer.notes:
            alike.setdefault(NUMBER.sub("N", note), []).append(note)
    return tuple(f"{counted(len(notes), 'layer')}: {_with_ranges(notes)}" for notes in alike.values())


def _with_ranges(notes: Sequence[str]) -> str:
    """Return notes that differ in their numbers only as one, with the least and the largest where a number differs."""
    columns = zip(*map(NUMBER.findall, notes), strict=True)
    ranges = iter([(min(column, key=float), max(column, key=float)) for column in columns])

    def written(_: re.Match[str]) -> str:
        least, most = next(ranges)
        return least if least == most else f"{least} to {most}"

    return NUMBER.sub(written, notes[0])
