"""The judge: what of a command's end, its words and the files around it is a fault."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.torture.children import Children, Told
from tests.helpers.torture.drawing import FAILED, Case
from tests.helpers.torture.runs import contents

MOST_SECONDS = 25.0
"""the processor time that one input may take"""
MOST_BYTES = 1 << 30
"""the memory that one input may take"""
LONGEST = 4100
"""the most characters of a sentence"""
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""what a terminal would obey"""
OF_LIBRARIES = re.compile(r"Warning: |^\[[WE]:|^\S+Error: |^Exception |^  File |Traceback", re.MULTILINE)
NOT_A_NUMBER = re.compile(r"\b(nan|inf)\b")
FREE = ("log", "plot")
"""files whose contents are not looked at"""


def judged(case: Case, told: Told, before: dict[bytes, Any], after: dict[bytes, Any], children: Children) -> list[str]:
    """The faults of a command, in words."""
    found = [*of_the_end(case, told), *of_words(told), *of_files(case, told, before, after)]
    if told.status in (0, 1) and not found:
        found += of_outputs(case, told, children)
    if told.status == FAILED:
        found += [f"the sentence does not name {word}" for word in case.named if word not in told.err]
    return found


def of_the_end(case: Case, told: Told) -> Iterator[str]:
    """How the command ended."""
    if told.hung:
        yield "it hung"
    elif told.status not in case.statuses:
        yield f"exit status {told.status}"
    if told.left:
        yield "a process was left behind"
    if told.seconds > MOST_SECONDS:
        yield f"it took {told.seconds:.0f} s of processor time"
    if told.bytes > MOST_BYTES:
        yield f"it took {told.bytes >> 20} MiB"


def of_words(told: Told) -> Iterator[str]:
    """What the command said."""
    for stream in (told.out, told.err):
        if found := OBEYED.search(stream):
            yield f"the terminal was sent {found.group()!r}"
    if found := OF_LIBRARIES.search(told.err):
        yield f"it said {told.err[found.start() : found.start() + 100]!r}"
    sentences = [line for line in told.err.splitlines() if line.startswith("error: ")]
    yield from of_a_failure(told, sentences) if told.status == FAILED else of_a_success(told, sentences)


def of_a_failure(told: Told, sentences: list[str]) -> Iterator[str]:
    """What a command said that failed: one sentence."""
    if len(sentences) != 1:
        yield f"it told {len(sentences)} errors"
    if any(word in told.err for word in ("(unexpected: ", "please report")):
        yield "the error was unexpected"
    if any(len(sentence) > LONGEST for sentence in sentences):
        yield "the sentence is too long"
    if told.out:
        yield "a command that failed wrote to its standard output"


def of_a_success(told: Told, sentences: list[str]) -> Iterator[str]:
    """What a command said that did not fail, or that a signal has ended."""
    if sentences:
        yield "it told an error, and did not fail"
    if told.status in (0, 1) and not told.out:
        yield "it said nothing"
    if found := NOT_A_NUMBER.search(told.out):
        yield f"it succeeded with {found.group()}"


def of_files(case: Case, told: Told, before: dict[bytes, Any], after: dict[bytes, Any]) -> Iterator[str]:
    """What became of the files around the command."""
    own = {os.fsencode(os.path.realpath(place)) for place in (case.output, *case.files) if place is not None}
    run = None if case.run is None else os.fsencode(os.path.realpath(case.run))
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path) or path.endswith(b"/in-use"):
            continue
        if case.whole is not None and run in parents(path) and stat.S_ISDIR((before.get(path) or after[path])[0]):
            continue  # the folders of a run of ours, of which the files are looked at
        how = "made" if path not in before else "deleted" if path not in after else "changed"
        within = {path, *parents(path)}
        if told.status == FAILED:
            kept = run in within and how == "made" and is_a_run(case, after, told)
            kept |= case.whole is not None and run in parents(path) and path.endswith(b"/run.json")
            if not kept:
                yield f"it failed, and {how} {os.fsdecode(path)}"
        elif Path(os.fsdecode(path)) in case.strays:
            yield f"it {how} {os.fsdecode(path)}, which is somebody else's"
        elif own.isdisjoint(within) and not (how == "made" and any(path in parents(one) for one in own)):
            gone_on_with = case.whole is not None and run in within
            if not gone_on_with:
                yield f"it {how} {os.fsdecode(path)}"
        elif how == "made" and path.rpartition(b"/")[2].startswith(b".") and path not in own:
            yield f"it left {os.fsdecode(path)}"


def is_a_run(case: Case, after: dict[bytes, Any], told: Told) -> bool:
    """Whether what is there after a failure is a run that can go on, and was told of."""
    assert case.run is not None
    return os.fsencode(os.path.realpath(case.run / "run.json")) in after and str(case.run) in told.err


def parents(path: bytes) -> list[bytes]:
    """The folders that a path lies in."""
    return [os.fsencode(parent) for parent in Path(os.fsdecode(path)).parents]


def of_outputs(case: Case, told: Told, children: Children) -> Iterator[str]:
    """Whether what was written is whole."""
    places = dict(case.files) | ({} if case.output is None or case.kind is None else {case.output: case.kind})
    for place, kind in places.items():
        if kind in FREE or (told.status == 1 and not place.exists()):
            continue
        loaded = children.call("loads", children.folder, kind=kind, place=str(place))
        if loaded.status != 0:
            reason = (loaded.out.strip().splitlines() or loaded.err.strip().splitlines() or ["no word"])[-1]
            yield f"{place.name} does not load: {reason}"
    for name, given in case.checks if told.status == 0 else ():
        looked = children.call("checks", children.folder, name=name, given={"told": told.out + told.err} | given)
        if looked.status != 0:
            lines = (looked.out.strip() or looked.err.strip() or "no word").splitlines()
            yield f"{name}: {lines[-1]}"
    if case.whole is not None and case.output is not None:
        theirs = {str(stray.relative_to(case.run)) for stray in case.strays if case.run is not None}
        for name in sorted(differing(contents(case.output), contents(case.whole)) - theirs):
            yield f"{name} is another than of a run that was not stopped"


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The names whose contents differ."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
