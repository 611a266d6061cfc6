"""The log file of a command: its lines of progress with the time, appended."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from optprune.cli.outputs import Input, check_file, echo
from optprune.cli.run_folder import run_folder_of
from optprune.errors import InputError
from optprune.system.files import real_path

LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ")
"""the beginning of a line of a log"""


class LogFile:
    """A file to which lines are appended with the time, each at once.

    A resumed run therefore continues its log. When a line cannot be written, a warning goes to stderr and logging ends;
    the run does not fail.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def __call__(self, line: str) -> None:
        """Append a line."""
        if self.file is None:
            return
        try:
            with self.file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}\n")
        except OSError as error:
            echo(f"the log {self.file} cannot be written any more ({error.strerror or error})", err=True)
            self.file = None

    def check(self, output: Path, model: str, inputs: Iterable[Input] = ()) -> None:
        """Raise InputError if the log cannot be written, is an input, or lies in the output or the model."""
        if self.file is None:
            return
        check_file(self.file, "log", output=output, models=[model], inputs=inputs, replaces=_is_log)
        place = real_path(self.file)
        for folder in (real_path(output), run_folder_of(output)):
            if place.is_relative_to(folder):
                raise InputError(f"the log {self.file} lies in {folder}, which the run replaces: name another place")
        if place.exists() and not os.access(place, os.W_OK):
            raise InputError(f"the log {self.file} cannot be written: it is not writable")


def _is_log(file: Path) -> bool:
    """Return whether a file is empty or begins with a line of a log."""
    with suppress(OSError), file.open("rb") as stream:
        start = stream.read(64)
        return not start or LINE.match(start) is not None
    return False
