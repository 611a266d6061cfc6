"""Drafts of a file that killed processes have left beside it: told from those that are being written by a lock."""

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO


def hold_draft(stream: BinaryIO) -> None:
    """Lock a draft for as long as it is open: call it before the first byte is written."""
    with contextlib.suppress(OSError, ImportError):  # without locks `delete_left_drafts` deletes nothing either
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def delete_left_drafts(target: Path) -> None:
    """Delete the drafts of a target that no process is writing.

    They are regular files beside it, by the names that `exclusive_draft` gives. An empty one may be about to be locked.
    """
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.part")
    for draft in sorted(target.parent.iterdir() if target.parent.is_dir() else ()):
        if ours.fullmatch(draft.name) and _is_left(draft):
            with contextlib.suppress(OSError):
                draft.unlink()


def _is_left(draft: Path) -> bool:
    """Whether a name stands for a regular file with bytes in it, which no process has locked."""
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
