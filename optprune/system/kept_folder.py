"""Folders that one process is at work in: what is finished, on the disk, and the facts that decided it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from optprune.errors import InputError
from optprune.system.facts import differences
from optprune.system.files import draft_of, read_json, write_whole
from optprune.system.wording import shown

FACTS, LOCK = "run.json", "in-use"


class KeptFolder:
    """A folder that one process is at work in: `run.json`, the facts that decide what is in it, and what is finished.

    Every file is there whole or not at all.
    """

    noun = "run"
    """what the folder holds, in a word"""
    stays: tuple[str, ...] = ()
    """the names of what a process that is killed may leave before it has begun, and that another can use"""

    def __init__(self, folder: str | Path) -> None:
        """InputError where the folder holds something else, or another process is at work on it."""
        self.folder = Path(folder)
        before = {LOCK, draft_of(self.folder / FACTS).name, *self.stays}
        there = self.folder.is_dir()
        strange = there and not self.begun and any(file.name not in before for file in self.folder.iterdir())
        if strange or (self.folder.exists() and not there):
            raise InputError(
                f"{self.folder} holds something other than a {self.noun}: choose another folder, or delete it"
            )
        self.made = [parent for parent in (self.folder, *self.folder.parents) if not parent.exists()]
        """the folders that were made for it, the innermost first"""
        self.folder.mkdir(parents=True, exist_ok=True)
        # One for all folders of this process: one that is left lying about is no other process at work.
        self._lock = FileLock(self.folder / LOCK, is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"another process is at work on the {self.noun} in {self.folder}: wait for it, or stop it"
            ) from error

    @property
    def begun(self) -> bool:
        """Whether the facts are there."""
        return (self.folder / FACTS).is_file()

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Note what decides all that is to come, or see that it is what was begun with.

        InputError names the first fact that is another.
        """
        plain = json.loads(json.dumps(facts))
        if not self.begun:
            self.write(FACTS, plain)
            return
        for what, old, new in differences(self.read(FACTS), plain):
            raise InputError(
                f"the {self.noun} in {self.folder} cannot go on: {what} was {shown(old)} and is {shown(new)}; run it "
                "as it was begun, or delete the folder and begin anew"
            )

    def write(self, name: str, content: Any) -> None:
        """Write plain data to a file of the folder."""
        # NaN and infinity, which a report may hold, are written as Python reads them.
        text = json.dumps(content, indent=2).encode()
        write_whole(self.folder / name, lambda stream: stream.write(text))

    def read(self, name: str) -> Any:
        """The plain data in a file of the folder; InputError where it is damaged."""
        try:
            return read_json((self.folder / name).read_text(encoding="utf-8"), f"{name} of {self.folder}")
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise self.damaged(name) from error

    def damaged(self, name: str) -> InputError:
        """The error that says that a file of the folder is not what it was."""
        return InputError(f"{name} of the {self.noun} in {self.folder} is damaged: delete the folder and begin anew")

    def release(self) -> None:
        """Let another process have the folder."""
        self._lock.release(force=True)
        with suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)
