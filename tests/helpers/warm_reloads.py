"""The reload check's script in a process that was forked from one with its imports, which cost five seconds each time.

The script, its task, its output and its exit status are those of the real check; only what it imports is there already.
Tests whose subject is the process itself take the real one by the fixture `real_reload_check`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optprune.export import check, reload_check

SCRIPT, SERVER = reload_check.__file__, Path(__file__).with_name("reload_server.py")
START, POPEN = check.run_alongside, subprocess.Popen


class WarmReloads:
    """In place of `check.run_alongside`: what the real one does for all that is not the check of a folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()  # pytest's own are too long for the name of a socket
        self._place, self._server = Path(self._folder.name) / "reloads", list[Any]()

    def __call__(
        self, words: list[str], environment: dict[str, str], on_line: Callable[[str], None] = lambda line: None
    ) -> "subprocess.CompletedProcess[str]":
        if subprocess.Popen is not POPEN or words[:3] != [sys.executable, "-P", SCRIPT]:
            return START(words, environment, on_line)
        with socket.socket(socket.AF_UNIX) as line, tempfile.TemporaryFile("w+") as errors:
            self._connect(line)
            ours, theirs = os.pipe()
            # Where transformers copies a folder's code is told to it when it is imported: here it is told anew.
            asked = json.dumps({"task": words[3], "modules": environment["HF_MODULES_CACHE"]})
            socket.send_fds(line, [asked.encode()], [theirs, errors.fileno()])
            os.close(theirs)
            with os.fdopen(ours) as output:
                said = []
                for each in output:
                    said.append(each)
                    on_line(each)
            status = int(line.recv(16).decode())
            errors.seek(0)
            return subprocess.CompletedProcess(words, status, "".join(said), errors.read())

    def start(self) -> None:
        """Start the process that is forked; without it, the first check does."""
        listening, theirs = os.pipe()
        words = [sys.executable, "-P", str(SERVER), SCRIPT, str(self._place), str(theirs)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._server.append(POPEN(words, stdin=subprocess.PIPE, env=environment, pass_fds=[theirs]))
        os.close(theirs)
        assert os.read(listening, 1) == b"1", "the process that is forked has not started"
        os.close(listening)

    def _connect(self, line: socket.socket) -> None:
        if not self._server:
            self.start()
        line.connect(str(self._place))

    def close(self) -> None:
        for server in self._server:
            server.stdin.close()  # it ends by that
            server.wait()
        self._folder.cleanup()
