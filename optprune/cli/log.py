"""The log file of a command: its lines of progress with the time, appended."""

import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from optprune.cli.outputs import Input, check_file, echo
from optprune.cli.run_folder import run_folder_of
from optprune.errors import InputError
from optprune.system.files import real_path


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
        check_file(self.file, "log", output=output, models=[model], inputs=inputs)
        place = real_path(self.file)
        for folder in (real_path(output), run_folder_of(output)):
            if place.is_relative_to(folder):
                raise InputError(f"the log {self.file} lies in {folder}, which the run replaces: name another place")
        if place.exists() and not os.access(place, os.W_OK):
            raise InputError(f"the log {self.file} cannot be written: it is not writable")
