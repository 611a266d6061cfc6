"""One block's work as a value: a `BlockTask` goes in, a `BlockResult` comes out, wherever it is run."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from optprune.calibration import BlockMoments, Path
from optprune.calibration.calls import Calls, Wanted, calls_of
from optprune.metric import OutputMetric
from optprune.models import BlockAllocation, BlockShape, Decoder, Target
from optprune.pruning.executors import LayerExecutor, SerialExecutor
from optprune.pruning.experts import remove_experts
from optprune.pruning.layer import LayerTask, SolvedLayer, write_layer
from optprune.pruning.matching import descent_of, match_block
from optprune.pruning.recovery import recover
from optprune.pruning.targets import by_stage, parts_removed, targets_of
from optprune.recipe import Recipe
from optprune.recipe.groups import Matching, Recovery
from optprune.report import BlockFinished, BlockStarted, Event, LayerReport, LayerSolved, RecoveredPart


@dataclass(frozen=True, eq=False)
class BlockTask:
    """What pruning one block takes beside the block itself: nothing else decides what becomes of it."""

    index: int
    recipe: Recipe
    wanted: BlockAllocation
    """what the block is to keep"""
    path: Path
    """what enters the block; it is used up, and moved on to the next block"""
    metrics: Mapping[str, OutputMetric]
    """the output metrics by the full name of the block's layers; none where outputs count alike"""
    held_out: int = 0
    """how many batches, the last ones, are kept apart"""
    onwards: bool = True
    """whether a later block needs what leaves this one"""
    detached: bool = False
    """whether another pass, through the dense model, moves on to the next block: the path then ends here"""
    known: BlockMoments | None = None
    """moments of the block in the dense model, where it gets what it gets there; for this process only"""


@dataclass(frozen=True)
class BlockRecord:
    """What there is to say of a block that is done, as plain data."""

    index: int
    shape: BlockShape
    layers: tuple[LayerReport, ...]
    recovered: tuple[RecoveredPart, ...]
    zeros: int
    """weights of the solved layers that are zero"""
    due: int
    """weights of the solved layers that the budget makes zero, but for rounding"""
    floor_seconds: float
    """the seconds of what no run of such a policy can spare: two passes of the block, and its inputs' Gram products"""


@dataclass(frozen=True, eq=False)
class BlockResult:
    """What became of a block."""

    record: BlockRecord
    weights: dict[str, Tensor]
    """the block's parameters by their names inside it, as they are stored: copies only if need be"""
    path: Path
    """what enters the next block, or what entered this one where no later block needs it"""


def prune_block(
    decoder: Decoder, task: BlockTask, on_event: Callable[[Event], None], executor: LayerExecutor | None = None
) -> BlockResult:
    """Calibrate, solve and write one block of a model, which is changed in place, and move its path past it.

    `executor` solve the layers of a stage: one after the other, where nobody says otherwise.
    """
    began, index, blocks = time.perf_counter(), task.index, len(decoder.blocks)
    on_event(BlockStarted(index, blocks, layers=_shares(decoder, task)))
    with decoder.resident(index, keep=True):
        work = _Work(decoder, task, on_event, executor or SerialExecutor())
        removed = parts_removed(decoder.shape(index), task.wanted.shape)
        if task.onwards or work.targets or work.fewer_experts:
            work.visit(removed)
        else:
            work.remove(removed)
        result = work.result()
    on_event(BlockFinished(index, blocks, time.perf_counter() - began))
    return result


def _shares(decoder: Decoder, task: BlockTask) -> tuple[float, ...]:
    """The share of the solving that each layer is, in the order of the forward pass, if solvers go by products."""
    targets = targets_of(decoder, task.recipe, task.wanted, task.index)
    sizes = [decoder.layer(task.index, target.path).weight.shape for target in targets]
    work = [outputs * inputs * (outputs + inputs) for outputs, inputs in sizes]
    return tuple(each / sum(work) for each in work)


class _Work:
    """What was done so far inside a block."""

    def __init__(
        self, decoder: Decoder, task: BlockTask, on_event: Callable[[Event], None], executor: LayerExecutor
    ) -> None:
        self.decoder, self.task, self.on_event, self.executor = decoder, task, on_event, executor
        self.targets = targets_of(decoder, task.recipe, task.wanted, task.index)
        shape = decoder.shape(task.index)
        self.fewer_experts = 0 < task.wanted.shape.experts < shape.experts
        self.layers: list[LayerReport] = []
        self.recovered: list[RecoveredPart] = []
        self.zeros = self.due = 0
        self.floor_seconds = 0.0

    def result(self) -> BlockResult:
        """What became of the block."""
        index, decoder = self.task.index, self.decoder
        done = tuple(self.layers), tuple(self.recovered), self.zeros, self.due, self.floor_seconds
        record = BlockRecord(index, decoder.shape(index), *done)
        return BlockResult(record, decoder.weights(index), self.task.path)

    def visit(self, removed: Sequence[str]) -> None:
        """Go through the block stage by stage, and on to the next one."""
        task, block = self.task, self.decoder.blocks[self.task.index]
        wanted = {"held_out": task.held_out, "calls": self.wanted(task.recipe.recovery), "known": task.known}
        matching = task.recipe.matching if self.targets or removed or self.fewer_experts else None
        whole = matching is not None
        cut = bool(removed) or self.fewer_experts
        with task.path.visit(block, cut=cut, detached=task.detached, whole=whole, **wanted) as visit:
            self.remove(removed)
            if self.fewer_experts:
                self.choose_experts()
            stages = visit.stages(by_stage(self.decoder, self.targets))
            for position, stage in enumerate(stages):
                places = self.recovered_by(stage)
                collected = visit.collect(self.taps(stage), places)
                self.executor.solve([self.layer_task(target) for target in stage], collected, self.take)
                del collected
                later = {place for following in stages[position + 1 :] for place in self.recovered_by(following)}
                for place in places:
                    if place not in later:
                        self.recover(place, visit.calls(place))
            if matching is not None:
                self.match(matching, visit.whole_calls(self.wanted(matching)))
        self.floor_seconds += visit.floor_seconds

    def wanted(self, of: Recovery | Matching | None) -> Wanted:
        """The batches whose calls are wanted: the first that hold so many tokens, and those that are held out."""
        return Wanted(math.inf if of is None or of.tokens is None else of.tokens, self.task.held_out)

    def remove(self, parts: Sequence[str]) -> None:
        """Remove sub-blocks whole."""
        for part in parts:
            self.decoder.remove(self.task.index, part)

    def choose_experts(self) -> None:
        """Remove whole experts, by what reaches them."""
        decoder, task = self.decoder, self.task
        mixture = decoder.architecture.mixture
        assert mixture is not None
        calls = calls_of(decoder.blocks[task.index], mixture.module, task.path.actual)
        report = remove_experts(
            decoder, task.index, task.wanted.shape.experts, task.recipe, *calls.split(task.held_out)
        )
        self.layers.append(report)
        self.on_event(LayerSolved(report))

    def taps(self, targets: Sequence[Target]) -> list[str]:
        """The layers at which the inputs of all targets are seen, in the order of the forward pass."""
        return sorted({target.tap for target in targets}, key=self.decoder.architecture.layers.index)

    def layer_task(self, target: Target) -> LayerTask:
        """What is to become of one layer."""
        task = self.task
        return LayerTask(self.decoder, task.index, target, task.wanted, task.recipe, task.metrics)

    def take(self, layer: LayerTask, solved: SolvedLayer) -> None:
        """Write what became of one layer."""
        pruned = write_layer(layer, solved)
        self.layers.append(pruned.report)
        self.zeros += pruned.zeros
        self.due += pruned.due
        self.on_event(LayerSolved(pruned.report))

    def recovered_by(self, targets: Sequence[Target]) -> list[str]:
        """The paths of the sub-modules that are refitted after these layers, if no stage of theirs follows."""
        places = [path for path, _ in self.decoder.architecture.recoverable if self.task.recipe.recovery is not None]
        return [path for path in places if any(target.path.startswith(f"{path}.") for target in targets)]

    def recover(self, path: str, calls: Calls) -> None:
        """Refit a sub-module whose layers are pruned."""
        decoder, task, recovery = self.decoder, self.task, self.task.recipe.recovery
        assert recovery is not None
        layers = dict(decoder.architecture.recoverable)[path]
        fit, apart = calls.split(task.held_out)
        part = recover(
            decoder.blocks[task.index].get_submodule(path),
            [name.removeprefix(f"{path}.") for name in layers],
            fit,
            apart,
            rounds=recovery.rounds,
            steps=recovery.steps,
            damping=recovery.damping,
            metric=task.metrics.get(decoder.name(task.index, layers[-1])),
            dtype=None if decoder.computes_in is None else decoder.model.dtype,
            name=decoder.name(task.index, path),
        )
        self.recovered.append(part)

    def match(self, matching: Matching, calls: Calls) -> None:
        """Match the block as a whole, once its layers are pruned.

        What leaves it has the metric of the layer that it adds last, unless a norm follows.
        """
        decoder, task = self.decoder, self.task
        architecture = decoder.architecture
        last = decoder.name(task.index, architecture.mlp_consumer)
        metric = None if architecture.ends_with_norm(decoder.model.config) else task.metrics.get(last)
        fit, apart = calls.split(task.held_out)
        part = match_block(
            decoder.blocks[task.index],
            fit,
            apart,
            descent_of(matching),
            at_once=matching.sequences,
            pull=matching.pull,
            metric=metric,
            dtype=None if decoder.computes_in is None else decoder.model.dtype,
            name=decoder.block_name(task.index),
        )
        self.recovered.append(part)
