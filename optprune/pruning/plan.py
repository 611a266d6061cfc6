"""A plan: the memory and the time of a run, phase by phase, before it is begun."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optprune.allocation import Allocation
from optprune.errors import InputError
from optprune.measure.memory import free_memory, held_bytes
from optprune.models import (
    DTYPES,
    Decoder,
    has_weights,
    load_config,
    load_model,
    load_shapes,
    open_model,
    stored_dtype,
)
from optprune.models.skeleton import one_block_model
from optprune.pruning.block_probe import BlockProbe, probe_batches
from optprune.pruning.plan_memory import DEVICE, DISK, HOST, PHASES, RELOADING, Part, parts_of
from optprune.pruning.plan_time import Surroundings, seconds_of
from optprune.pruning.preflight import check_run
from optprune.pruning.workload import MAX_SHARD, Workload
from optprune.recipe import Recipe
from optprune.system.wording import amount

MARGIN = 1.25
"""what is planned is refused where it is more than so many times what there is: it is right within a fifth"""
FIRST_USE = 32 * 2**20
"""what libraries take for themselves with their first use, such as the buffers of matrix products"""


@dataclass(frozen=True)
class PlannedPhase:
    """A phase of a run: how long it takes, and the most memory that it takes."""

    name: str
    """loading, tokenising, metric, budget, pruning, saving or checking"""
    seconds: float | None
    """None where nothing was measured"""
    host_bytes: int
    """the memory of this machine: of the command and of all processes that it starts"""
    device_bytes: int
    """the memory of the GPU; 0 where the CPU computes"""
    disk_bytes: int
    """what is on the disk beside the model that is read"""
    parts: dict[str, int]
    """what the memory, not the disk, is made of, in bytes"""
    by_place: dict[str, dict[str, int]] = field(default_factory=dict)
    """the same for each place by itself: host, device and disk"""


@dataclass(frozen=True)
class Plan:
    """What a run takes: the peaks over its phases, and the sum of their times."""

    phases: tuple[PlannedPhase, ...]
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float | None

    @classmethod
    def of(cls, phases: Sequence[PlannedPhase]) -> "Plan":
        """The plan of these phases."""
        times = [phase.seconds for phase in phases if phase.seconds is not None]
        return cls(
            tuple(phases),
            max(phase.device_bytes for phase in phases),
            max(phase.host_bytes for phase in phases),
            max(phase.disk_bytes for phase in phases),
            sum(times) if times else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self)


def planned_memory(work: Workload, base: int | None = None, fresh: int = RELOADING) -> Plan:
    """The plan without times, from shapes alone.

    `base` is what the process has with its imports, in bytes: without, what this one has now. `fresh` is what another
    one has for itself with its own.
    """
    base = held_bytes() if base is None else base
    base += FIRST_USE
    fresh += FIRST_USE
    return Plan.of([_phase(work, name, parts_of(work, name, base, fresh)) for name in PHASES])


def _phase(work: Workload, name: str, parts: list[Part]) -> PlannedPhase:
    here = work.device == "cpu"
    named: dict[str, int] = {}
    places: dict[str, dict[str, int]] = {HOST: {}, DEVICE: {}, DISK: {}}
    for part in parts:
        where = places[HOST if here and part.where == DEVICE else part.where]
        for found in (where, *([named] if part.where != DISK else [])):
            if part.bytes:
                found[part.name] = found.get(part.name, 0) + part.bytes
    host, device, disk = (sum(places[where].values()) for where in (HOST, DEVICE, DISK))
    return PlannedPhase(name, None, host, device, disk, named, places)


@dataclass(frozen=True)
class Measuring:
    """What a plan's times are measured with."""

    tokens: Tensor | None = None
    """the calibration text's first tokens, in a row; without, tokens are drawn"""
    tokenising: float = 0.0
    """the seconds that the whole text takes"""
    starting: float | None = None
    """the seconds that the command takes to start; None is what another process takes"""
    place: Path | None = None
    """the folder on whose disk the output will be; None is that of temporary files"""


def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    samples: int = 128,
    seq_length: int = 2048,
    device: str = "auto",
    dtype: str = "auto",
    allocation: Allocation | None = None,
    workers: int = 1,
    measuring: Measuring | None = Measuring(),
) -> Plan:
    """The memory and the time of pruning a model source by a recipe, as the command `prune` does it.

    Memory is from shapes alone, so that of a folder config.json is enough. Times are those of a probe: the recipe's own
    code on one block, its weights read or, where there are none, drawn, and a few of the tokens; without `measuring`
    there are none, and the device need not be there. InputError where the model cannot be pruned so, or where the probe
    needs far more memory than is free.
    """
    source = str(source)
    shapes = load_shapes(source, load_config(source))
    check_run(shapes, recipe, allocation)
    work = workload_of(
        source,
        shapes,
        recipe,
        samples=samples,
        seq_length=seq_length,
        device=device,
        dtype=dtype,
        allocation=allocation,
        workers=workers,
    )
    return timed(work, source, measuring) if measuring is not None else planned_memory(work)


def timed(work: Workload, source: str, measuring: Measuring) -> Plan:
    """The plan with times, measured on this machine in about the time of one block."""
    base, count = held_bytes(), probe_batches(work)
    _check_probe_fits(work, count, base)
    around = Surroundings.measured(measuring.place)
    decoder, opening = _opened(work, source)
    index = work.largest if len(decoder.blocks) == work.blocks else 0
    batches = _batches(work, measuring.tokens, count)
    pace = BlockProbe(work, decoder, batches, index).pace()
    starting = around.start if measuring.starting is None else measuring.starting
    seconds = seconds_of(work, pace, around, opening=opening, tokenising=measuring.tokenising, starting=starting)
    plan = planned_memory(work, base, around.fresh)
    return Plan.of([replace(phase, seconds=seconds[phase.name]) for phase in plan.phases])


def _check_probe_fits(work: Workload, batches: int, base: int) -> None:
    """Raise InputError where one block and a few batches take more memory than is free by far, from shapes alone."""
    free = free_memory()
    probed = replace(work, samples=min(work.samples, batches * (work.batch_tokens // work.length)), workers=1, layers=1)
    needed = (
        next(phase.host_bytes for phase in planned_memory(probed, base, 0).phases if phase.name == "pruning") - base
    )
    if free is not None and needed > MARGIN * free:
        raise InputError(
            f"measuring one block takes {amount(needed)} of memory, and {amount(free)} are free: --no-probe tells the "
            "memory of the run without its times"
        )


def _opened(work: Workload, source: str) -> tuple[Decoder, float]:
    """The model, or one block of random weights in its shape where there is a config only, and the seconds it took."""
    dtype = {known: name for name, known in DTYPES.items()}.get(work.dtype, "auto")
    began = time.perf_counter()
    device = torch.device(work.device)
    if has_weights(source):
        open_it = load_model if work.whole else open_model
        decoder = open_it(source, dtype=dtype, device=work.device).decoder()
    else:
        decoder = Decoder(one_block_model(work.decoder.model.config, work.dtype, device))
    return decoder, time.perf_counter() - began


def _batches(work: Workload, tokens: Tensor | None, count: int) -> list[Tensor]:
    """Some batches such as the run will have."""
    rows = work.batch_tokens // work.length
    needed = min(count * rows, work.samples)
    if tokens is None or len(tokens) < needed * work.length:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, work.vocabulary, (needed * work.length,), generator=generator)
    return list(tokens[: needed * work.length].view(needed, work.length).split(rows))


def workload_of(
    source: str,
    shapes: Decoder,
    recipe: Recipe,
    *,
    samples: int,
    seq_length: int,
    device: str = "auto",
    dtype: str = "auto",
    allocation: Allocation | None = None,
    workers: int = 1,
    ray: bool = False,
    max_shard: int = MAX_SHARD,
    states: str = "auto",
) -> Workload:
    """What a run of the command on a model source will be; of its `shapes`, no weight is read."""
    floats, recipe = stored_dtype(source, shapes.model.config, dtype) or torch.float32, recipe.settled()
    of_blocks = ray or recipe.policy.independent
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return Workload(
        shapes,
        recipe,
        samples,
        seq_length,
        floats,
        "cuda" if gpu else "cpu",
        max(1, torch.cuda.device_count()) if gpu else 1,
        workers if of_blocks else 1,
        1 if of_blocks else workers,
        ray,
        allocation=allocation,
        max_shard=max_shard,
        states=states,
    )
