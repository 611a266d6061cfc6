"""Run folders: what a run has finished is kept on the disk until its output is whole, so that it can go on later."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optprune.errors import InputError
from optprune.system.files import is_draft, is_own_file, is_own_folder
from optprune.system.kept_folder import FACTS, KeptFolder, check_kept

SCRATCH = "scratch"
"""the folder for what a run puts aside"""


class RunFolder(KeptFolder, ABC):
    """The folder of a run, which is deleted when the run's output is whole."""

    stays: tuple[str, ...] = ()
    """the names in the scratch folder that another process can use"""

    def __init__(self, folder: str | Path, *, resume: bool = False, restart: bool = False) -> None:
        """Take the folder: `resume` goes on with the run in it, if there is one, and `restart` deletes that run.

        Raises InputError where there is an unfinished run and neither is asked for.
        """
        super().__init__(folder)
        self.resumed = self.begun and not restart
        """whether there is a run that an earlier process began"""
        if self.resumed and not resume:
            self.release()
            raise InputError(
                f"{self.folder} holds an unfinished {self.noun} ({self.progress_text}): go on with it by --resume, or "
                f"{self.begin_anew}"
            )
        if restart:
            self._restart()
        self._tidy_scratch()

    def _restart(self) -> None:
        """Delete the run, unless a file of another is in the way of the next one."""
        try:
            self.check_names()
        except InputError:
            self.release()
            raise
        self.clear()

    def _tidy_scratch(self) -> None:
        """Delete what an earlier process put aside, but for what this one can use."""
        scratch = self.folder / SCRATCH
        if SCRATCH not in self.subfolders or not is_own_folder(scratch):
            return
        for place in filter(is_own_folder, scratch.iterdir()):
            if place.name not in self.stays:
                shutil.rmtree(place, ignore_errors=True)
                continue
            for file in place.iterdir():
                if is_draft(file.name) and is_own_file(file):
                    file.unlink(missing_ok=True)

    @classmethod
    def check(cls, folder: Path, *, resume: bool, restart: bool, facts: Mapping[str, Any]) -> None:
        """Raise InputError where a run could not use its folder, before any work is done.

        `facts` are those that are known already: a run that was begun with others cannot go on.
        """
        manifest = check_kept(folder, cls.noun)
        if manifest is None or manifest[FACTS] is None or restart:
            return
        found = cls(folder, resume=resume)
        try:
            found.check_facts(facts)
        finally:
            found.release()

    @property
    def scratch(self) -> Path:
        """The folder for what does not stay."""
        return self.subfolder(SCRATCH)

    @property
    def worth_keeping(self) -> bool:
        """Whether anything is kept that took time."""
        return bool(self.files) or self.has_scratch

    @property
    def has_scratch(self) -> bool:
        """Whether there is something in the scratch folder that another process can use."""
        return any((self.folder / SCRATCH / name).exists() for name in self.stays)

    @abstractmethod
    def finished(self) -> list[int]:
        """Return the numbers of what is finished: of blocks, or of steps."""

    @property
    @abstractmethod
    def progress_text(self) -> str:
        """How far the run is, and of how much, in words."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether all is finished but the output."""
