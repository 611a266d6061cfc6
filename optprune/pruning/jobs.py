"""An job: one block's task as it travels to a worker, and what comes back."""

import copy
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from optprune.calibration import Path, Stream, calibrating
from optprune.errors import InputError, OptpruneError
from optprune.measure.memory import release
from optprune.models import BlockShape, Decoder
from optprune.models.places import OnDevice, States
from optprune.models.skeleton import skeleton
from optprune.pruning.block import BlockRecord, BlockTask, prune_block
from optprune.report import BlockStarted, Event
from optprune.system.environment import differences, machine, versions
from optprune.system.wording import shown

HOST = torch.device("cpu")
Value = TypeVar("Value")


@dataclass(frozen=True)
class WorkerContext:
    """What a worker needs once: the model without its blocks' weights, and how it is to compute."""

    config: bytes
    """the config of the model, as one of our processes executor it to another"""
    dtype: torch.dtype
    precise: bool
    """whether it is computed in float32 where that is half precision"""
    device: str
    """cpu, or cuda: the GPU that the worker has been given"""
    threads: int
    """the threads of each worker, as many as a run without workers has: an eigh of two threads rounds otherwise"""
    facts: str
    """what else decides how sums are rounded"""

    @classmethod
    def of(cls, decoder: Decoder) -> "WorkerContext":
        """The context for a model's blocks."""
        model = decoder.model
        facts = json.dumps({"the version": versions(), "the machine": machine(model.device)})
        threads = torch.get_num_threads()
        precise = decoder.computes_in is not None
        return cls(pickle.dumps(model.config), model.dtype, precise, model.device.type, threads, facts)


@dataclass(frozen=True, eq=False)
class BlockJob:
    """All that decides what becomes of one block."""

    task: BlockTask
    shape: BlockShape
    weights: dict[str, Tensor]
    """the parameters of the dense block, by their names inside it"""

    @classmethod
    def of(cls, decoder: Decoder, task: BlockTask) -> "BlockJob":
        """To prune a block, which is in memory, as it is now; what the task holds is copied to the host."""
        index = task.index
        return cls(task, decoder.shape(index), decoder.weights(index)).on(HOST)

    def on(self, device: torch.device) -> "BlockJob":
        """The same with its tensors on another device."""
        task, path = self.task, self.task.path
        actual = _entering(path.actual, device)
        dense = actual if path.dense is path.actual else _entering(path.dense, device)
        metrics = {name: metric.to(device) for name, metric in task.metrics.items()}
        there = replace(task, path=Path(path.policy, actual, dense), metrics=metrics)
        return BlockJob(there, self.shape, moved(self.weights, device))


@dataclass(frozen=True, eq=False)
class BlockOutcome:
    """What became of a block, on the host."""

    record: BlockRecord
    weights: dict[str, Tensor]
    events: tuple[Event, ...]
    """what was told on the way"""


def run_job(context: WorkerContext, job: BlockJob) -> BlockOutcome | OptpruneError:
    """What a worker does: the outcome, or the error of ours that stopped it."""
    try:
        decoder, device, index = _decoder(context), torch.device(context.device), job.task.index
        job, events = job.on(device), list[Event]()
        dense = decoder.blocks[index]
        decoder.blocks[index] = copy.deepcopy(dense)  # which has no weights, so that this is a description only
        try:
            decoder.put(index, job.shape, job.weights)
            with calibrating(decoder):
                result = prune_block(decoder, job.task, events.append)
            told = tuple(event for event in events if not isinstance(event, BlockStarted))
            return BlockOutcome(result.record, moved(result.weights, HOST), told)
        finally:
            decoder.blocks[index] = dense
            release()
    except OptpruneError as error:
        return error


@lru_cache(maxsize=1)
def _decoder(context: WorkerContext) -> Decoder:
    """The skeleton that a worker fills one block of at a time; InputError where it would round otherwise."""
    torch.set_num_threads(context.threads)
    here = {"the version": versions(), "the machine": machine(torch.device(context.device))}
    for what, asked, found in differences(json.loads(context.facts), json.loads(json.dumps(here))):
        raise InputError(
            f"a worker would not give the bytes of this run: {what} is {shown(asked)} here and {shown(found)} there; "
            "have the same software and the same kind of machine for all workers and for the command itself"
        )
    decoder = Decoder(skeleton(pickle.loads(context.config), context.dtype).eval())
    return decoder.precise() if context.precise else decoder


def _entering(stream: Stream, device: torch.device) -> Stream:
    """What enters the current block, with no other block's arguments: batches of one shape go on sharing theirs."""
    arguments = {id(one): one for one in stream.arguments}
    there = {key: moved(one, device) for key, one in arguments.items()}
    hidden = States(OnDevice(), (moved(batch, device) for batch in stream.hidden))
    return Stream(hidden, [[there[id(one)]] for one in stream.arguments], share=stream.share)


def moved(value: Value, device: torch.device) -> Value:
    """The tensors of a nested value on another device, each with memory of its own: a view would travel whole."""
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
