"""The folder of a comparison: its cells as they are finished, so that it can go on, and what it comes to."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from optprune.comparison.asked import Cell
from optprune.comparison.results import DENSE, CellResult, Comparison, Figures
from optprune.errors import InputError
from optprune.system.facts import differences
from optprune.system.files import json_text, read_json, real_path, write_whole
from optprune.system.wording import shown

OPTIONS, CELLS, LOCK, WORK, MODELS = "options.json", "cells", "in-use", "work", "models"
Value = TypeVar("Value")
RESULT, FIGURES = TypeAdapter(CellResult), TypeAdapter(Figures)
JSON, TABLE, PICTURE = "comparison.json", "comparison.md", "comparison.svg"


class ComparisonFolder:
    """A folder with the options that a comparison was begun with, and a file for each cell that is finished."""

    def __init__(self, folder: str | Path) -> None:
        """A folder that is new, empty, or has a comparison; InputError otherwise, or where another is at work."""
        self.folder = real_path(Path(folder))
        found = list(self.folder.iterdir()) if self.folder.is_dir() else []
        strange = [file for file in found if file.name not in (LOCK, CELLS, WORK)]
        if (self.folder.exists() and not self.folder.is_dir()) or (strange and not self._file(OPTIONS).is_file()):
            raise InputError(f"{folder} holds something other than a comparison: choose another folder")
        self._made = [parent for parent in (self.folder, *self.folder.parents) if not parent.exists()]
        self._cells.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._file(LOCK), is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"another process is at work on the comparison in {folder}: wait for it") from error
        # What a comparison that was killed has put aside.
        shutil.rmtree(self.work, ignore_errors=True)

    @property
    def work(self) -> Path:
        """A folder for what does not stay."""
        return self._file(WORK)

    @property
    def models(self) -> Path:
        """A folder for the models that are kept."""
        return self._file(MODELS)

    def begin(self, options: Mapping[str, Any]) -> None:
        """Note what was asked for, or see that it is as the comparison began; InputError names what is another."""
        plain = json.loads(json.dumps(options))
        if not self._file(OPTIONS).is_file():
            self._write(OPTIONS, plain)
            return
        for what, old, new in differences(self._read(self._file(OPTIONS)), plain):
            raise InputError(
                f"the comparison in {self.folder} cannot go on: {what} was {shown(old)} and is {shown(new)}; ask for "
                "what it began with, or choose another folder"
            )

    def close(self) -> None:
        """Let the next one have the folder, which is gone where it was made for a comparison that did not begin."""
        shutil.rmtree(self.work, ignore_errors=True)
        self._lock.release(force=True)
        self._file(LOCK).unlink(missing_ok=True)
        if not self._file(OPTIONS).is_file():
            with suppress(OSError):
                for empty in (self._cells, *self._made):
                    empty.rmdir()

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished."""
        return (self._cells / f"{cell.name}.json").is_file()

    def cell(self, cell: Cell) -> CellResult | None:
        """What came of a cell, where it is finished."""
        return self._as(RESULT, self._cells / f"{cell.name}.json") if self.has(cell) else None

    def finish(self, result: CellResult) -> None:
        """Keep what came of a cell; one that failed is tried again by the next call."""
        if result.figures is not None:
            self._write(f"{CELLS}/{result.cell.name}.json", asdict(result))

    def dense(self) -> Figures | None:
        """The figures of the dense model, where they are known."""
        file = self._cells / f"{DENSE}.json"
        return self._as(FIGURES, file) if file.is_file() else None

    def keep_dense(self, figures: Figures) -> None:
        """Keep them."""
        self._write(f"{CELLS}/{DENSE}.json", asdict(figures))

    def conclude(self, comparison: Comparison, picture: bytes | None) -> None:
        """Write what the comparison comes to, each file whole or not at all."""
        texts = {JSON: comparison.to_json().encode(), TABLE: comparison.markdown().encode(), PICTURE: picture}
        for name, data in texts.items():
            if data is not None:
                write_whole(self._file(name), lambda stream, data=data: stream.write(data))

    @property
    def _cells(self) -> Path:
        return self._file(CELLS)

    def _file(self, name: str) -> Path:
        return self.folder / name

    def _write(self, name: str, content: Any) -> None:
        # NaN and infinity are written as Python reads them.
        text = json.dumps(content, indent=2) if name != OPTIONS else json_text(content)
        write_whole(self._file(name), lambda stream: stream.write(text.encode()))

    def _as(self, kind: TypeAdapter[Value], file: Path) -> Value:
        try:
            return kind.validate_python(self._read(file))
        except ValidationError as error:
            raise self._damaged(file) from error

    def _read(self, file: Path) -> Any:
        try:
            return read_json(file.read_text(encoding="utf-8"), file.name)
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise self._damaged(file) from error

    def _damaged(self, file: Path) -> InputError:
        return InputError(f"{file.name} of the comparison in {self.folder} is damaged: delete it and run again")
