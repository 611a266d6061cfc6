"""The place of an output: whether one can be written there, drafts beside it, how a draft takes the place."""

import contextlib
import glob
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from optprune.errors import InputError, OptpruneError
from optprune.system.files import is_draft, is_own_file, is_own_folder, real_path
from optprune.system.wording import shown

UNCHECKED = ".unchecked"
"""the end of the name of a folder that was not seen to load"""
LOCK = ".optprune-draft"
"""the name of a file in a draft: the process that writes the draft holds a lock on it, which ends with the process"""
MODEL_FILES = re.compile(
    r"(report|(generation_)?config|tokenizer(_config)?|special_tokens_map|added_tokens|vocab|.*\.index)\.json"
    r"|report\.html|recipe\.yaml|(vocab|merges)\.txt|README\.md|(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)(\.txt|\.md)?"
    r"|.*\.(safetensors|model|jinja|py)"
)
"""the names that files of a saved folder may have"""
GRAPH_FILES = re.compile(r"model\.onnx(\..+|_data)?")
"""the names that an exported graph may have beside them"""


def check_output(folder: str | Path, overwrite: bool, files: Collection[str] = ()) -> None:
    """Raise InputError unless the output folder can be written: call it before the long work.

    A folder is overwritten only where it holds a model and nothing else but `files` of these names.
    """
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
        _check_all_known(folder, place, files)
        if not os.access(place, os.W_OK):
            raise InputError(f"the output folder {folder} cannot be replaced: it is not writable")
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"the output folder {folder} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"the output folder {folder} cannot be created: {parent} is not writable")


def _check_all_known(folder: Path, place: Path, files: Collection[str]) -> None:
    """Raise InputError where an output holds a file that no saved model has: it would be deleted with the rest."""
    for path in sorted(place.iterdir()):
        known = path.name in files or MODEL_FILES.fullmatch(path.name) or GRAPH_FILES.fullmatch(path.name)
        if not (known and is_own_file(path)) and path.name != "__pycache__":
            raise InputError(
                f"the folder {folder} holds {shown(path.name)}, which no saved model has, so it is not overwritten: "
                "move that away, or choose another folder"
            )


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
    """Return the drafts of an output that no process is at work on any more: those of runs that were killed."""
    return [
        folder
        for folder in sorted(place.parent.glob(f".{glob.escape(place.name)}.????????"))
        if is_own_folder(folder) and is_own_file(folder / LOCK) and not in_use(folder)
    ]


def delete_left_behind(place: Path, say: Callable[[str], None] = lambda sentence: None) -> None:
    """Delete the drafts of an output that killed runs have left, and say so."""
    for folder in left_behind(place):
        say(f"deleting {folder}, which a run that was killed has left behind")
        discard(folder)


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


def set_aside(draft: Path, place: Path) -> Path:
    """Give a draft a name beside its place which says that it was not seen to load, and return that."""
    number, unchecked = 1, place.with_name(f"{place.name}{UNCHECKED}")
    while unchecked.exists() or unchecked.is_symlink():
        number += 1
        unchecked = place.with_name(f"{place.name}{UNCHECKED}-{number}")
    draft.rename(unchecked)
    return unchecked


def put_in_place(draft: Path, folder: Path, overwrite: bool) -> None:
    """Rename a draft to the folder; a folder that was there is deleted after that, and put back if it fails."""
    old = folder.with_name(f".{folder.name}.{draft.parent.name.rpartition('.')[2]}.old")
    replaced = folder.exists()
    if replaced:
        # Somebody else may have made it meanwhile.
        check_output(folder, overwrite, [path.name for path in draft.iterdir()])
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


def hold_draft(stream: BinaryIO) -> None:
    """Lock a draft for as long as it is open: call it before the first byte is written."""
    with contextlib.suppress(OSError, ImportError):  # without locks `delete_left_drafts` deletes nothing either
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def delete_left_drafts(target: Path) -> None:
    """Delete the drafts of a target that no process is writing.

    They are regular files beside it, by the names that `exclusive_draft` gives. An empty one may be about to be locked.
    """
    for draft in sorted(target.parent.iterdir() if target.parent.is_dir() else ()):
        if is_draft(draft.name, target.name) and _is_left(draft):
            with contextlib.suppress(OSError):
                draft.unlink()


def _is_left(draft: Path) -> bool:
    """Return whether a draft is a regular file with bytes in it that no process has locked."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        number = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            told = os.fstat(number)
            if not stat.S_ISREG(told.st_mode) or not told.st_size or told.st_nlink > 1:
                return False
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(number)
    return False
