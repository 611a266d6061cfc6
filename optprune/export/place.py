"""The place of an output folder: whether one can be written there, drafts beside it, how a draft takes the place."""

import contextlib
import glob
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from optprune.errors import InputError, OptpruneError
from optprune.system.files import real_path

UNCHECKED = ".unchecked"
"""the end of the name of a folder that was not seen to load"""
LOCK = "in-use"
"""the name of a file in a draft: the process that writes the draft holds a lock on it, which ends with the process"""


def check_output(folder: str | Path, overwrite: bool) -> None:
    """Raise InputError unless the output folder can be written: call it before the long work."""
    folder = Path(folder)
    place = real_path(folder)
    if place.exists():
        if Path.cwd().is_relative_to(place):
            raise InputError(
                f"the output folder {folder} is the current folder or holds it, so it cannot be replaced: name another"
            )
        if not place.is_dir():
            raise InputError(f"the output folder {folder} is a file: choose another name")
        if place.is_mount():
            raise InputError(
                f"the output folder {folder} is a mount point, so it cannot be replaced: name a folder in it"
            )
        if not overwrite:
            raise InputError(f"the output folder {folder} exists already: choose another, or pass --overwrite")
        if not (place / "config.json").is_file() and any(place.iterdir()):
            raise InputError(f"the folder {folder} holds something other than a model, so it is not overwritten")
        if not os.access(place, os.W_OK):
            raise InputError(f"the output folder {folder} cannot be replaced: it is not writable")
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"the output folder {folder} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"the output folder {folder} cannot be created: {parent} is not writable")


def missing_parents(place: Path) -> list[Path]:
    """The parents of an output that do not exist yet, innermost first."""
    return [parent for parent in place.parents if not parent.exists()]


class Scratch:
    """A folder beside an output, which goes when it is discarded, or at the latest when nothing refers to it."""

    def __init__(self, place: Path) -> None:
        # For `_discard`, should there be none left by then. First, so that no folder is made when there is none now.
        spare = os.open(os.devnull, os.O_RDONLY)
        # A sibling, so that the rename at the end stays within one file system.
        self.folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        self._lock = FileLock(self.folder / LOCK)
        self.discard = weakref.finalize(self, _discard, self.folder, self._lock, spare)
        self._lock.acquire(timeout=0)


def left_behind(place: Path) -> list[Path]:
    """The drafts of an output that no process is at work on any more: those of runs that were killed."""
    return [
        folder
        for folder in sorted(place.parent.glob(f".{glob.escape(place.name)}.????????"))
        if (folder / LOCK).is_file() and not in_use(folder)
    ]


def in_use(folder: Path) -> bool:
    """Whether a process is at work on a folder."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def discard(folder: Path) -> None:
    """Delete as much of a folder as can be, with one file descriptor at a time: shutil.rmtree needs more."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                discard(path)
            else:
                path.unlink()
        folder.rmdir()


def _discard(folder: Path, lock: BaseFileLock, spare: int) -> None:
    os.close(spare)
    lock.release()
    discard(folder)


def put_in_place(draft: Path, folder: Path, overwrite: bool) -> None:
    """Rename a draft to the folder; a folder that was there is deleted after that, and put back if it fails."""
    old = folder.with_name(f".{folder.name}.{draft.parent.name.rpartition('.')[2]}.old")
    replaced = folder.exists()
    if replaced:
        check_output(folder, overwrite)  # somebody else may have made it meanwhile
        folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException as error:
        if replaced:
            try:
                old.rename(folder)
            except OSError:
                raise OptpruneError(
                    f"{folder} could not be replaced ({error}): the model that was there is now in {old}"
                ) from error
        raise
    if replaced:
        # Whatever cannot be deleted of the old folder, the new one is there.
        shutil.rmtree(old, ignore_errors=True)
