"""A run: the state that all its blocks share, and its position between two of them."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optprune.allocation import Allocator, DenseModel, Division
from optprune.calibration import (
    BlockMoments,
    DenseStatistics,
    KnownMoments,
    Path,
    calibrating,
    first_inputs,
    first_tokens,
    hold_out,
)
from optprune.calibration.partial_sums import PartialSums
from optprune.calibration.stream import calibration_facts, repeated_text
from optprune.errors import InputError, StrictError
from optprune.measure.memory import clock, free_memory, release
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.models.draft import DRAFT_FIELD
from optprune.models.places import InFile, OnDevice, OnHost, Place
from optprune.program import BlockProgram, Program, rounded_budget
from optprune.pruning.block import BlockJob, BlockOutcome, BlockRecord, BlockResult, BlockTask, moved, prune_block
from optprune.pruning.executors import LayerExecutor
from optprune.report import BlockFinished, BlockStarted, Event, PhaseAdvanced, PhaseRecorder
from optprune.report.phases import BUDGET, LOADING, METRIC, PRUNING
from optprune.system.environment import machine, versions
from optprune.system.wording import counted

if TYPE_CHECKING:
    from optprune.pruning.journal import Journal
    from optprune.pruning.shared import JournalProtocol

Listener = Callable[[Event], None]
MakeExecutor = Callable[[torch.device], LayerExecutor]
"""a function from the device of the model to the executor of a run's layers"""
MOST_NAMED = 8
"""the largest number of layers that a note names, because a model with experts has many"""
OPENED = 0.5
"""the approximate share of the loading that is done when a model is open and its weights are still to be read"""
STATES = ("auto", "device", "host", "disk")
"""the places where hidden states can be kept, by name"""
COPIES = 4
"""the number of copies of hidden states in memory: inputs and outputs of a block, calls of a sub-module and their
outputs"""
SHARE = 0.5
"""the largest share of the free memory for hidden states; the rest is for a block and the solve of a layer"""


class CachedMoments:
    """The moments of blocks that get the dense model's inputs: all blocks if independent, else the first."""

    def __init__(self, decoder: Decoder, program: Program, known: KnownMoments | None) -> None:
        """Use known moments, or None if the path does not begin with the dense model's inputs."""
        self._decoder, self._policy, self._known = decoder, program.policy, known
        self._moves_weights_later = program.method.moves_weights_later

    def block(self, index: int) -> BlockMoments | None:
        """Return the known moments of a block, or None."""
        if self._known is None or (index > 0 and not self._policy.independent):
            return None
        return self._known.of(index)

    def cover(self, blocks: Sequence[BlockProgram]) -> bool:
        """Return whether known moments of the dense model decide all blocks, so that the run needs no pass."""
        policy, known = self._policy, self._known
        if known is None or self._moves_weights_later:
            return False
        if policy.sequential or policy.dense_target or not policy.independent:
            return False
        return all(
            known.knows(block.index, [target.tap for target in block.targets])
            and not block.removed
            and self._decoder.shape(block.index).experts == block.wanted.shape.experts
            for block in blocks
        )


@dataclass(eq=False, kw_only=True)
class Run:
    """A run between two blocks, with the inputs of the next one and the records of the finished ones."""

    decoder: Decoder
    program: Program
    division: Division
    blocks: tuple[BlockProgram, ...]
    """the stages of every block"""
    path: Path
    """hidden states that enter the next block"""
    cached: CachedMoments
    """moments of the dense model that need not be measured"""
    metrics: Metrics
    """output metrics by the layer's full name, for the blocks to come; empty where all outputs have weight 1"""
    held_out: int
    """number of batches at the end that are held out"""
    tokens: int
    """tokens of the batches that are fitted"""
    notes: tuple[str, ...]
    """notes from before the first block"""
    journal: "JournalProtocol | None"
    facts: dict[str, Any]
    """everything that decides the bytes of the run, if there is a journal"""
    finished: set[int]
    """blocks that an earlier run finished, by the journal"""
    executor: LayerExecutor
    on_event: Listener
    records: list[BlockRecord] = field(default_factory=list)
    passed: int = 0
    """number of finished blocks that this run has passed"""
    dense_pass_seconds: dict[int, float] = field(default_factory=dict)
    """seconds of the pass through a dense block while a worker prunes it"""

    @cached_property
    def last(self) -> int:
        """The number of the last block with something to solve, after which no hidden states are needed."""
        return max((block.index for block in self.blocks if block.solves), default=-1)

    def prune_block(self, index: int) -> None:
        """Prune the next block, or load it if an earlier run finished it."""
        if index in self.finished:
            self.metrics_of(index)  # frees them
            self.records.append(self._load_finished(index))
        else:
            result = prune_block(self.decoder, self.task(index), self.on_event, self.executor)
            self.path = result.path
            if self.journal is not None:
                self.journal.finish(self.decoder, result)
            self.records.append(result.record)
            del result
        release()

    def task(self, index: int) -> BlockTask:
        """Return everything that decides how the next block is pruned."""
        # If the moments of all blocks are known, no hidden states are needed.
        return BlockTask(
            block=self.blocks[index],
            method=self.program.method,
            path=self.path,
            metrics=self.metrics_of(index),
            held_out=self.held_out,
            onwards=index < self.last and not self.needs_no_pass,
            detached=self.needs_no_pass,
            known=self.cached.block(index),
        )

    @cached_property
    def needs_no_pass(self) -> bool:
        """Whether all moments are cached; used before the first block."""
        return not self.finished and self.cached.cover(self.blocks)

    def jobs(self) -> Iterator[BlockJob]:
        """Yield the remaining blocks for workers, while the path moves on through the dense model.

        Blocks that an earlier run finished are passed in their turn.
        """
        decoder = self.decoder
        for index in range(len(decoder.blocks)):
            metrics = self.metrics_of(index)
            if index in self.finished:
                self.records.append(self._load_finished(index))
                continue
            with decoder.resident(index) as block:
                onwards = index < self.last
                # The worker's path ends with the block; the next block starts from this run's own path.
                task = BlockTask(
                    block=self.blocks[index],
                    method=self.program.method,
                    path=self.path,
                    metrics=metrics,
                    held_out=self.held_out,
                    onwards=False,
                    detached=onwards,
                )
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
        """Write the weights of a worker's block into the model; blocks come in any order."""
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

    def metrics_of(self, index: int) -> Metrics:
        """Return the metrics of a block's layers, and release them from the run."""
        decoder = self.decoder
        return self.metrics.pop_layers([decoder.name(index, layer) for layer in decoder.architecture.layers])

    def _load_finished(self, index: int) -> BlockRecord:
        assert self.journal is not None
        decoder, journal, record = self.decoder, self.journal, self.journal.record(index)
        self._report_passed(0)

        def finish() -> None:
            decoder.put(index, record.shape, journal.weights(decoder, index))

        with decoder.resident(index) as block:
            if index < self.last:
                self.path.pass_by(block, finish)
            else:
                finish()
        if decoder.store is not None:
            decoder.store.mark_written(block)
        self._report_passed(1)
        return record

    def _report_passed(self, more: int) -> None:
        """Report how many finished blocks are passed, with the present one if `more` is 1."""
        self.passed += more
        blocks, finished = len(self.decoder.blocks), len(self.finished)
        counts = self.passed, finished, 0.0, finished / blocks
        self.on_event(PhaseAdvanced(PRUNING, "passing finished blocks by", "block", *counts))


def begin(
    program: Program,
    decoder: Decoder,
    every: list[Tensor],
    *,
    phases: PhaseRecorder,
    executor: MakeExecutor,
    statistics: DenseStatistics | None = None,
    journal: "Journal | None" = None,
    partial_sums: PartialSums | None = None,
    known_facts: dict[str, Any] | None = None,
) -> Run:
    """Return a run before its first block, with the budget divided and no weight changed.

    The recorder gets the phases up to here. If there is a journal, the first one reads all weights for the facts of the
    run, unless the journal has begun with `known_facts`.
    """
    statistics, partial_sums = statistics or DenseStatistics(), partial_sums or PartialSums()
    if program.precise:
        decoder = decoder.precise()
    decoder.states = place_for(program.request.states, decoder, every, None if journal is None else journal.scratch)
    fitted, held_out = hold_out(every, program.held_out)
    partial_sums.check(fitted)
    repeated = warn_or_raise(program.method.strict, repeated_text(fitted, program.widest))
    statistics.begin(decoder, every, partial_sums)
    shared, layers = journal, executor
    if partial_sums.peers.size > 1:
        from optprune.pruning.shared import ProcessExecutor, SharedJournal

        shared, layers = SharedJournal(journal, partial_sums.peers), lambda _: ProcessExecutor(partial_sums.peers)
    on_event, strict = phases.on_event, program.method.strict
    decided = known_facts or {}
    if shared is not None and known_facts is None:
        with phases.phase(LOADING):
            decided = facts(program, decoder, every, partial_sums, on_event)
            shared.begin(decided)
    with phases.phase(METRIC):
        metrics, notes = measured_metrics(program, decoder, every, statistics, on_event, shared, partial_sums)
    if partial_sums.count > 1:
        notes += (
            f"sums over batches are added in {partial_sums.count} partial sums (--partial-sums {partial_sums.count})",
        )
    notes += program.notes + warn_or_raise(strict, program.allocator.warnings)
    with phases.phase(BUDGET), calibrating(decoder):
        costs = statistics if shared is None else shared.keeping_costs(statistics)
        dense = DenseModel(decoder, fitted, metrics, costs, on_event, partial_sums)
        division = _division(program.allocator, dense, shared)
        entering = first_inputs(decoder, fitted, partial_sums)
        path = program.policy.start(entering)
    missed = rounded_budget(program, division.allocation) if program.divides else ()  # else the check has told it
    known = statistics.known(decoder, fitted, held_out, partial_sums)
    finished = set[int]() if shared is None else set(shared.finished())
    repaired = () if shared is None else shared.repaired()  # known once `finished` has read the files
    return Run(
        decoder=decoder,
        program=program,
        division=division,
        blocks=program.blocks(division.allocation),
        path=path,
        cached=CachedMoments(decoder, program, known if path.actual is entering else None),
        metrics=metrics,
        held_out=held_out,
        tokens=sum(batch.numel() for batch in fitted),
        notes=repeated + notes + warn_or_raise(strict, division.warnings + missed) + division.notes + repaired,
        journal=shared,
        facts={} if journal is None else decided,
        finished=finished,
        executor=layers(decoder.model.device),
        on_event=on_event,
    )


def _division(allocator: Allocator, dense: DenseModel, journal: "JournalProtocol | None") -> Division:
    """Return the division of an earlier run, or a new one."""
    earlier = None if journal is None else journal.division()
    if earlier is not None:
        return earlier
    division = dense.partial_sums.peers.all_gather(allocator.divide(dense))[0]
    if journal is not None:
        journal.divided(division)
    return division


def warn_or_raise(strict: bool, warnings: tuple[str, ...]) -> tuple[str, ...]:
    """Return warnings as notes; StrictError where there is one and the recipe is strict."""
    if warnings and strict:
        raise StrictError(f"{warnings[0]} (strict mode makes this an error)")
    return warnings


def undamped_metrics(
    program: Program,
    decoder: Decoder,
    batches: Sequence[Tensor],
    statistics: DenseStatistics,
    on_event: Callable[[Event], None],
    partial_sums: PartialSums,
) -> Metrics:
    """Return the output metrics of a program that uses them, without damping."""
    assert program.metric is not None
    setting, used = program.metric, first_tokens(batches, program.metric.tokens)
    widest = setting.width or math.inf

    def on_pass(done: int, total: int) -> None:
        on_event(PhaseAdvanced(METRIC, "measuring the output metric", "pass", done, total))

    return statistics.metrics(
        decoder, used, program.seed, program.whole_metric, widest, setting.clip, on_pass, partial_sums
    )


def measured_metrics(
    program: Program,
    decoder: Decoder,
    batches: list[Tensor],
    statistics: DenseStatistics,
    on_event: Callable[[Event], None],
    journal: "JournalProtocol | None",
    partial_sums: PartialSums,
) -> tuple[Metrics, tuple[str, ...]]:
    """Return the damped output metrics, with notes where they are less than the recipe asks for.

    A resumed run uses the metrics that were measured before it was stopped.
    """
    setting = program.metric
    if setting is None:
        return Metrics({}), ()
    metrics = None
    if journal is not None:
        # Dividing the budget needs the metrics of all blocks, finished ones included.
        finished = journal.finished() if journal.division() is not None else []
        metrics = journal.metrics.read(decoder, finished)
    if metrics is None:
        metrics = undamped_metrics(program, decoder, batches, statistics, on_event, partial_sums)
        metrics = metrics if journal is None else journal.metrics.keep(decoder, metrics)
    small = metrics.diagonal_only()
    cut = [path for path in program.whole_metric if any(name.endswith(f".{path}") for name in small)]
    notes = list[str]()
    if cut:
        named = ", ".join(cut[:MOST_NAMED]) + (f" and {len(cut) - MOST_NAMED} more" if len(cut) > MOST_NAMED else "")
        notes.append(
            f"only the diagonal of the metric is used for {named}, which have more than {setting.width or math.inf} "
            "outputs (metric.width)"
        )
    reached, blocks = set(metrics), range(len(decoder.blocks))
    every = [decoder.name(index, path) for index in blocks for path in decoder.paths(index)]
    missed = [name for name in every if name not in reached]
    if missed:
        notes.append(
            f"no token of the output metric reached {counted(len(missed), 'layer')}, such as {missed[0]}: all their "
            "outputs have weight 1"
        )
    return metrics.damped(setting.damping), tuple(notes)


def facts(
    program: Program,
    decoder: Decoder,
    batches: list[Tensor],
    partial_sums: PartialSums,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """Return everything that decides the bytes of a run, with a hash of all weights; events report their reading."""

    from optprune.pruning.journal import MODEL, digest_of_model

    def on_bytes(done: int, total: int) -> None:
        on_event(PhaseAdvanced(LOADING, "reading all weights once", "MiB", done >> 20, total >> 20, OPENED))

    return {
        MODEL: digest_of_model(decoder, on_bytes),
        "its architecture": getattr(decoder.model.config, DRAFT_FIELD, None),
        "its dtype": str(decoder.model.dtype),
        **calibration_facts(decoder, batches),
        "the number of partial sums": partial_sums.count,
        **program.facts(),
        "the version": versions(),
        "the machine": machine(decoder.model.device),
        "the blocks": len(decoder.blocks),
    }


def check_states(states: str) -> None:
    """Raise InputError unless the name is that of a place for hidden states."""
    if states not in STATES:
        raise InputError(f"hidden states cannot be kept on {states!r}: choose {', '.join(STATES[:-1])} or {STATES[-1]}")


def place_for(states: str, decoder: Decoder, batches: Sequence[Tensor], folder: FilePath | None) -> Place:
    """Return the place of the hidden states of token ids [batch, length]; `folder` is for a file of them.

    "auto" is the device if four copies of them fit in half of its free memory, else the host's memory by the same rule,
    else a file. Without a `folder` the file is in the scratch folder of the model's store, or in the system's folder of
    temporary files. The place does not change results.
    """
    check_states(states)
    if states == "auto":
        states = _by_size(decoder, sum(batch.numel() for batch in batches))
    if states == "device":
        return OnDevice()
    if states == "host":
        return OnHost()
    if folder is not None:
        return InFile(folder)
    return InFile(FilePath(tempfile.gettempdir())) if decoder.store is None else decoder.store.offload


def _by_size(decoder: Decoder, tokens: int) -> str:
    """Return the first place with enough room; unknown free memory counts as enough."""
    model = decoder.model
    size = COPIES * tokens * model.config.hidden_size * (decoder.computes_in or model.dtype).itemsize
    for name, device in (("device", model.device.type), ("host", "cpu")):
        free = free_memory(model.device if device != "cpu" else None)
        if free is None or size <= SHARE * free:
            return name
    return "disk"
