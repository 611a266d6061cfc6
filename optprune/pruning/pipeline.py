"""The pipeline: block by block, collect moments, state each layer's problem, solve it, write the answer back."""

import math
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.allocation import Allocation
from optprune.calibration import DenseStatistics, Stream, calibrating, first_inputs, first_tokens, hold_out
from optprune.calibration.calls import Calls
from optprune.calibration.moments_pass import Collected
from optprune.errors import StrictError
from optprune.measure.memory import release
from optprune.metric import Metrics
from optprune.models import Decoder, Target
from optprune.models.decoder import write
from optprune.numerics.precision import full_precision
from optprune.objectives import LayerContext
from optprune.problems import LayerLoss
from optprune.pruning.layer_report import check, layer_report, summary
from optprune.pruning.preflight import check_batches, check_run
from optprune.pruning.recovery import recover
from optprune.pruning.targets import by_stage, parts_removed, targets_of
from optprune.recipe import Recipe
from optprune.recipe.allocator import allocator_of
from optprune.refit import HeldOut, refit
from optprune.report import (
    BlockChange,
    BlockFinished,
    BlockStarted,
    Event,
    LayerReport,
    LayerSolved,
    PhaseAdvanced,
    RecoveredPart,
    Report,
)
from optprune.solvers import solve

MISSED = (
    "the budget is not met: {:.2%} of the decoder's linear weights are gone, not {:.2%}, since answers keep more than "
    "they may: an objective of your own finds the number in context.keep"
)
"""the note of a run whose problems do not hold the budget"""


@full_precision()
def prune(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: Recipe,
    *,
    allocation: Allocation | None = None,
    statistics: DenseStatistics | None = None,
    on_event: Callable[[Event], None] | None = None,
    source: str = "",
    calibration: str = "",
) -> Report:
    """Prune a transformers model in place, by a recipe, on batches of token ids [batch, length].

    All tokens count, so batches must hold no padding; one tensor [batch, length] is one batch. Raises an OptpruneError
    that says why when the model, the recipe or the batches do not fit; the model in memory may then be half pruned. An
    `allocation` says what every block keeps, in place of the recipe's sparsity. `statistics` are those of the dense
    model, where runs share them; without, this run measures its own. `source` and `calibration` name the model and
    the text in the report.
    """
    began = time.perf_counter()
    decoder, recipe, on_event = Decoder(model), recipe.settled(), on_event or (lambda event: None)
    batches = check_batches(model.config, batches)
    idle = check_run(decoder, recipe, allocation, model.dtype)
    weights_before, shapes = decoder.linear_weights(), decoder.shapes()
    allocator, statistics, every = allocator_of(recipe, allocation), statistics or DenseStatistics(), batches
    batches, held_out = hold_out(every, 0.0 if recipe.refit is None else recipe.refit.held_out)
    metrics, notes = _metrics(decoder, every, recipe, statistics, on_event)
    notes += idle + _heeded(recipe, allocator.warnings)
    with calibrating(decoder):
        division = allocator.divide(decoder, batches, metrics, statistics, on_event)
        divided, notes = division.allocation, notes + _heeded(recipe, division.warnings) + division.notes
        run = _Run(decoder, recipe, divided, on_event)
        run.metrics, run.held_out = metrics, held_out
        run.start(first_inputs(decoder, batches))
        for block in range(len(decoder.blocks)):
            run.prune_block(block)
    blocks = tuple(map(BlockChange, shapes, decoder.shapes()))
    reached = 1 - (decoder.linear_weights() - run.zeros) / weights_before
    most = sum(decoder.weights_of(block.shape) for block in divided.blocks) - run.due
    if decoder.linear_weights() - run.zeros > most:
        notes += _heeded(recipe, (MISSED.format(reached, divided.sparsity),))
    left = divided.with_shapes(decoder, weights_before)
    decoder.record_shapes()
    return Report(
        model=source or model.config.name_or_path or model.config.model_type,
        recipe=recipe.to_dict(),
        sparsity_requested=recipe.sparsity if allocation is None else divided.sparsity,
        sparsity_reached=reached,
        seconds=time.perf_counter() - began,
        floor_seconds=run.floor_seconds,
        tokens=sum(hidden.shape[:-1].numel() for hidden in run.path.actual.hidden),
        seed=recipe.seed,
        versions={
            "optprune": version("optprune"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        layers=tuple(run.layers),
        notes=summary(run.layers) + notes,
        calibration=calibration,
        allocation=left.to_dict(),
        removed=division.removed,
        recovered=tuple(run.recovered),
        blocks=blocks,
    )


class _Run:
    """The state of a run between two blocks: the streams that enter the next block, and what was done so far."""

    def __init__(
        self, decoder: Decoder, recipe: Recipe, allocation: Allocation, on_event: Callable[[Event], None]
    ) -> None:
        self.decoder, self.recipe, self.allocation, self.on_event = decoder, recipe, allocation, on_event
        self.layers: list[LayerReport] = []
        self.recovered: list[RecoveredPart] = []
        self.floor_seconds = 0.0
        self.zeros = 0
        """weights of the solved layers that are zero"""
        self.due = 0
        """weights of the solved layers that the budget makes zero, but for rounding"""
        self.metrics = Metrics({})
        """of the dense model, by the layer's full name, for the blocks to come; empty where outputs count alike"""
        self.held_out = 0
        """how many batches, the last ones, are kept apart"""
        blocks = range(len(decoder.blocks))
        self.last = max((index for index in blocks if self._targets(index)), default=-1)
        """the last block with something to solve: nothing travels past it"""

    def start(self, stream: Stream) -> None:
        """Begin with the inputs of the first block."""
        self.path = self.recipe.policy.start(stream)

    def prune_block(self, index: int) -> None:
        """Calibrate, solve and write one block, then move the path past it."""
        began, blocks = time.perf_counter(), len(self.decoder.blocks)
        self.on_event(BlockStarted(index, blocks))
        removed = parts_removed(self.decoder.shape(index), self.allocation.blocks[index].shape)
        if index > self.last:
            self._remove(index, removed)
        else:
            block = self.decoder.blocks[index]
            with self.path.visit(block, held_out=self.held_out, cut=bool(removed)) as visit:
                self._remove(index, removed)
                stages = visit.stages(by_stage(self.decoder, self._targets(index)))
                for position, stage in enumerate(stages):
                    places = self._recovered_by(stage)
                    collected = visit.collect(self._taps(stage), places)
                    for target in stage:
                        self._prune_layer(index, target, collected)
                    later = {place for following in stages[position + 1 :] for place in self._recovered_by(following)}
                    for place in places:
                        if place not in later:
                            self._recover(index, place, visit.calls(place))
            self.floor_seconds += visit.floor_seconds
        for path in self.decoder.architecture.layers:
            self.metrics.forget(self.decoder.name(index, path))
        release()
        self.on_event(BlockFinished(index, blocks, time.perf_counter() - began))

    def _remove(self, index: int, parts: Iterable[str]) -> None:
        for part in parts:
            self.decoder.remove(index, part)

    def _taps(self, targets: Iterable[Target]) -> list[str]:
        """Where the inputs of layers are seen, in the order of the forward pass."""
        return sorted({target.tap for target in targets}, key=self.decoder.architecture.layers.index)

    def _prune_layer(self, index: int, target: Target, collected: Collected) -> None:
        began = time.perf_counter()
        recipe, layer = self.recipe, self.decoder.layer(index, target.path)
        units = None if target.kind is None else target.kind.layers(self.decoder, index)
        moments = collected.moments[target.tap]
        name = self.decoder.name(index, target.path)
        metric = self.metrics.get(name)
        fit_bias = recipe.fit_bias and layer.bias is not None
        loss = LayerLoss.of(layer.weight, moments, recipe.damping, fit_bias=fit_bias, metric=metric)
        asked = layer.out_features, layer.in_features, self.allocation.blocks[index]
        link = None if units is None else units.link
        context = LayerContext(name, index, loss, target.keep(*asked), link, target.pattern(*asked))
        problem = recipe.state(context)
        solution = solve(problem, recipe.solver)
        check(solution, name)
        held_out, held_out_error = collected.held_out.get(target.tap), None
        if held_out is not None and recipe.refit is not None and recipe.refit.dampings:
            dampings, join = recipe.refit.dampings, recipe.recovery is None
            refitted = refit(problem, solution, held_out, dampings, recipe.solver, join=join)
            problem, solution, held_out_error = refitted.problem, refitted.solution, refitted.held_out_error
            check(solution, name)
        value = solution.value.to(layer.weight.dtype)
        bias = None
        if layer.bias is not None and problem.loss.fit_bias:
            bias = layer.bias + problem.loss.bias_change(value.to(loss.weight))
        write(layer, value, bias)
        if units is not None:
            # What an input with a weight makes stays whatever the problem says of it: the outputs do not change here.
            choice = units.link.reading(problem.inputs(solution.value) | (value != 0).any(0))
            self.decoder.keep_units(index, units, choice)
            kept, total = int(choice.sum()), choice.numel()
        else:
            kept, total = int((value != 0).sum()), value.numel()
            # A pattern that is not the recipe's may round the count of every row.
            self.due += total - context.keep - layer.out_features // 2
        self.zeros += int((layer.weight == 0).sum())
        if held_out is not None and held_out_error is None:
            held_out_error = HeldOut.of(problem.loss, held_out).relative_error(value.to(loss.weight))
        report = layer_report(name, problem, solution, value, held_out_error, recipe, kept, total, began)
        if recipe.strict and report.notes:
            raise StrictError(f"{name}: {report.notes[0]} (strict mode makes this an error)")
        self.layers.append(report)
        self.on_event(LayerSolved(report))

    def _recovered_by(self, targets: list[Target]) -> list[str]:
        """The paths of the sub-modules that are refitted after these layers, if no stage of theirs follows."""
        places = [path for path, _ in self.decoder.architecture.recoverable if self.recipe.recovery is not None]
        return [path for path in places if any(target.path.startswith(f"{path}.") for target in targets)]

    def _recover(self, index: int, path: str, calls: Calls) -> None:
        """Refit a sub-module of a block whose layers are pruned."""
        recovery, layers = self.recipe.recovery, dict(self.decoder.architecture.recoverable)[path]
        assert recovery is not None
        fit, apart = calls.split(self.held_out)
        part = recover(
            self.decoder.blocks[index].get_submodule(path),
            [name.removeprefix(f"{path}.") for name in layers],
            fit if recovery.tokens is None else fit.first(recovery.tokens),
            apart,
            rounds=recovery.rounds,
            steps=recovery.steps,
            damping=recovery.damping,
            metric=self.metrics.get(self.decoder.name(index, layers[-1])),
            name=self.decoder.name(index, path),
        )
        self.recovered.append(part)

    def _targets(self, index: int) -> list[Target]:
        return targets_of(self.decoder, self.recipe, self.allocation.blocks[index], index)


def _metrics(
    decoder: Decoder,
    batches: list[Tensor],
    recipe: Recipe,
    statistics: DenseStatistics,
    on_event: Callable[[Event], None],
) -> tuple[Metrics, tuple[str, ...]]:
    """The output metrics that a recipe asks for, damped, and a note where they are less than it asks for."""
    asked = recipe.metric
    if asked is None:
        return Metrics({}), ()
    full = recipe.units.whole_metric(decoder.architecture) if asked.kind == "full" else ()
    widest = asked.width or math.inf
    used = first_tokens(batches, asked.tokens)

    def on_group(done: int, total: int) -> None:
        on_event(PhaseAdvanced("measuring the output metric", "group", done, total))

    metrics = statistics.metrics(decoder, used, recipe.seed, full, widest, on_group)
    cut = [path for path in full if any(name.endswith(f".{path}") for name in metrics.diagonal_only())]
    note = f"of {', '.join(cut)} with over {widest} outputs (metric_width) only the diagonal of the metric is used"
    return metrics.damped(asked.damping), (note,) if cut else ()


def _heeded(recipe: Recipe, warnings: tuple[str, ...]) -> tuple[str, ...]:
    """The same warnings, as notes; StrictError where a strict recipe has one."""
    if warnings and recipe.strict:
        raise StrictError(f"{warnings[0]} (strict mode makes this an error)")
    return warnings
