"""The folder of a comparison: its cells as they are finished, so that it can go on, and what it comes to."""

import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from optprune.comparison.asked import Cell
from optprune.comparison.results import DENSE, CellResult, Comparison, Figures
from optprune.errors import InputError
from optprune.system.files import real_path, write_whole
from optprune.system.kept_folder import KeptFolder

CELLS, WORK, MODELS = "cells", "work", "models"
Value = TypeVar("Value")
RESULT, FIGURES = TypeAdapter(CellResult), TypeAdapter(Figures)
JSON, TABLE, PICTURE = "comparison.json", "comparison.md", "comparison.svg"


class ComparisonFolder(KeptFolder):
    """A folder with the options that a comparison was begun with, and a file for each cell that is finished."""

    noun, stays = "comparison", (CELLS, WORK)

    def __init__(self, folder: str | Path) -> None:
        """A folder that is new, empty, or has a comparison; InputError otherwise, or where another is at work."""
        super().__init__(real_path(Path(folder)))
        (self.folder / CELLS).mkdir(exist_ok=True)
        # What a comparison that was killed has put aside.
        shutil.rmtree(self.work, ignore_errors=True)

    @property
    def work(self) -> Path:
        """A folder for what does not stay."""
        return self.folder / WORK

    @property
    def models(self) -> Path:
        """A folder for the models that are kept."""
        return self.folder / MODELS

    def close(self) -> None:
        """Let the next one have the folder, which is gone where it was made for a comparison that did not begin."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.release()
        if not self.begun:
            with suppress(OSError):
                for empty in (self.folder / CELLS, *self.made):
                    empty.rmdir()

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished."""
        return (self.folder / _file_of(cell.name)).is_file()

    def cell(self, cell: Cell) -> CellResult | None:
        """What came of a cell, where it is finished."""
        return self._as(RESULT, _file_of(cell.name)) if self.has(cell) else None

    def finish(self, result: CellResult) -> None:
        """Keep what came of a cell; one that failed is tried again by the next call."""
        if result.figures is not None:
            self.write(_file_of(result.cell.name), asdict(result))

    def dense(self) -> Figures | None:
        """The figures of the dense model, where they are known."""
        name = _file_of(DENSE)
        return self._as(FIGURES, name) if (self.folder / name).is_file() else None

    def keep_dense(self, figures: Figures) -> None:
        """Keep them."""
        self.write(_file_of(DENSE), asdict(figures))

    def conclude(self, comparison: Comparison, picture: bytes | None) -> None:
        """Write what the comparison comes to, each file whole or not at all."""
        texts = {JSON: comparison.to_json().encode(), TABLE: comparison.markdown().encode(), PICTURE: picture}
        for name, data in texts.items():
            if data is not None:
                write_whole(self.folder / name, lambda stream, data=data: stream.write(data))

    def damaged(self, name: str) -> InputError:
        return InputError(f"{Path(name).name} of the comparison in {self.folder} is damaged: delete it and run again")

    def _as(self, kind: TypeAdapter[Value], name: str) -> Value:
        try:
            return kind.validate_python(self.read(name))
        except ValidationError as error:
            raise self.damaged(name) from error


def _file_of(name: str) -> str:
    return f"{CELLS}/{name}.json"
