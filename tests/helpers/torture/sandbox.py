"""A sandbox: the folder in which a command runs, with files of somebody else in every place it may look at."""

import hashlib
import os
import random
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "\x1b]0;TORTURE\x07"
"""what a terminal would obey, and what no command may send there"""
TAG = "<img src=x onerror=TORTURE>"
"""what a browser would obey, and what no page may hold"""


class Sandbox:
    """A folder with inputs, the files of somebody else, and the place of an output."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.inputs, self.theirs, self.place = folder / "inputs", folder / "theirs", folder / "place"
        for made in (self.inputs, self.theirs, self.place):
            made.mkdir(parents=True)
        (self.theirs / "thesis.tex").write_text("years of work")
        (self.theirs / "deep").mkdir()
        (self.theirs / "deep" / "data.bin").write_bytes(bytes(range(256)))
        self.output = self.place / rng.choice(["out", "out", "out", "out.gguf", "new/out", "ou[t]", "o ut"])

    def copied(self, source: Path, name: str | None = None) -> Path:
        """A copy of a file or folder, among the inputs."""
        place = self.inputs / (name or source.name)
        return Path(shutil.copytree(source, place) if source.is_dir() else shutil.copy2(source, place))

    def plant(self) -> None:
        """Put files, folders and links of somebody else at names that a command may use beside its output."""
        beside = self.output.parent
        if beside != self.place:
            return
        name = self.output.name
        drafts = [f".{name}.part", f".{name}.12345678", f".{name}.12345678.old", f"{name}.part", f"{name}.run"]
        drafts += [f".{name}.tmp", f"{name}.lock", "work", "models", "converted", "in-use", "run.json"]
        for draft in self.rng.sample(drafts, self.rng.randrange(len(drafts))):
            with suppress(OSError):  # a name that is too long for a file
                self.thing(beside / draft)

    def thing(self, place: Path) -> None:
        """A file, a folder, or a link to one, of somebody else."""
        kind = self.rng.randrange(6)
        if place.exists() or place.is_symlink():
            return
        if kind == 0:
            place.write_text("a file of mine")
        elif kind == 1:
            place.symlink_to(self.theirs / "thesis.tex")
        elif kind == 2:
            place.symlink_to(self.theirs)
        elif kind == 3:
            place.symlink_to(self.theirs / "missing")
        else:
            place.mkdir()
            (place / "notes.txt").write_text("mine")
            (place / "link").symlink_to(self.theirs)
            names = ["run.json", "in-use", "progress.json", "block-00000.json", "division.json", "x.safetensors"]
            for name in self.rng.sample(names, self.rng.randrange(3)):
                (place / name).write_text(self.rng.choice(["{}", "", "null", '{"a": 1}', "mine"]))

    def state(self) -> dict[bytes, Any]:
        """What every path in the folder is: its kind, its rights, and its bytes or where it leads to."""
        return state(self.folder)


def state(folder: Path) -> dict[bytes, Any]:
    """What every path in a folder is, but for the bytecode that Python may keep beside a user's own code."""
    found: dict[bytes, Any] = {}
    for base, folders, files in os.walk(os.fsencode(folder)):
        folders[:] = [name for name in folders if name != b"__pycache__"]
        for name in (*folders, *files):
            path = os.path.join(base, name)  # noqa: PTH118  # names of any bytes
            mode = os.lstat(path).st_mode
            held: Any = None
            if stat.S_ISREG(mode):
                with open(path, "rb") as stream:  # noqa: PTH123
                    held = hashlib.file_digest(stream, "sha256").hexdigest()
            elif stat.S_ISLNK(mode):
                held = os.readlink(path)  # noqa: PTH115
            found[path] = (mode, held)
    return found
