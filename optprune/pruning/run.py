"""A run: what all its blocks share, and where it stands between two of them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from optprune.allocation import Allocation, Allocator, DenseModel, Division
from optprune.calibration import DenseStatistics, calibrating, first_inputs, hold_out
from optprune.calibration.partial_sums import PartialSums
from optprune.errors import StrictError
from optprune.measure.clock import clock
from optprune.measure.memory import release
from optprune.metric import Metrics
from optprune.models import Decoder, Target
from optprune.pruning.asked_metrics import asked_metrics, whole_in
from optprune.pruning.block import BlockRecord, BlockResult, BlockTask, prune_block
from optprune.pruning.cached_moments import CachedMoments
from optprune.pruning.executors import LayerExecutor, SerialExecutor
from optprune.pruning.facts import facts
from optprune.pruning.jobs import BlockJob, BlockOutcome, moved
from optprune.pruning.journal import Journal
from optprune.pruning.preflight import check_batches, check_run
from optprune.pruning.shared import JournalProtocol, ProcessExecutor, SharedJournal
from optprune.pruning.states import place_for
from optprune.pruning.targets import targets_of
from optprune.recipe import Recipe
from optprune.recipe.allocator import allocator_of
from optprune.report import BlockFinished, BlockStarted, Event, PhaseAdvanced, PhaseRecorder
from optprune.report.phases import BUDGET, LOADING, METRIC, PRUNING
from optprune.system.wording import counted

Listener = Callable[[Event], None]
MOST_NAMED = 8
"""how many layers a note names: those of experts are many"""


class Run:
    """A run between two blocks: what enters the next one, and the records of those that are done."""

    def __init__(
        self,
        decoder: Decoder,
        recipe: Recipe,
        division: Division,
        batches: list[Tensor],
        on_event: Listener,
        partial_sums: PartialSums | None = None,
    ) -> None:
        self.decoder, self.recipe, self.division, self.on_event = decoder, recipe, division, on_event
        self.allocation = division.allocation
        entering = first_inputs(decoder, batches, partial_sums)
        self.path = recipe.policy.start(entering)
        """what enters the next block"""
        self.from_dense = self.path.actual is entering
        """whether the path begins as that of the dense model"""
        self.cached = CachedMoments(decoder, recipe, None, self.from_dense)
        """the moments of the dense model that need not be measured"""
        self.records: list[BlockRecord] = []
        self.tokens = sum(batch.numel() for batch in batches)
        self.metrics = Metrics({})
        """the output metrics of the dense model, by the layer's full name, for the blocks to come; empty where outputs
        count alike"""
        self.held_out = 0
        """how many batches, the last ones, are kept apart"""
        self.notes: tuple[str, ...] = ()
        """the notes on what was found before the first block"""
        self.journal: JournalProtocol | None = None
        self.facts: dict[str, Any] = {}
        """what decides the bytes of the run, where there is a journal"""
        self.finished: set[int] = set()
        """the blocks that an earlier run has finished, by the journal"""
        self.passed_by = 0
        """how many of them this run has passed by"""
        self.executor: LayerExecutor = SerialExecutor()
        """who solves the layers of a stage"""
        self.dense_pass_seconds: dict[int, float] = {}
        """the seconds of the pass through a dense block that a worker prunes meanwhile"""
        blocks = range(len(decoder.blocks))
        self.last = max((index for index in blocks if self.chooses(index)), default=-1)
        """the last block with something to solve: nothing travels past it"""

    @classmethod
    def begin(
        cls,
        decoder: Decoder,
        batches: Iterable[Tensor],
        recipe: Recipe,
        allocation: Allocation | None,
        statistics: DenseStatistics | None,
        phases: PhaseRecorder,
        journal: Journal | None = None,
        states: str = "auto",
        partial_sums: PartialSums | None = None,
    ) -> "Run":
        """A run before its first block: all fits together, the budget is divided, and no weight is changed.

        The recorder has the phases until then; the first is to read all weights, where a journal must know them.
        """
        recipe, every = recipe.settled(), check_batches(decoder.model.config, batches)
        idle = check_run(decoder, recipe, allocation)
        allocator, statistics = allocator_of(recipe, allocation), statistics or DenseStatistics()
        if recipe.precise(allocator.probes):
            decoder = decoder.precise()
        decoder.states = place_for(states, decoder, every, None if journal is None else journal.scratch)
        fitted, held_out = hold_out(every, 0.0 if recipe.refit is None else recipe.refit.held_out)
        partial_sums = partial_sums or PartialSums()
        partial_sums.check(fitted)
        statistics.begin(decoder, every, partial_sums)
        journal_view = journal if partial_sums.peers.size == 1 else SharedJournal(journal, partial_sums.peers)
        on_event = phases.on_event
        decided: dict[str, Any] = {}
        if journal_view is not None:
            with phases.phase(LOADING):
                decided = facts(decoder, every, recipe, allocation, partial_sums, on_event)
                journal_view.begin(decided)
        with phases.phase(METRIC):
            metrics, notes = _metrics(decoder, every, recipe, statistics, on_event, journal_view, partial_sums)
        if partial_sums.count > 1:
            notes += (
                f"sums over batches are added in {partial_sums.count} partial sums (--lanes {partial_sums.count})",
            )
        notes += idle + warn_or_raise(recipe, allocator.warnings)
        with phases.phase(BUDGET), calibrating(decoder):
            costs = statistics if journal_view is None else journal_view.keeping_costs(statistics)
            dense = DenseModel(decoder, fitted, metrics, costs, on_event, partial_sums)
            division = _division(allocator, dense, journal_view)
            run = cls(decoder, recipe, division, fitted, on_event, partial_sums)
        run.metrics, run.held_out, run.journal = metrics, held_out, journal_view
        known = statistics.known(decoder, fitted, held_out, partial_sums)
        run.cached = CachedMoments(decoder, recipe, known, run.from_dense)
        run.facts = {} if journal is None else decided
        run.finished = set() if journal_view is None else set(journal_view.finished())
        if partial_sums.peers.size > 1:
            run.executor = ProcessExecutor(partial_sums.peers)
        repaired = () if journal_view is None else journal_view.repaired()
        run.notes = notes + warn_or_raise(recipe, division.warnings) + division.notes + repaired
        return run

    def targets(self, index: int) -> list[Target]:
        """The layers to prune in a block."""
        return targets_of(self.decoder, self.recipe, self.allocation.blocks[index], index)

    def chooses(self, index: int) -> bool:
        """Whether what becomes of a block hangs on what enters it."""
        experts = self.allocation.blocks[index].shape.experts
        return bool(self.targets(index)) or 0 < experts < self.decoder.shape(index).experts

    def prune_block(self, index: int) -> None:
        """Prune the block that comes next, or let it be what an earlier run made of it."""
        metrics = self._metrics_of(index)
        if index in self.finished:
            self.records.append(self._passed_by(index))
        else:
            wanted, onwards = self.allocation.blocks[index], index < self.last
            # With all that enters any block known, nothing has to go on.
            detached, known = self.recalls_everything, self.cached.block(index)
            more = self.held_out, onwards and not detached, detached, known
            task = BlockTask(index, self.recipe, wanted, self.path, metrics, *more)
            self.records.append(self._pruned(task))
        del metrics  # freed with the block's
        release()

    @cached_property
    def recalls_everything(self) -> bool:
        """Whether the run recalls all that it needs of the dense model; asked before the first block."""
        targets = [self.targets(index) for index in range(len(self.decoder.blocks))]
        shapes = [block.shape for block in self.allocation.blocks]
        return not self.finished and self.cached.whole(targets, shapes)

    def jobs(self) -> Iterator[BlockJob]:
        """The blocks that are left, for workers; the path moves on through the dense model, whatever becomes of them.

        Blocks that an earlier run has finished are passed by when their turn comes.
        """
        decoder = self.decoder
        for index in range(len(decoder.blocks)):
            metrics = self._metrics_of(index)
            if index in self.finished:
                self.records.append(self._passed_by(index))
                continue
            with decoder.resident(index) as block:
                wanted, onwards = self.allocation.blocks[index], index < self.last
                # The worker's path ends with the block: the next one's begins where this run's own path gets.
                ends: dict[str, Any] = {"onwards": False, "detached": onwards}
                task = BlockTask(index, self.recipe, wanted, self.path, metrics, self.held_out, **ends)
                job = BlockJob.of(decoder, task)
                if onwards:
                    before = clock(decoder.model.device)
                    self.path.pass_by(block, lambda: None)
                    self.dense_pass_seconds[index] = clock(decoder.model.device) - before
            self.on_event(BlockStarted(index, len(decoder.blocks), done=len(self.records)))
            del metrics, task
            yield job
            del job
            release()

    def take(self, outcome: BlockOutcome) -> None:
        """Let a block be what a worker made of it; they come in any order."""
        record, decoder = outcome.record, self.decoder
        passes = 2 * self.dense_pass_seconds.pop(record.index, 0.0)
        record = replace(record, floor_seconds=record.floor_seconds + passes)
        weights = moved(outcome.weights, decoder.model.device)
        with decoder.resident(record.index, keep=True):
            decoder.put(record.index, record.shape, weights)
        if self.journal is not None:
            self.journal.finish(decoder, BlockResult(record, weights, self.path))
        self.records.append(record)
        for event in outcome.events:
            done = {"done": len(self.records)} if isinstance(event, BlockFinished) else {}
            self.on_event(replace(event, **done))

    def _metrics_of(self, index: int) -> Metrics:
        """The metrics of a block's layers, which the run no longer holds."""
        decoder = self.decoder
        return self.metrics.taken([decoder.name(index, layer) for layer in decoder.architecture.layers])

    def _pruned(self, task: BlockTask) -> BlockRecord:
        result = prune_block(self.decoder, task, self.on_event, self.executor)
        self.path = result.path
        if self.journal is not None:
            self.journal.finish(self.decoder, result)
        return result.record

    def _passed_by(self, index: int) -> BlockRecord:
        assert self.journal is not None
        decoder, journal, record = self.decoder, self.journal, self.journal.record(index)
        self._tell_passed_by(0)

        def finish() -> None:
            decoder.put(index, record.shape, journal.weights(decoder, index))

        with decoder.resident(index) as block:
            if index < self.last:
                self.path.pass_by(block, finish)
            else:
                finish()
        if decoder.store is not None:
            decoder.store.take_from_sink(block)
        self._tell_passed_by(1)
        return record

    def _tell_passed_by(self, more: int) -> None:
        """Tell how many finished blocks are passed by, the present one as well with `more`."""
        self.passed_by += more
        blocks, finished = len(self.decoder.blocks), len(self.finished)
        counts = self.passed_by, finished, 0.0, finished / blocks
        self.on_event(PhaseAdvanced(PRUNING, "passing finished blocks by", "block", *counts))


def _division(allocator: Allocator, dense: DenseModel, journal: JournalProtocol | None) -> Division:
    """What every block keeps: as an earlier run has divided it, or as it is divided now."""
    earlier = None if journal is None else journal.division()
    if earlier is not None:
        return earlier
    division = dense.partial_sums.peers.all_gather(allocator.divide(dense))[0]
    if journal is not None:
        journal.divided(division)
    return division


def _metrics(
    decoder: Decoder,
    batches: list[Tensor],
    recipe: Recipe,
    statistics: DenseStatistics,
    on_event: Listener,
    journal: JournalProtocol | None,
    partial_sums: PartialSums,
) -> tuple[Metrics, tuple[str, ...]]:
    """The output metrics that a recipe asks for, damped, and a note where they are less than it asks for.

    A run that goes on has those that were measured before it was stopped.
    """
    asked = recipe.metric
    if asked is None:
        return Metrics({}), ()
    metrics = None
    if journal is not None:
        # What divides the budget needs the metric of every block, those of finished blocks too.
        finished = journal.finished() if journal.division() is not None else []
        metrics = journal.metrics.read(decoder, finished)
    if metrics is None:
        metrics = asked_metrics(decoder, batches, recipe, statistics, on_event, partial_sums)
        metrics = metrics if journal is None else journal.metrics.keep(decoder, metrics)
    small = metrics.diagonal_only()
    cut = [path for path in whole_in(decoder, recipe) if any(name.endswith(f".{path}") for name in small)]
    widest, notes = asked.width or math.inf, list[str]()
    if cut:
        of = ", ".join(cut[:MOST_NAMED]) + (f" and {len(cut) - MOST_NAMED} more" if len(cut) > MOST_NAMED else "")
        notes.append(f"of {of} with over {widest} outputs (metric_width) only the diagonal of the metric is used")
    reached, blocks = set(metrics), range(len(decoder.blocks))
    every = [decoder.name(index, path) for index in blocks for path in decoder.paths(index)]
    missed = [name for name in every if name not in reached]
    if missed:
        notes.append(
            f"no token of the output metric reached {counted(len(missed), 'layer')}, as {missed[0]}: outputs count "
            "alike"
        )
    return metrics.damped(asked.damping), tuple(notes)


def warn_or_raise(recipe: Recipe, warnings: tuple[str, ...]) -> tuple[str, ...]:
    """Warnings as notes; StrictError where a strict recipe has one."""
    if warnings and recipe.strict:
        raise StrictError(f"{warnings[0]} (strict mode makes this an error)")
    return warnings
