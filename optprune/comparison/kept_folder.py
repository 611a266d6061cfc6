"""Folder of a comparison: finished cells, so that it can resume, and the final table."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from optprune.comparison.grid import Cell
from optprune.comparison.results import DENSE, CellResult, Comparison, Figures
from optprune.system.files import real_path
from optprune.system.folders import ManifestFolder

CELLS, WORK, MODELS = "cells", "work", "models"
Value = TypeVar("Value")
RESULT, FIGURES = TypeAdapter(CellResult), TypeAdapter(Figures)
JSON, TABLE, PICTURE = "comparison.json", "comparison.md", "comparison.svg"


class ComparisonFolder(ManifestFolder):
    """Folder with the options of a comparison, and a file for each finished cell."""

    noun = "comparison"
    begin_anew = "choose another output"
    written = (f"{CELLS}/*.json", JSON, TABLE, PICTURE)

    def __init__(self, folder: str | Path) -> None:
        """Take a folder that is new, empty, or holds a comparison. Raises InputError otherwise."""
        super().__init__(real_path(Path(folder)))
        self._continues = False

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Record the options of the comparison, or compare them with the recorded ones, as `ManifestFolder.begin`."""
        super().begin(facts)
        self._continues = True
        # Temporary files of a comparison that was killed.
        self.remove_subfolder(WORK)

    @property
    def work(self) -> Path:
        """The folder for temporary files."""
        return self.subfolder(WORK)

    @property
    def models(self) -> Path:
        """The folder for saved models."""
        return self.subfolder(MODELS)

    def close(self) -> None:
        """Release the folder, or delete it where the comparison did not begin."""
        if self._continues:
            self.remove_subfolder(WORK)
        if self.begun:
            self.release()
        else:
            self.discard()

    def has(self, cell: Cell) -> bool:
        """Return whether a cell is finished."""
        return self.holds(_file_of(cell.name))

    def cell(self, cell: Cell) -> CellResult | None:
        """Return the result of a cell, or None where it is not finished."""
        return self._as(RESULT, _file_of(cell.name)) if self.has(cell) else None

    def finish(self, result: CellResult) -> None:
        """Store the result of a cell, unless it failed: the next call tries that again."""
        if result.figures is not None:
            self._keep(result.cell.name, asdict(result))

    def dense(self) -> Figures | None:
        """Return the figures of the dense model, or None where they are not stored."""
        name = _file_of(DENSE)
        return self._as(FIGURES, name) if self.holds(name) else None

    def keep_dense(self, figures: Figures) -> None:
        """Store the figures of the dense model."""
        self._keep(DENSE, asdict(figures))

    def conclude(self, comparison: Comparison, picture: bytes | None) -> None:
        """Write the tables of a comparison, each file whole or not at all."""
        texts = {JSON: comparison.to_json().encode(), TABLE: comparison.markdown().encode(), PICTURE: picture}
        for name, data in texts.items():
            if data is not None:
                self.keep(name, lambda stream, data=data: stream.write(data))

    def _keep(self, name: str, content: dict[str, Any]) -> None:
        self.subfolder(CELLS)
        self.write(_file_of(name), content)

    def _as(self, kind: TypeAdapter[Value], name: str) -> Value:
        try:
            return kind.validate_python(self.read(name))
        except ValidationError as error:
            raise self.damaged(name) from error


def _file_of(name: str) -> str:
    return f"{CELLS}/{name}.json"
