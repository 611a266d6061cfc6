"""The pipeline: block by block, collect moments, state each layer's problem, solve it, write the answer back."""

import copy
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optprune.allocation import NARROWED, Allocation, BlockAllocation, uniform
from optprune.by_cost import by_cost
from optprune.depth import shallower
from optprune.errors import InputError, NumericalError, StrictError
from optprune.metric import OutputMetric
from optprune.models import PARTS, BlockShape, Decoder, LinkedLayers
from optprune.models.calibrate import Collected, Stream, advance, calibrating, collect, first_inputs
from optprune.models.decoder import write
from optprune.models.fisher import collect_metrics, sampled
from optprune.moments import InputMoments
from optprune.objectives import LayerContext
from optprune.patterns import NM, Pattern, RowWise, Unstructured
from optprune.problems import LayerLoss, LinkedLeastSquares, Problem
from optprune.recipe import Recipe, n_of_m
from optprune.recovery import Calls, calls_of, recover
from optprune.report import (
    BlockFinished,
    BlockStarted,
    Event,
    LayerReport,
    LayerSolved,
    RecoveredPart,
    RemovedPart,
    Report,
)
from optprune.solvers import Solution, Status, solve

UNLIKE_UNITS = (
    "the budget was divided by squared errors without an output metric, which are not in one unit from layer to layer: "
    "set output_metric to diagonal"
)
"""the note of a run with allocation global and output_metric none"""


@dataclass(frozen=True)
class Target:
    """A layer to prune in every block, and the place in the forward pass where its input is seen."""

    path: str
    tap: str
    """the first layer that reads the same input: layers of one stage share one set of moments"""
    units: Callable[[int], LinkedLayers] | None = None
    """the linked layers of a block, where units are pruned"""
    kept: Callable[[BlockShape], int] | None = None
    """how many units a shape has"""


def prune(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: Recipe,
    *,
    allocation: Allocation | None = None,
    on_event: Callable[[Event], None] | None = None,
    source: str = "",
    calibration: str = "",
) -> Report:
    """Prune a transformers model in place, by a recipe, on batches of token ids [batch, length].

    All tokens count, so batches must hold no padding. Raises an OptpruneError that says why when the model, the
    recipe or the batches do not fit; the model in memory may then be half pruned. An `allocation` says what every
    block keeps, in place of the recipe's sparsity. `source` and `calibration` name the model and the text in the
    report.
    """
    began = time.perf_counter()
    decoder, batches, on_event = Decoder(model), list(batches), on_event or (lambda event: None)
    weights_before = decoder.linear_weights()
    requested = recipe.sparsity if allocation is None else allocation.sparsity
    removed: tuple[RemovedPart, ...] = ()
    notes: tuple[str, ...] = ()
    metrics = _metrics(decoder, batches, recipe)
    with calibrating(decoder):
        stream = first_inputs(decoder, batches)
        if allocation is not None:
            _check_allocation(decoder, recipe, allocation)
        elif recipe.units == "blocks":
            allocation, removed = shallower(decoder, batches, recipe, on_event)
        elif recipe.allocation == "global":
            if not metrics:
                notes = (UNLIKE_UNITS,)
                if recipe.strict:
                    raise StrictError(f"{UNLIKE_UNITS} (strict mode makes this an error)")
            allocation = by_cost(decoder, stream, recipe, metrics, on_event)
        else:
            allocation = uniform(decoder, recipe.sparsity, recipe.units, recipe.width_multiple)
        run = _Run(decoder, recipe, allocation, on_event)
        run.metrics = metrics
        run.start(stream)
        for block in range(len(decoder.blocks)):
            run.prune_block(block)
    decoder.record_shapes()
    return Report(
        model=source or model.config.name_or_path or model.config.model_type,
        recipe=recipe.to_dict(),
        sparsity_requested=requested,
        sparsity_reached=1 - (decoder.linear_weights() - run.zeros) / weights_before,
        seconds=time.perf_counter() - began,
        floor_seconds=run.floor_seconds,
        tokens=sum(hidden.shape[:-1].numel() for hidden in run.actual.hidden),
        seed=recipe.seed,
        versions={
            "optprune": version("optprune"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        layers=tuple(run.layers),
        notes=_summary(run.layers) + notes,
        calibration=calibration,
        allocation=allocation.to_dict(),
        removed=removed,
        recovered=tuple(run.recovered),
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
        """weights set to zero in layers that kept their shape"""
        self.metrics: dict[str, OutputMetric] = {}
        """of the dense model, by the layer's full name; empty where outputs count alike"""
        blocks = range(len(decoder.blocks))
        self.last = max((index for index in blocks if self._targets(index)), default=-1)
        """the last block with something to solve: nothing travels past it"""

    def start(self, stream: Stream) -> None:
        """Begin with the inputs of the first block."""
        self.actual = stream
        """what the current block will really get"""
        self.dense = stream.copy() if self.recipe.propagation.two_paths else stream
        """what the current block gets in the dense model; the same stream where the policy follows only one path"""
        count = len(stream.hidden)
        self.held_out = max(1, round(self.recipe.held_out * count)) if self.recipe.held_out else 0
        if self.held_out == count:
            raise InputError(
                f"held_out {self.recipe.held_out:g} of {count} calibration batches leaves none to calibrate on: "
                "give more samples"
            )
        if self.recipe.recovery:
            self._check_recovery()

    def prune_block(self, index: int) -> None:
        """Calibrate, solve and write one block, then move the streams past it."""
        began = time.perf_counter()
        policy, blocks = self.recipe.propagation, len(self.decoder.blocks)
        block = self.decoder.blocks[index]
        self.on_event(BlockStarted(index, blocks))
        removed = _removed(self.decoder.shape(index), self.allocation.blocks[index].shape)
        if index > self.last:
            for part in removed:
                self.decoder.remove(index, part)
            self.on_event(BlockFinished(index, blocks, time.perf_counter() - began))
            return
        original = copy.deepcopy(block) if policy.dense_target or self.recipe.recovery else block
        upcoming: Stream | None = None
        if removed and not policy.pruned_prefix:
            # The next block's inputs are those of the dense model; this block's statistics know what is gone.
            upcoming = self.actual.copy()
            before = time.perf_counter()
            advance(block, upcoming)
            self.floor_seconds += 2 * (time.perf_counter() - before)
        for part in removed:
            self.decoder.remove(index, part)
        targets = self._targets(index)
        groups = _by_stage(self.decoder, targets) if policy.sequential else [targets] if targets else []
        for position, group in enumerate(groups):
            first = position == 0
            differ = policy.two_paths or not first or bool(removed)
            reference = (original, self.dense) if policy.dense_target and differ else None
            whole = first and not policy.pruned_prefix and not removed
            if whole:
                # The block is still dense, so this pass also gives the next block's inputs.
                upcoming = self.actual.copy()
            collected = collect(
                block,
                self.actual,
                sorted({target.tap for target in group}, key=self.decoder.architecture.layers.index),
                reference=reference,
                held_out=self.held_out,
                output=upcoming if whole else None,
            )
            self.floor_seconds += collected.gram_seconds
            if whole:
                self.floor_seconds += 2 * collected.forward_seconds
            elif first and not policy.sequential:
                self.floor_seconds += collected.forward_seconds
            for target in group:
                self._prune_layer(index, target, collected)
            if self.recipe.recovery:
                later = [target.path for following in groups[position + 1 :] for target in following]
                self._recover(index, [target.path for target in group], later, original)
        if upcoming is not None:
            self.actual.hidden = upcoming.hidden
        else:
            before = time.perf_counter()
            advance(block, self.actual)
            # A stage at a time, no pass of the block was whole: this one stands for two.
            self.floor_seconds += (2 if policy.sequential else 1) * (time.perf_counter() - before)
            if self.dense is not self.actual:
                advance(original, self.dense)
        self.on_event(BlockFinished(index, blocks, time.perf_counter() - began))

    def _prune_layer(self, index: int, target: Target, collected: Collected) -> None:
        began = time.perf_counter()
        recipe, layer = self.recipe, self.decoder.layer(index, target.path)
        units = None if target.units is None else target.units(index)
        moments = collected.moments[target.tap]
        name = self.decoder.name(index, target.path)
        metric = self.metrics.get(name)
        loss = LayerLoss.of(layer.weight, moments, recipe.damping, fit_bias=layer.bias is not None, metric=metric)
        context = LayerContext(
            name,
            index,
            loss,
            self._keep(index, target),
            None if units is None else units.link,
            _pattern(layer, recipe, self._share(index, target)) if units is None else None,
        )
        problem = recipe.state(context)
        solution = solve(problem, recipe.solver)
        _check(solution, name)
        value = solution.value.to(layer.weight.dtype)
        bias = None if layer.bias is None else layer.bias + problem.loss.bias_change(value.to(loss.weight))
        write(layer, value, bias)
        if isinstance(problem, LinkedLeastSquares) and units is not None:
            choice = problem.support(solution.value)
            self.decoder.keep_units(index, units, choice)
            kept, total = int(choice.sum()), choice.numel()
        else:
            kept, total = int((value != 0).sum()), value.numel()
            self.zeros += total - kept
        held_out = collected.held_out.get(target.tap)
        report = _layer_report(name, problem, solution, value, held_out, recipe, kept, total, began)
        if recipe.strict and report.notes:
            raise StrictError(f"{name}: {report.notes[0]} (strict mode makes this an error)")
        self.layers.append(report)
        self.on_event(LayerSolved(report))

    def _check_recovery(self) -> None:
        """Raise InputError where recovery has nothing to refit, or loses its digits."""
        architecture, dtype = self.decoder.architecture, self.decoder.model.dtype
        paths = [path for path, _ in architecture.recoverable]
        within = tuple(f"{path}." for path in paths)
        blocks = range(len(self.decoder.blocks))
        if not any(target.path.startswith(within) for index in blocks for target in self._targets(index)):
            raise InputError(
                f"recovery has nothing to refit: of {architecture.model_type} it knows {', '.join(paths)} where a "
                f"layer is pruned, and units {self.recipe.units} prune none there"
            )
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"recovery in {dtype} loses too many digits: load the model with --dtype float32")

    def _recover(self, index: int, pruned: list[str], later: list[str], original: nn.Module) -> None:
        """Refit the sub-modules of a block in which layers were just pruned and none follow."""
        recipe, block, policy = self.recipe, self.decoder.blocks[index], self.recipe.propagation
        for path, layers in self.decoder.architecture.recoverable:
            within = f"{path}."
            if not any(name.startswith(within) for name in pruned) or any(name.startswith(within) for name in later):
                continue
            # The same inputs and targets as the layers' own statistics.
            calls = calls_of(original, path, self.dense if policy.dense_target else self.actual)
            if policy.sequential:
                calls = Calls(calls_of(block, path, self.actual).arguments, calls.targets)
            fit, apart = calls.split(self.held_out)
            part = recover(
                block.get_submodule(path),
                [name.removeprefix(within) for name in layers],
                fit,
                apart,
                rounds=recipe.recovery,
                steps=recipe.recovery_steps,
                damping=recipe.recovery_damping,
                metric=self.metrics.get(self.decoder.name(index, layers[-1])),
                name=self.decoder.name(index, path),
            )
            self.recovered.append(part)

    def _targets(self, index: int) -> list[Target]:
        return _targets(self.decoder, self.recipe, self.allocation.blocks[index], index)

    def _keep(self, index: int, target: Target) -> int:
        if target.kept is None:
            return round(self._share(index, target) * self.decoder.layer(index, target.path).weight.numel())
        return target.kept(self.allocation.blocks[index].shape)

    def _share(self, index: int, target: Target) -> float:
        return self.allocation.blocks[index].share(target.path)


def _pattern(layer: nn.Linear, recipe: Recipe, share: float) -> Pattern:
    kept = n_of_m(recipe.pattern)
    if kept is not None:
        return NM(*kept)
    if recipe.pattern == "rows":
        return RowWise(round(share * layer.in_features))
    return Unstructured(round(share * layer.weight.numel()))


def _check_allocation(decoder: Decoder, recipe: Recipe, allocation: Allocation) -> None:
    """Raise InputError when an allocation fits neither the model nor what the recipe prunes."""
    allocation.check(decoder)
    single, n_m = recipe.units == "weights", n_of_m(recipe.pattern)
    for index, block in enumerate(allocation.blocks):
        if block.shares and not single:
            raise InputError(
                f"the allocation thins out layers of block {index}: that needs a recipe with units weights"
            )
        if single and (block.shape.mlp_width or block.shape.kv_heads) and block.shape != decoder.shape(index):
            raise InputError(f"the allocation narrows block {index}, but the recipe's units are single weights")
        if (
            single
            and n_m is not None
            and any(min(abs(share - 1), abs(share - n_m[0] / n_m[1])) > 1e-6 for share in block.shares.values())
        ):
            raise InputError(f"with the pattern {recipe.pattern} a layer of block {index} keeps that share, or 1")


def _removed(shape: BlockShape, wanted: BlockShape) -> tuple[str, ...]:
    """The sub-blocks that an allocation removes whole."""
    gone = {
        "attention": shape.kv_heads and not wanted.kv_heads,
        "mlp": shape.mlp_width and not wanted.mlp_width,
    }
    return tuple(part for part in PARTS if gone[part])


def _targets(decoder: Decoder, recipe: Recipe, wanted: BlockAllocation, index: int) -> list[Target]:
    """The layers to prune in a block: what the allocation makes smaller.

    Where the inputs may have drifted from the dense model's, the recipe's layers are corrected even if they keep all.
    """
    architecture, shape, keep = decoder.architecture, decoder.shape(index), wanted.shape
    if recipe.units == "weights":
        tap = {path: stage[0] for stage in architecture.stages for path in stage}
        return [Target(path, tap[path]) for path in decoder.paths(index) if wanted.share(path) < 1]
    named = NARROWED.get(recipe.units, ()) if recipe.propagation.dense_target else ()
    output, down = architecture.output, architecture.mlp_consumer
    values = Target(output, output, decoder.value_units, lambda shape: shape.value_dim * shape.kv_heads)
    groups = Target(output, output, decoder.kv_units, lambda shape: shape.kv_heads)
    targets = []
    if keep.kv_heads < shape.kv_heads or "kv_heads" in named:
        targets.append(groups)
    elif keep.value_dim < shape.value_dim or "value_dim" in named:
        targets.append(values)
    if keep.mlp_width < shape.mlp_width or "mlp_width" in named:
        targets.append(Target(down, down, decoder.mlp_units, lambda shape: shape.mlp_width))
    return [target for target in targets if target.kept and target.kept(keep)]


def _metrics(decoder: Decoder, batches: list[Tensor], recipe: Recipe) -> dict[str, OutputMetric]:
    """The output metrics that a recipe asks for, damped."""
    if recipe.output_metric == "none":
        return {}
    tokens, used = 0, []
    for batch in batches:
        if tokens < recipe.metric_tokens:
            used.append(batch)
            tokens += batch.numel()
    full = decoder.architecture.layers if recipe.output_metric == "full" else ()
    found = collect_metrics(decoder, used, sampled(recipe.seed), full=full)
    return {name: metric.damped(recipe.metric_damping) for name, metric in found.items()}


def _by_stage(decoder: Decoder, targets: list[Target]) -> list[list[Target]]:
    stages = range(len(decoder.architecture.stages))
    groups = [[target for target in targets if decoder.architecture.stage_of(target.path) == stage] for stage in stages]
    return [group for group in groups if group]


def _check(solution: Solution, name: str) -> None:
    if solution.status is Status.NONFINITE or not bool(torch.isfinite(solution.value).all()):
        raise NumericalError(f"{name}: {Status.NONFINITE.value}")
    if solution.violation > 0:
        raise NumericalError(f"{name}: the solver's answer breaks the pattern by {solution.violation:g}")


def _layer_report(
    name: str,
    problem: Problem,
    solution: Solution,
    written: Tensor,
    held_out: InputMoments | None,
    recipe: Recipe,
    kept: int,
    total: int,
    began: float,
) -> LayerReport:
    loss = problem.loss
    written = written.to(loss.weight)
    dead = int(loss.moments.dead.sum())
    notes = list(solution.notes)
    if dead:
        notes.append(f"{dead} inputs were zero on every calibration token")
    if loss.moments.tokens < loss.moments.width:
        notes.append(f"fewer calibration tokens ({loss.moments.tokens}) than inputs ({loss.moments.width})")
    elsewhere = None
    if held_out is not None:
        elsewhere = LayerLoss.of(loss.weight, held_out, fit_bias=loss.fit_bias).relative_error(written)
    return LayerReport(
        name=name,
        kind=problem.kind,
        solver=recipe.solver.label if recipe.solver else "chosen by the problem",
        relative_error=loss.relative_error(written),
        held_out_error=elsewhere,
        status=solution.status.name.lower(),
        objective=solution.objective,
        lower_bound=None if solution.certificate is None else solution.certificate.lower_bound,
        gap=solution.gap,
        damping=float(loss.damping.mean()),
        tokens=loss.moments.tokens,
        seconds=time.perf_counter() - began,
        kept=kept,
        units=total,
        dead_inputs=dead,
        notes=tuple(notes),
        stages=tuple(asdict(record) for record in solution.history),
    )


def _summary(layers: list[LayerReport]) -> tuple[str, ...]:
    """One sentence for each kind of note, with the number of layers it concerns."""
    count: dict[str, int] = {}
    for layer in layers:
        for note in layer.notes:
            kind = "".join("N" if character.isdigit() else character for character in note)
            count[kind] = count.get(kind, 0) + 1
    examples = {
        "".join("N" if character.isdigit() else character for character in note): note
        for layer in reversed(layers)
        for note in layer.notes
    }
    return tuple(f"{number} layers: {examples[kind]}" for kind, number in count.items())
