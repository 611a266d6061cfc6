"""Run folders: what a run has finished, on the disk, and the facts that decided it, so that it can go on later."""

import shutil
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

from optprune.errors import InputError
from optprune.system.interrupts import interrupts_held
from optprune.system.kept_folder import FACTS, LOCK, KeptFolder


class RunFolder(KeptFolder, ABC):
    """The folder of a run, which goes when the run's output is whole."""

    def __init__(self, folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """`resume` is to go on with the run in the folder, if there is one; else the folder must hold none.

        InputError where it holds one all the same, unless `overwrite` is to delete it, or where it holds something that
        is no run, or another process is at work on it.
        """
        self.folder, self.resume = Path(folder), resume
        if self.begun and not resume and not overwrite:
            raise InputError(
                f"{self.folder} holds an unfinished run ({self.how_far}): go on with it by --resume, or delete it"
            )
        super().__init__(folder)
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

    def discard(self) -> None:
        """Delete the run, and the folders that were made for it as far as they are empty."""
        with interrupts_held():
            self._clear()
            self.release()
            with suppress(OSError):
                for folder in self.made or [self.folder]:
                    folder.rmdir()

    def _clear(self) -> None:
        # The facts go last: until then it is a run that can be deleted again.
        for file in sorted(self.folder.iterdir(), key=lambda file: file.name == FACTS):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            elif file.name != LOCK:
                file.unlink(missing_ok=True)
