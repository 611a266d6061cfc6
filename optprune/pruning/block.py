"""The work on one block as a value: `BlockTask` is the input and `BlockResult` the output, wherever it is run."""

import copy
import json
import math
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from optprune.calibration import BlockMoments, Path, Stream, Visit, calibrating
from optprune.calibration.calls import Calls, Wanted, expert_choice, mixture_calls
from optprune.calibration.moments_pass import Collected
from optprune.errors import InputError, OptpruneError, StrictError
from optprune.measure.memory import release
from optprune.metric import OutputMetric
from optprune.models import BlockShape, Decoder, Target
from optprune.models.places import OnDevice, States
from optprune.models.skeleton import skeleton
from optprune.problems import Problem
from optprune.program import BlockProgram, Method, Stage
from optprune.pruning.executors import LayerExecutor, SerialExecutor
from optprune.pruning.layer import LayerTask, SolvedLayer, stated_problem, write_layer
from optprune.report import BlockFinished, BlockStarted, Event, LayerReport, LayerSolved, RecoveredPart
from optprune.solvers.experts import choose_experts
from optprune.system.environment import differences, machine, versions
from optprune.system.wording import shown


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockTask:
    """Everything that decides how one block is pruned, apart from the block itself."""

    block: BlockProgram
    method: Method
    path: Path
    """hidden states that enter the block; they are overwritten by those that enter the next block"""
    metrics: Mapping[str, OutputMetric]
    """the output metrics by the full name of the block's layers; empty where all outputs have weight 1"""
    held_out: int = 0
    """number of batches at the end that are held out"""
    onwards: bool = True
    """whether a later block needs the outputs of this one"""
    detached: bool = False
    """whether the parent process computes the next block's inputs itself: then the path ends with this block"""
    known: BlockMoments | None = None
    """moments of the dense block, if its inputs are those of the dense model; for this process only"""

    @property
    def index(self) -> int:
        """The number of the block."""
        return self.block.index


@dataclass(frozen=True)
class BlockRecord:
    """The report of a finished block, as plain data."""

    index: int
    shape: BlockShape
    layers: tuple[LayerReport, ...]
    recovered: tuple[RecoveredPart, ...]
    zeros: int
    """weights of the solved layers that are zero"""
    due: int
    """weights of the solved layers that the budget makes zero at least, apart from rounding"""
    most_zeros: int
    """weights of the solved layers that the budget makes zero at most, with those that were zero before"""
    floor_seconds: float
    """the least seconds of any run with this policy: two passes of the block and the Gram products of its inputs"""


@dataclass(frozen=True, eq=False)
class BlockResult:
    """The record, the weights and the outgoing path of a pruned block."""

    record: BlockRecord
    weights: dict[str, Tensor]
    """the block's parameters by their names inside it, in stored form, copied only if necessary"""
    path: Path
    """the inputs of the next block, or those of this one if no later block needs them"""


def prune_block(
    decoder: Decoder, task: BlockTask, on_event: Callable[[Event], None], executor: LayerExecutor | None = None
) -> BlockResult:
    """Calibrate, solve and write one block of a model in place, and move its path past it."""
    began, index, blocks = time.perf_counter(), task.index, len(decoder.blocks)
    on_event(BlockStarted(index, blocks, layers=_shares(decoder, task)))
    with decoder.resident(index, keep=True):
        run = _BlockRun(decoder, task, on_event, executor or SerialExecutor())
        if task.onwards or task.block.solves:
            run.visit()
        else:
            run.remove_parts()
        result = run.result()
    on_event(BlockFinished(index, blocks, time.perf_counter() - began))
    return result


def block_problem(decoder: Decoder, task: BlockTask, path: str) -> Problem:
    """Return the problem of a layer in a block, after solving and writing the stages before it."""
    with decoder.resident(task.index, keep=True):
        return _BlockRun(decoder, task, lambda event: None, SerialExecutor()).problem(path)


def _shares(decoder: Decoder, task: BlockTask) -> tuple[float, ...]:
    """Return the share of each layer in the time of the solves, in forward order, by the products of its sizes."""
    sizes = [decoder.layer(task.index, target.path).weight.shape for target in task.block.targets]
    work = [outputs * inputs * (outputs + inputs) for outputs, inputs in sizes]
    return tuple(each / sum(work) for each in work)


class _BlockRun:
    """The state of a block while it is pruned."""

    def __init__(
        self, decoder: Decoder, task: BlockTask, on_event: Callable[[Event], None], executor: LayerExecutor
    ) -> None:
        self.decoder, self.task, self.on_event, self.executor = decoder, task, on_event, executor
        self.layers: list[LayerReport] = []
        self.recovered: list[RecoveredPart] = []
        self.zeros = self.due = self.most_zeros = 0
        self.floor_seconds = 0.0

    def result(self) -> BlockResult:
        """Return the result of the block."""
        index, decoder = self.task.index, self.decoder
        done = tuple(self.layers), tuple(self.recovered), self.zeros, self.due, self.most_zeros, self.floor_seconds
        record = BlockRecord(index, decoder.shape(index), *done)
        return BlockResult(record, decoder.weights(index), self.task.path)

    def visit(self) -> None:
        """Prune the block stage by stage, and move the path on to the next block."""
        with self.entered() as visit:
            self.begin()
            for stage in self.task.block.stages:
                self.solve(stage, visit)
        self.floor_seconds += visit.floor_seconds

    def problem(self, path: str) -> Problem:
        """Return the problem of a layer, after solving the stages before its own."""
        visit = self.entered()
        self.begin()
        for stage in self.task.block.stages:
            for target in stage.targets:
                if target.path == path:
                    return stated_problem(self.layer_task(target), self.collect(stage, visit).moments[target.tap])
            self.solve(stage, visit)
        raise AssertionError(f"no stage of block {self.task.index} solves {path}")

    def entered(self) -> Visit:
        """Return the visit of the block."""
        task = self.task
        return task.path.visit(
            self.decoder.blocks[task.index],
            held_out=task.held_out,
            cut=bool(task.block.removed) or task.block.fewer_experts,
            detached=task.detached,
            calls=self.wanted(),
            known=task.known,
        )

    def begin(self) -> None:
        """Remove sub-blocks and experts."""
        self.remove_parts()
        if self.task.block.fewer_experts:
            self.choose_experts()

    def collect(self, stage: Stage, visit: Visit) -> Collected:
        """Return the moments of the inputs of a stage."""
        return visit.collect(stage.taps, stage.touched)

    def solve(self, stage: Stage, visit: Visit) -> None:
        """Solve and write the layers of a stage, and recover the sub-modules that it completes."""
        collected = self.collect(stage, visit)
        self.executor.solve([self.layer_task(target) for target in stage.targets], collected, self.take)
        del collected
        for place in stage.recovered:
            self.recover(place, visit.calls(place))

    def wanted(self) -> Wanted:
        """Return the batches on which recovery needs calls: the first up to its tokens, and those held out."""
        step = self.task.method.recovery
        return Wanted(math.inf if step is None or step.tokens is None else step.tokens, self.task.held_out)

    def remove_parts(self) -> None:
        """Remove whole sub-blocks."""
        for part in self.task.block.removed:
            self.decoder.remove(self.task.index, part)

    def choose_experts(self) -> None:
        """Remove whole experts, chosen by the inputs of the mixture."""
        decoder, task = self.decoder, self.task
        calls = mixture_calls(decoder, task.index, task.path.actual)
        fit, apart = calls.split(task.held_out)
        report = remove_experts(decoder, task.index, task.block.wanted.shape.experts, task.method, fit, apart)
        self.layers.append(report)
        self.on_event(LayerSolved(report))
        recovery = task.method.recovery
        if recovery is not None:
            from optprune.pruning.expert_recovery import recover_experts

            some = fit if recovery.tokens is None else fit.first(recovery.tokens)
            part = recover_experts(
                decoder,
                task.index,
                some,
                apart,
                rounds=recovery.rounds,
                damping=recovery.damping,
                dtype=self.stored_dtype,
            )
            self.recovered.append(part)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype in which weights will be stored, where the block is computed in another one."""
        return None if self.decoder.computes_in is None else self.decoder.model.dtype

    def layer_task(self, target: Target) -> LayerTask:
        """Return the task of one layer."""
        task = self.task
        return LayerTask(self.decoder, task.index, target, task.block.wanted, task.method, task.metrics)

    def take(self, layer: LayerTask, solved: SolvedLayer) -> None:
        """Write the answer of one layer and record it."""
        pruned = write_layer(layer, solved)
        self.layers.append(pruned.report)
        self.zeros += pruned.zeros
        self.due += pruned.due
        self.most_zeros += pruned.most_zeros
        self.on_event(LayerSolved(pruned.report))

    def recover(self, path: str, calls: Calls) -> None:
        """Refit a sub-module whose layers are pruned."""
        from optprune.pruning.refinement import recover

        decoder, task, recovery = self.decoder, self.task, self.task.method.recovery
        assert recovery is not None
        layers = decoder.recoverable(task.index)[path]
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
            dtype=self.stored_dtype,
            name=decoder.name(task.index, path),
        )
        self.recovered.append(part)


FEW = 32
"""the number of tokens below which the statistics of an expert are unreliable"""


def remove_experts(decoder: Decoder, index: int, keep: int, method: Method, fit: Calls, apart: Calls) -> LayerReport:
    """Choose `keep` experts of a block by its calls, delete the others, and return the report.

    The choice uses the first tokens of `fit`, as many as `expert_choice` takes; the tokens of `apart` only measure it.
    """
    began, solver, mixture = time.perf_counter(), method.expert_solver.of_block(index), decoder.architecture.mixture
    assert mixture is not None
    name, problem = decoder.name(index, mixture.experts), expert_choice(decoder, index, fit, keep)
    found = choose_experts(problem, solver)
    held_out = None
    if apart.tokens:
        held_out = expert_choice(decoder, index, apart, keep).relative_error(found.kept)
    every = torch.ones_like(found.kept)
    reached = (problem.weights(every) > 0).sum(0)
    few = [f"{expert} ({int(count)})" for expert, count in enumerate(reached) if count < FEW]
    notes = (f"some experts get fewer than {FEW} calibration tokens: {', '.join(few[:4])}",) if few else ()
    if method.strict and notes:
        raise StrictError(f"{name}: {notes[0]} (strict mode makes this an error)")
    decoder.keep_experts(index, found.kept)
    return LayerReport(
        name=name,
        kind=problem.kind,
        solver=solver.label,
        relative_error=problem.relative_error(found.kept),
        held_out_error=held_out,
        status="converged",
        objective=found.objective,
        lower_bound=found.lower_bound,
        gap=None if found.lower_bound is None else 0.0,
        damping=0.0,
        tokens=problem.tokens,
        seconds=time.perf_counter() - began,
        kept=keep,
        units=problem.experts,
        dead_inputs=int((reached == 0).sum()),
        notes=notes,
    )


HOST = torch.device("cpu")
Value = TypeVar("Value")


@dataclass(frozen=True)
class WorkerContext:
    """The model without its blocks' weights and the settings of the computation, sent once to each worker."""

    config: bytes
    """the config of the model, pickled"""
    dtype: torch.dtype
    precise: bool
    """whether to compute in float32 where the dtype is of half precision"""
    device: str
    """cpu, or cuda for the worker's own GPU"""
    threads: int
    """the threads of each worker, as many as in a run without workers, because the number changes rounding"""
    facts: str
    """versions and machine, which decide how sums are rounded"""

    @classmethod
    def of(cls, decoder: Decoder) -> "WorkerContext":
        """Return the context for a model's blocks."""
        model = decoder.model
        facts = json.dumps({"the version": versions(), "the machine": machine(model.device)})
        threads = torch.get_num_threads()
        precise = decoder.computes_in is not None
        return cls(pickle.dumps(model.config), model.dtype, precise, model.device.type, threads, facts)


@dataclass(frozen=True, eq=False)
class BlockJob:
    """Everything that decides the result of one block."""

    task: BlockTask
    shape: BlockShape
    weights: dict[str, Tensor]
    """the parameters of the dense block, by their names inside it"""

    @classmethod
    def of(cls, decoder: Decoder, task: BlockTask) -> "BlockJob":
        """Return the job of pruning a block that is in memory, with copies of its tensors on the host."""
        index = task.index
        return cls(task, decoder.shape(index), decoder.weights(index)).on(HOST)

    def on(self, device: torch.device) -> "BlockJob":
        """Return the job with its tensors on another device."""
        task, path = self.task, self.task.path
        actual = _entering(path.actual, device)
        dense = actual if path.dense is path.actual else _entering(path.dense, device)
        metrics = {name: metric.to(device) for name, metric in task.metrics.items()}
        there = replace(task, path=Path(path.policy, actual, dense), metrics=metrics)
        return BlockJob(there, self.shape, moved(self.weights, device))


@dataclass(frozen=True, eq=False)
class BlockOutcome:
    """The result of a block, on the host."""

    record: BlockRecord
    weights: dict[str, Tensor]
    events: tuple[Event, ...]
    """the events of the block, except its start"""


def run_job(context: WorkerContext, job: BlockJob) -> BlockOutcome | OptpruneError:
    """Prune a job's block in a worker; return the outcome, or the OptpruneError that stopped it."""
    try:
        decoder, device, index = _decoder(context), torch.device(context.device), job.task.index
        job, events = job.on(device), list[Event]()
        dense = decoder.blocks[index]
        decoder.blocks[index] = copy.deepcopy(dense)  # a description without weights
        try:
            decoder.put(index, job.shape, job.weights)
            with calibrating(decoder):
                result = prune_block(decoder, job.task, events.append)
            later = tuple(event for event in events if not isinstance(event, BlockStarted))
            return BlockOutcome(result.record, moved(result.weights, HOST), later)
        finally:
            decoder.blocks[index] = dense
            release()
    except OptpruneError as error:
        return error


@lru_cache(maxsize=1)
def _decoder(context: WorkerContext) -> Decoder:
    """Return the skeleton that a worker fills one block of at a time; InputError where it would round differently."""
    torch.set_num_threads(context.threads)
    here = {"the version": versions(), "the machine": machine(torch.device(context.device))}
    for what, expected, found in differences(json.loads(context.facts), json.loads(json.dumps(here))):
        raise InputError(
            f"a worker would round differently: {what} is {shown(expected)} here and {shown(found)} there; use the "
            "same software and the same kind of machine for all workers and for the command"
        )
    decoder = Decoder(skeleton(pickle.loads(context.config), context.dtype).eval())
    return decoder.precise() if context.precise else decoder


def _entering(stream: Stream, device: torch.device) -> Stream:
    """Return the inputs of the current block on a device; batches of one shape still share their arguments."""
    arguments = {id(one): one for one in stream.arguments}
    there = {key: moved(one, device) for key, one in arguments.items()}
    hidden = States(OnDevice(), (moved(batch, device) for batch in stream.hidden))
    return Stream(hidden, [[there[id(one)]] for one in stream.arguments], share=stream.share)


def moved(value: Value, device: torch.device) -> Value:
    """Return a nested value with its tensors on another device, each with memory of its own (views pickle whole)."""
    found: Any = value
    if isinstance(value, Tensor):
        found = value.detach().to(device)
        if found.untyped_storage().nbytes() > found.nbytes:
            found = found.clone()
    elif isinstance(value, Mapping):
        found = {name: moved(part, device) for name, part in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(moved(part, device) for part in value)
    return found
