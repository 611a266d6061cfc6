"""The plan of a run: memory, disk and time of each phase, before it begins."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from optprune.measure.memory import held_bytes
from optprune.program.memory import DEVICE, DISK, HOST, PHASES, RELOADING, Part, parts_of
from optprune.program.program import Program
from optprune.report.phases import CHOOSING, GENERATING, VOCABULARY

FIRST_USE = 32 * 2**20
"""bytes that libraries allocate on first use, such as the buffers of matrix products"""


@dataclass(frozen=True)
class PlannedPhase:
    """Planned phase of a run: its seconds and its peak of memory."""

    name: str
    """loading, choosing, tokenising, generating, vocabulary, metric, budget, pruning, saving or checking"""
    seconds: float | None
    """None where nothing was measured"""
    host_bytes: int
    """the memory of this machine: of the command and of all processes that it starts"""
    device_bytes: int
    """the memory of the GPU; 0 where the CPU computes"""
    disk_bytes: int
    """bytes on the disk beside the source model"""
    parts: dict[str, int]
    """bytes of memory by part; disk parts are left out"""
    by_place: dict[str, dict[str, int]] = field(default_factory=dict)
    """the same for each place by itself: host, device and disk"""


@dataclass(frozen=True)
class Plan:
    """Plan of a run: the peaks over its phases, and the sum of their times."""

    phases: tuple[PlannedPhase, ...]
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float | None
    guessed: tuple[str, ...] = ()
    """the kinds of work whose time was not measured, because that would have taken too much of the run's"""

    @classmethod
    def of(cls, phases: Sequence[PlannedPhase], guessed: tuple[str, ...] = ()) -> "Plan":
        """Return the plan of these phases."""
        times = [phase.seconds for phase in phases if phase.seconds is not None]
        return cls(
            tuple(phases),
            max(phase.device_bytes for phase in phases),
            max(phase.host_bytes for phase in phases),
            max(phase.disk_bytes for phase in phases),
            sum(times) if times else None,
            guessed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)


def planned_memory(program: Program, base: int | None = None, fresh: int = RELOADING) -> Plan:
    """Return the plan without times, from shapes alone.

    `base` is what the process has with its imports, in bytes: without, what this one has now. `fresh` is what another
    one has for itself with its own.
    """
    base = held_bytes() if base is None else base
    base += FIRST_USE
    fresh += FIRST_USE
    optional = {
        CHOOSING: program.request.recipe.vocabulary,
        GENERATING: program.request.generated,
        VOCABULARY: program.vocabulary_work.flops,
    }
    names = [name for name in PHASES if optional.get(name, True)]
    return Plan.of([_phase(program, name, parts_of(program, name, base, fresh)) for name in names])


def _phase(program: Program, name: str, parts: list[Part]) -> PlannedPhase:
    here = program.request.device == "cpu"
    named: dict[str, int] = {}
    places: dict[str, dict[str, int]] = {HOST: {}, DEVICE: {}, DISK: {}}
    for part in parts:
        where = places[HOST if here and part.where == DEVICE else part.where]
        for found in (where, *([named] if part.where != DISK else [])):
            if part.bytes:
                found[part.name] = found.get(part.name, 0) + part.bytes
    host, device, disk = (sum(places[where].values()) for where in (HOST, DEVICE, DISK))
    return PlannedPhase(name, None, host, device, disk, named, places)
