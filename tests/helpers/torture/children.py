"""Calls in processes of their own, which are forked from one that has all imports: a tenth of a second each."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST = 120.0
"""the seconds after which a call is taken to hang, on a machine that is busy with other things"""


@dataclass(frozen=True)
class Told:
    """How a call ended, and what it said."""

    status: int
    """the exit status; of a process that a signal has ended, minus its number"""
    out: str
    err: str
    seconds: float
    """the processor time"""
    bytes: int
    """the memory at its peak beyond what the imports take"""
    hung: bool
    left: bool
    """whether processes that it had started went on without it"""


class Children:
    """A process with the imports of optprune, which is forked for each call."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="torture-")
        self.folder = Path(self._place.name)
        self.home = self.folder / "home"
        self.home.mkdir()
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "HF_HOME": str(self.folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "MPLCONFIGDIR": str(self.folder / "matplotlib"),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "",
            "PYTHONUNBUFFERED": "1",
        }
        words = [sys.executable, "-m", "tests.helpers.torture.server"]
        root = Path(__file__).parents[3]
        self._server: Any = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )
        assert self._server.stdout.readline() == "ready\n", "the process that is forked has not started"

    def call(
        self, name: str, where: Path, /, *, longest: float = LONGEST, environment: Any = None, **arguments: Any
    ) -> Told:
        """Call a function of `calls` in a folder, in a process of its own."""
        out, err = self.folder / "out", self.folder / "err"
        asked = {
            "call": name,
            "arguments": arguments,
            "folder": str(where),
            "out": str(out),
            "err": str(err),
            "environment": environment or {},
            "longest": longest,
        }
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        found = json.loads(self._server.stdout.readline())
        said = {place.name: place.read_bytes().decode("utf-8", "backslashreplace") for place in (out, err)}
        return Told(**found, **said)

    def command(self, words: list[str], where: Path, **more: Any) -> Told:
        """Run a command of optprune, as the command line does."""
        return self.call("command", where, words=words, **more)

    def close(self) -> None:
        """End the process, and delete what it made."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        self._place.cleanup()
