"""Room: free memory and disk, and the refusal of a run that cannot fit, with options that would."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from optprune.calibration import POLICIES
from optprune.calibration.generated import holds_out_text
from optprune.errors import InputError
from optprune.measure.memory import free_memory, held_bytes
from optprune.program.memory import DEVICE, DISK, HOST
from optprune.program.plan import MARGIN, Plan, planned_memory
from optprune.program.program import Program
from optprune.system.wording import amount

FEWEST = 8
"""the fewest sequences that a refusal proposes"""
FEWEST_TOKENS = 8192
"""the least number of tokens that a smaller vocabulary is proposed to be refitted on"""


@dataclass(frozen=True)
class Room:
    """Bytes that a run may use, including those of this process; None where the system does not say."""

    host: int | None = None
    """the memory of this machine"""
    process: int | None = None
    """the memory of one process, by its limit (ulimit -v)"""
    device: int | None = None
    """the memory of the GPU"""
    disk: int | None = None
    """the disk of the output"""

    @classmethod
    def measured(cls, device: torch.device, output: Path) -> "Room":
        """Return the present room of a device and of the disk of an output."""
        held = held_bytes()
        free = free_memory()
        gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        return cls(
            None if free is None else held + free,
            _of_process(held),
            gpu,
            shutil.disk_usage(existing_folder(output)).free,
        )


def check_room(program: Program, room: Room) -> str:
    """Return a line on the peak of memory of a run; InputError, with options that fit, where it cannot fit."""
    plan = planned_memory(program)
    lacking = _lacking(plan, program, room)
    if lacking is None:
        parts = [(plan.host_bytes, "memory"), (plan.device_bytes, "the GPU"), (plan.disk_bytes, "the disk")]
        told = ", ".join(f"{amount(bytes)} of {what}" for bytes, what in parts if bytes)
        return f"planned: at most {told} (optprune plan tells more, and the time)"
    what, needed, there, parts, phase = lacking
    largest = max(parts, key=lambda name: parts[name])
    fitting = [words for words, other in alternatives(program) if _lacking(planned_memory(other), other, room) is None]
    advice = f"{' or '.join(fitting)} would fit" if fitting else "use a machine with more"
    raise InputError(
        f"the run would take {amount(needed)} of {what} in the phase {phase}, the most of it for the {largest} "
        f"({amount(parts[largest])}), and {amount(there)} are there: {advice} (--no-plan begins all the same)"
    )


def _lacking(plan: Plan, program: Program, room: Room) -> tuple[str, int, int, dict[str, int], str] | None:
    """Return the lacking resource: its name, the bytes needed and free, the part and the phase; None if all fit."""
    # The process that reloads and those that work have a limit of their own.
    alone = [phase for phase in plan.phases if phase.name != "checking" and program.workers == 1]
    kinds = [
        ("memory", room.host, plan.phases, HOST),
        ("the memory that a process may have (ulimit -v)", room.process, alone, HOST),
        ("the GPU's memory", room.device, plan.phases, DEVICE),
        ("the disk", room.disk, plan.phases, DISK),
    ]
    for what, there, phases, place in kinds:
        made_of = [(sum(phase.by_place[place].values()), phase.by_place[place], phase.name) for phase in phases]
        needed, parts, name = max(made_of, key=itemgetter(0), default=(0, {}, ""))
        if there is not None and needed > MARGIN * there:
            return what, needed, there, parts, name
    return None


def alternatives(program: Program) -> Iterator[tuple[str, Program]]:
    """Yield requests that take less, each with the option for it."""

    def asked(**changes: Any) -> Program:
        return replace(program, request=replace(request, **changes))

    request = program.request
    if request.states != "disk":
        yield "--states disk", asked(states="disk")
    if request.workers > 1:
        yield "--workers 1", asked(workers=1)
    fewer = request.generated // 4
    while fewer >= FEWEST:
        yield f"--generated {fewer}", asked(generated=fewer)
        fewer //= 4
    fewer = request.samples // 2
    while fewer >= FEWEST and holds_out_text(fewer, request.generated, program.held_out):
        yield f"--samples {fewer}", asked(samples=fewer, lengths=request.lengths[:fewer])
        fewer //= 4
    if program.streams > 1 or program.keeps_original:
        alone = replace(request, workers=1)
        yield "--propagation pruned", replace(program, request=alone, policy=POLICIES["pruned"])
    if program.metric is not None and program.metric.kind == "full":
        metric = program.metric.model_copy(update={"kind": "diagonal"})
        yield "--set metric=diagonal", replace(program, metric=metric)
    smaller = request.recipe.vocabulary
    if smaller is not None and smaller.tokens > FEWEST_TOKENS:
        fields = {"vocabulary": smaller.model_copy(update={"tokens": FEWEST_TOKENS})}
        yield f"--set vocabulary.tokens={FEWEST_TOKENS}", asked(recipe=request.recipe.model_copy(update=fields))


def _of_process(held: int) -> int | None:
    """Return the bytes that the address limit of this process allows, of which many are never backed by memory."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        if limit != resource.RLIM_INFINITY:
            return max(0, limit - pages * os.sysconf("SC_PAGE_SIZE")) + held
    return None


def existing_folder(place: Path) -> Path:
    """Return the folder of an output, or the nearest existing parent."""
    place = Path(os.path.realpath(place))
    while not place.is_dir():
        place = place.parent
    return place
