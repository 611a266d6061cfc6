"""The moments of a command, at which it can be ended: killed, interrupted, terminated, or out of disk."""

import errno
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from gguf import GGUFWriter

from optprune.pruning import layer

KILL, INTERRUPT, TERMINATE, FULL = "SIGKILL", "SIGINT", "SIGTERM", "full disk"
NUMBERS = {KILL: signal.SIGKILL, INTERRUPT: signal.SIGINT, TERMINATE: signal.SIGTERM}
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "open")
"""what Python tells of before it does it: so a clean-up in a finaliser has moments too"""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Moments:
    """Counts the moments of a command, and ends it at one of them.

    A moment is before a file is opened to be written, renamed or deleted, and before and after one is made to last, a
    layer is solved, or a tensor is written to a GGUF file. At the moment of number `at`, or the first one whose name
    has that text in it, the command ends as `how` says, once; a disk that is full stays so, where files are made to
    last. `note` is a file that tells of that moment, and of whether the `output` was there.
    """

    def __init__(self, at: int | str | None, how: str, note: Path | None = None, output: Path | None = None) -> None:
        self.at, self.how, self.note, self.output = at, how, note, output
        self.seen: list[str] = []
        self.over = False

    def moment(self, name: str) -> None:
        """Count a moment, and end there if it is the one."""
        self.seen.append(name)
        if self.at is None or self.over:
            return
        here = self.at in name if isinstance(self.at, str) else len(self.seen) > self.at
        if here and (self.how != FULL or name.startswith("before fsync")):
            self.end(name)

    def end(self, name: str) -> None:
        """End the command."""
        if self.how == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.over = True
        if self.note is not None:
            there = self.output is not None and self.output.exists()
            self.note.write_text(json.dumps({"moment": name, "number": len(self.seen), "there": there}))
        if self.how == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.raise_signal(NUMBERS[self.how])

    def told(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hear what Python is about to do."""
        if event not in EVENTS or not arguments:
            return
        place = arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        if isinstance(place, str | bytes | os.PathLike) and os.fsdecode(place).startswith(PLACES):
            named = arguments[1] if event == "os.rename" else place
            self.moment(f"before {event} {Path(os.fsdecode(named)).name}")


PLACES = (tempfile.gettempdir(),)
"""where the files lie that are looked at: tests have all of theirs there"""
_now: list[Moments] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    # The writing of a note is no moment.
    if _now and (_now[0].note is None or not arguments or arguments[0] != str(_now[0].note)):
        _now[0].told(event, arguments)


_hook: list[bool] = []


@contextmanager
def moments(
    at: int | str | None, how: str = KILL, note: Path | None = None, output: Path | None = None
) -> Iterator[list[str]]:
    """Count the moments of what is done, and end it at one of them."""
    if not _hook:
        sys.addaudithook(_hear)  # for as long as the process lives
        _hook.append(True)
    one = Moments(at, how, note, output)

    def around(name: str, function: Callable) -> Callable:
        def wrapped(*args: Any, **more: Any) -> Any:
            one.moment(f"before {name}")
            result = function(*args, **more)
            one.moment(f"after {name}")
            return result

        return wrapped

    # In a worker of pytest-xdist SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        mock.patch.object(os, "fsync", around("fsync", os.fsync)),
        mock.patch.object(layer, "solve", around("solve", layer.solve)),
        mock.patch.object(GGUFWriter, "write_tensor_data", around("tensor", GGUFWriter.write_tensor_data)),
    ):
        _now.append(one)
        try:
            yield one.seen
        finally:
            _now.clear()
            signal.signal(signal.SIGINT, before)


@contextmanager
def after_seconds(seconds: float, how: str, note: Path, output: Path) -> Iterator[None]:
    """Have a signal come after so many seconds of processor time."""
    one = Moments(None, how, note, output)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGPROF, lambda *_: one.end(f"after {seconds:.3f} s"))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def middle(seen: list[str], written: str) -> int:
    """The number of the moment after the middle one at which a file gets its name."""
    found = [number for number, name in enumerate(seen) if name == f"before os.rename {written}"]
    return found[len(found) // 2] + 1


def drawn(rng: random.Random, count: int) -> int:
    """The number of a moment; the first and the last ones are as likely as those of the long middle."""
    part = rng.randrange(4)
    few = min(20, count)
    return rng.randrange(few) if part == 0 else count - 1 - rng.randrange(few) if part == 1 else rng.randrange(count)
