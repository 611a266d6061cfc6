"""Room: free memory and disk, and the refusal of a run that cannot fit, with options that would."""

import os
import shutil
from collections.abc import Iterable, Iterator
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
from optprune.program.plan import planned_memory
from optprune.program.program import Program
from optprune.system.wording import amount, either

FEWEST = 8
"""the fewest sequences that a refusal proposes"""
SHORTEST = 128
"""the shortest sequences that a refusal proposes"""
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
    def measured(cls, device: torch.device, output: Path, begun: Path | None = None) -> "Room":
        """Return the present room of a device and of the disk of an output.

        The files of a run that was `begun` in a folder are part of what its plan counts, so they count as free.
        """
        held = held_bytes()
        there = [file.stat().st_size for file in begun.iterdir() if file.is_file()] if begun and begun.is_dir() else []
        free = free_memory()
        gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        return cls(
            None if free is None else held + free,
            _of_process(held),
            gpu,
            shutil.disk_usage(existing_folder(output)).free + sum(there),
        )

    @classmethod
    def here(cls, device: str, output: Path) -> "Room":
        """Return the present room for a kind of device; nothing is known where this machine has no such device."""
        if device != "cpu" and not torch.cuda.is_available():
            return cls()
        return cls.measured(torch.device(device), output)


def placed(program: Program, room: Room) -> Program:
    """Return the program with the place of hidden states that the plan decides, where the request leaves it open.

    It is the first of device, host and disk with which the plan fits; where none does, the one that lacks least.
    """
    if program.request.states != "auto":
        return program
    return min((_with_states(program, name) for name in _places(program)), key=lambda one: _shortfall(one, room))


def _places(program: Program) -> tuple[str, ...]:
    """Return the places of hidden states; the memory of the host is that of the device where the CPU computes."""
    return ("device", "disk") if program.request.device == "cpu" else ("device", "host", "disk")


def check_room(program: Program, room: Room) -> str:
    """Return a line on the peak of memory of a run; InputError, with options that fit, where it cannot fit."""
    said = refusal(program, room)
    if said is not None:
        raise InputError(f"{said} (--no-plan begins all the same; a plan is within a fifth of what runs take)")
    chosen = placed(program, room)
    plan = planned_memory(chosen)
    parts = [(plan.host_bytes, "memory"), (plan.device_bytes, "the GPU"), (plan.disk_bytes, "the disk")]
    told = ", ".join(f"{amount(bytes)} of {what}" for bytes, what in parts if bytes)
    return f"planned: at most {told}{_moved(program, chosen, room)} (optprune plan tells more, and the time)"


def refusal(program: Program, room: Room) -> str | None:
    """Return what a run lacks, and the options with which its plan fits; None where it fits as it is."""
    chosen = placed(program, room)
    lacking = _lacking(chosen, room)
    if lacking is None or lacking.there is None:
        return None
    largest = max(lacking.parts, key=lambda name: lacking.parts[name])
    fitting = _fitting(program, room, lacking.what)
    return (
        f"the run needs {amount(lacking.needed)} of {lacking.what} in the phase {lacking.phase}, the most of it for "
        f"the {largest} ({amount(lacking.parts[largest])}), and {amount(lacking.there)} are there: "
        f"{either(fitting) if fitting else 'use a machine with more'}"
    )


def _fitting(program: Program, room: Room, what: str) -> list[str]:
    """Return each option with which the plan fits, with what it needs of a resource then; else one pair of options."""
    options = [list(variants) for variants in alternatives(program)]
    alone = [words for variants in options if (words := _first_fitting(variants, room, what))]
    if alone:
        return alone
    smallest = [variants[-1] for variants in options if variants]
    further = [(words, list(variants)) for words, one in smallest for variants in alternatives(one)]
    pairs = [(f"{words} {more}", one) for words, variants in further for more, one in variants[-1:]]
    both = _first_fitting(pairs, room, what)
    return [both] if both else []


def _first_fitting(variants: Iterable[tuple[str, Program]], room: Room, what: str) -> str:
    """Return the first request whose plan fits, with what it needs; an empty text where none fits."""
    for words, asked in variants:
        other = placed(asked, room)
        if _lacking(other, room) is None:
            return f"with {words} it needs {amount(_needs(other, room)[what].needed)}"
    return ""


@dataclass(frozen=True)
class _Need:
    """The peak of one resource."""

    what: str
    needed: int
    there: int | None
    """None where the system does not say"""
    parts: dict[str, int]
    phase: str


def _needs(program: Program, room: Room) -> dict[str, _Need]:
    """Return the peak of every resource, in bytes, by its name."""
    phases = planned_memory(program).phases
    # The process that reloads and those that work have a limit of their own.
    alone = [phase for phase in phases if phase.name != "checking" and program.workers == 1]
    kinds = [
        ("memory", room.host, phases, HOST),
        ("the memory that a process may have (ulimit -v)", room.process, alone, HOST),
        ("the GPU's memory", room.device, phases, DEVICE),
        ("the disk", room.disk, phases, DISK),
    ]
    found: dict[str, _Need] = {}
    for what, there, counted, place in kinds:
        made_of = [(sum(phase.by_place[place].values()), phase.by_place[place], phase.name) for phase in counted]
        needed, parts, name = max(made_of, key=itemgetter(0), default=(0, {}, ""))
        found[what] = _Need(what, needed, there, parts, name)
    return found


def _lacking(program: Program, room: Room) -> "_Need | None":
    """Return the first resource that falls short, by however little; None where all suffice."""
    each = _needs(program, room).values()
    return next((one for one in each if one.there is not None and one.needed > one.there), None)


def _shortfall(program: Program, room: Room) -> float:
    """Return the largest share by which a resource falls short; 0 where all suffice."""
    each = _needs(program, room).values()
    return max(0.0, *(one.needed / max(1, one.there) - 1 for one in each if one.there is not None), 0.0)


def saved_by_host(program: Program) -> int | None:
    """Return the bytes of the GPU that a run needs if hidden states are kept on the host; None if that is no less."""
    plans = [planned_memory(one).device_bytes for one in (program, _with_states(program, "host"))]
    return plans[1] if plans[1] < plans[0] else None


def _moved(program: Program, chosen: Program, room: Room) -> str:
    """Return words on hidden states that the plan keeps elsewhere than on the device; an empty text otherwise."""
    if chosen.request.states in (program.request.states, "device"):
        return ""
    short = _lacking(_with_states(program, "device"), room)
    why = "" if short is None else f", because they would need {amount(short.needed)} of {short.what} on the device"
    return f"; hidden states are kept on the {chosen.request.states}{why}"


def _asked(program: Program, **changes: Any) -> Program:
    return replace(program, request=replace(program.request, **changes))


def _with_states(program: Program, name: str) -> Program:
    """Return the program with another place of hidden states, which does not change the stages of its blocks."""
    found = _asked(program, states=name)
    vars(found)["example"] = program.example
    return found


def alternatives(program: Program) -> Iterator[Iterator[tuple[str, Program]]]:
    """Yield, for each option that may take less, the requests with it, the nearest first, each with its words."""
    request = program.request
    if request.states != "auto":
        places = [name for name in _places(program) if name != request.states]
        yield ((f"--states {name}", _with_states(program, name)) for name in places)
    if request.workers > 1:
        yield iter([("--workers 1", _asked(program, workers=1))])
    yield ((f"--generated {few}", _asked(program, generated=few)) for few in _fewer(request.generated // 4, 4, FEWEST))
    yield (
        (f"--samples {few}", _asked(program, samples=few, lengths=request.lengths[:few]))
        for few in _fewer(request.samples // 2, 2, FEWEST)
        if holds_out_text(few, request.generated, program.held_out)
    )
    if not request.lengths:
        lengths = _fewer(request.seq_length // 2, 2, SHORTEST)
        yield ((f"--seq-length {length}", _asked(program, seq_length=length)) for length in lengths)
    if request.dtype == torch.float32:
        yield iter([("--dtype bfloat16", _asked(program, dtype=torch.bfloat16))])
    if program.streams > 1 or program.keeps_original:
        alone = replace(request, workers=1)
        yield iter([("--propagation pruned", replace(program, request=alone, policy=POLICIES["pruned"]))])
    if program.metric is not None and program.metric.kind == "full":
        metric = program.metric.model_copy(update={"kind": "diagonal"})
        yield iter([("--set metric=diagonal", replace(program, metric=metric))])
    smaller = request.recipe.vocabulary
    if smaller is not None and smaller.tokens > FEWEST_TOKENS:
        fields = {"vocabulary": smaller.model_copy(update={"tokens": FEWEST_TOKENS})}
        recipe = request.recipe.model_copy(update=fields)
        yield iter([(f"--set vocabulary.tokens={FEWEST_TOKENS}", _asked(program, recipe=recipe))])


def _fewer(count: int, divisor: int, least: int) -> Iterator[int]:
    """Yield ever smaller counts, down to the least."""
    while count >= least:
        yield count
        count //= divisor


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
