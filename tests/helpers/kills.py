"""A run of the command line that ends at a moment of one's choice: killed, interrupted, or out of disk."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from optprune.pruning import layer

KILL, INTERRUPT, TERMINATE, FULL = "SIGKILL", "SIGINT", "SIGTERM", "full disk"


@contextmanager
def moments(at: int | None, how: str = KILL) -> Iterator[list[str]]:
    """Count the moments of a run: before and after a file is made to last or renamed, and after a layer is solved.

    At the moment of number `at` the run ends as `how` says; a disk that is full is so where a file is made to last.
    """
    seen: list[str] = []

    def moment(name: str) -> None:
        seen.append(name)
        if at is not None and len(seen) > at and (how != FULL or name == "before fsync"):
            end(how)

    def around(name: str, function: Callable) -> Callable:
        def wrapped(*args, **more):
            moment(f"before {name}")
            result = function(*args, **more)
            moment(f"after {name}")
            return result

        return wrapped

    # In a worker of pytest-xdist SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        mock.patch.object(os, "fsync", around("fsync", os.fsync)),
        mock.patch.object(Path, "replace", around("replace", Path.replace)),
        mock.patch.object(Path, "rename", around("rename", Path.rename)),
        mock.patch.object(layer, "solve", around("solve", layer.solve)),
    ):
        try:
            yield seen
        finally:
            signal.signal(signal.SIGINT, before)


def end(how: str) -> None:
    if how == FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if how == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.raise_signal(signal.SIGINT if how == INTERRUPT else signal.SIGTERM)


def main() -> None:
    """usage: python -m tests.helpers.kills MOMENT WORD...: run `optprune WORD...` and be killed at a moment."""
    from optprune.cli.app import main as run

    with moments(int(sys.argv[1])):
        run(sys.argv[2:])


if __name__ == "__main__":
    main()
