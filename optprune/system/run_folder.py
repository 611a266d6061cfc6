"""Run folders: what a run has finished, on the disk, and the facts that decided it, so that it can go on later."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from optprune.errors import InputError
from optprune.system.facts import differences
from optprune.system.files import draft_of, read_json, write_whole
from optprune.system.interrupts import interrupts_held
from optprune.system.wording import shown

FACTS, LOCK = "run.json", "in-use"


class RunFolder(ABC):
    """A folder that one process is at work in: `run.json`, the facts that decide the bytes, and what is finished.

    Every file is there whole or not at all.
    """

    stays: tuple[str, ...] = ()
    """the names of what a run that is killed may leave before it has begun, and that another run can use"""

    def __init__(self, folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """`resume` is to go on with the run in the folder, if there is one; else the folder must hold none.

        InputError where it holds one all the same, unless `overwrite` is to delete it, or where it holds something that
        is no run, or another process is at work on it.
        """
        self.folder, self.resume = Path(folder), resume
        before = {LOCK, draft_of(self.folder / FACTS).name, *self.stays}
        if self.folder.exists() and not self.begun and any(file.name not in before for file in self.folder.iterdir()):
            raise InputError(f"{self.folder} holds something other than a run: choose another folder, or delete it")
        if self.begun and not resume and not overwrite:
            raise InputError(
                f"{self.folder} holds an unfinished run ({self.how_far}): go on with it by --resume, or delete it"
            )
        self._made = [parent for parent in (self.folder, *self.folder.parents) if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        # One for all folders of this process: one that is left lying about is no other process at work.
        self._lock = FileLock(self.folder / LOCK, is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"another process is at work on the run in {self.folder}: wait for it, or stop it"
            ) from error
        if self.begun and not resume:
            self._clear()
        for place in self.folder.iterdir():
            if place.is_dir() and place.name not in self.stays:  # what an earlier run has put aside
                shutil.rmtree(place, ignore_errors=True)

    @abstractmethod
    def finished(self) -> list[int]:
        """The numbers of what is finished: of blocks, or of steps."""

    @property
    @abstractmethod
    def how_far(self) -> str:
        """How far the run is, in a few words."""

    @property
    @abstractmethod
    def told(self) -> str:
        """How far the run is, and of how much, in words."""

    @property
    @abstractmethod
    def whole(self) -> bool:
        """Whether all is finished but the output."""

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run."""
        return (self.folder / FACTS).is_file()

    def discard(self) -> None:
        """Delete the run, and the folders that were made for it as far as they are empty."""
        with interrupts_held():
            self._clear()
            self._lock.release(force=True)
            with suppress(OSError):
                (self.folder / LOCK).unlink(missing_ok=True)
                for folder in self._made or [self.folder]:
                    folder.rmdir()

    def _clear(self) -> None:
        # The facts go last: until then it is a run that can be deleted again.
        for file in sorted(self.folder.iterdir(), key=lambda file: file.name == FACTS):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            elif file.name != LOCK:
                file.unlink(missing_ok=True)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Note what decides the bytes of the run, or see that it is what the run in the folder began with.

        InputError names the first fact that is another.
        """
        plain = json.loads(json.dumps(facts))
        if not self.begun:
            self.write(FACTS, plain)
            return
        before = self.read(FACTS)
        for what, old, new in differences(before, plain):
            raise InputError(
                f"the run in {self.folder} cannot go on: {what} was {shown(old)} and is {shown(new)}; run it as it was "
                "begun, or delete the folder and begin anew"
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
        return InputError(f"{name} of the run in {self.folder} is damaged: delete the folder and begin anew")
