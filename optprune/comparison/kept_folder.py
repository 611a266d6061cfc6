"""Folder of a comparison: finished cells, so that it can resume, and the final table."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from optprune.comparison.grid import RECIPES, Cell
from optprune.comparison.results import DENSE, CellResult, Comparison, Figures
from optprune.errors import InputError
from optprune.system.files import is_own_folder, real_path
from optprune.system.folders import ManifestFolder

CELLS, WORK, MODELS = "cells", "work", "models"
RESULT, FIGURES = TypeAdapter(CellResult), TypeAdapter(Figures)
JSON, TABLE, PAGE = "comparison.json", "comparison.md", "comparison.html"


class ComparisonFolder(ManifestFolder):
    """Folder with the options of a comparison, a file for each finished cell, and one for generated windows."""

    noun = "comparison"
    begin_anew = "choose another output"
    written = (f"{CELLS}/*.json", "generated-seed*.json", JSON, TABLE, PAGE)

    def __init__(self, folder: str | Path) -> None:
        """Take a folder that is new, empty, or holds a comparison. Raises InputError otherwise."""
        super().__init__(real_path(Path(folder)))
        self._others = self.folder / WORK if WORK in self.subfolders else None
        self._own: Path | None = None

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Record the options of the comparison, or compare them with the recorded ones, as `ManifestFolder.begin`."""
        super().begin(facts)
        if self._others is not None:
            for left in self._others.iterdir():
                if left != self._own and is_own_folder(left):
                    shutil.rmtree(left, ignore_errors=True)
            self._others = None

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError where one of these facts differs from the recorded one; the message names other recipes."""
        asked, kept = (list(some.get(RECIPES) or ()) for some in (facts, self.facts))
        if RECIPES in facts and kept and set(asked) != set(kept):
            raise InputError(
                f"the comparison in {self.folder} has the recipes {', '.join(kept)}, and this command asks for "
                f"{', '.join(asked)}; nothing was changed: give the same recipes, or {self.begin_anew}"
            )
        super().check_facts(facts)

    @property
    def work(self) -> Path:
        """The folder for temporary files of this process."""
        if self._own is None:
            self._own = Path(tempfile.mkdtemp(dir=self.subfolder(WORK)))
        return self._own

    @property
    def models(self) -> Path:
        """The folder for saved models."""
        return self.subfolder(MODELS)

    def close(self) -> None:
        """Release the folder, or delete it where the comparison did not begin."""
        if self._others is None:
            self.remove_subfolder(WORK)
        elif self._own is not None:
            shutil.rmtree(self._own)  # those of a comparison that was killed stay where this one is refused
        super().close()

    def has(self, cell: Cell) -> bool:
        """Return whether a cell is finished."""
        return self.holds(_file_of(cell.name))

    def cell(self, cell: Cell) -> CellResult | None:
        """Return the result of a cell, or None where it is not finished."""
        return self.read_as(_file_of(cell.name), RESULT.validate_python) if self.has(cell) else None

    def finish(self, result: CellResult) -> None:
        """Store the result of a cell, unless it failed: the next call tries that again."""
        if result.figures is not None:
            self._keep(result.cell.name, asdict(result))

    def dense(self) -> Figures | None:
        """Return the figures of the dense model, or None where they are not stored."""
        name = _file_of(DENSE)
        return self.read_as(name, FIGURES.validate_python) if self.holds(name) else None

    def keep_dense(self, figures: Figures) -> None:
        """Store the figures of the dense model."""
        self._keep(DENSE, asdict(figures))

    def conclude(self, comparison: Comparison) -> None:
        """Write the tables and the page of a comparison, each file whole or not at all."""
        self.keep_texts({JSON: comparison.to_json(), TABLE: comparison.markdown(), PAGE: comparison.page()})

    def _keep(self, name: str, content: dict[str, Any]) -> None:
        self.subfolder(CELLS)
        self.write(_file_of(name), content)


def _file_of(name: str) -> str:
    return f"{CELLS}/{name}.json"
