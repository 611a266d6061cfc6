"""Problems in files, as `optprune problems` or the gallery writes them."""

import json
from pathlib import Path
from typing import Any

from benchopt import BaseDataset

from optprune.problems import load_problem


class Dataset(BaseDataset):
    """One file of a folder: `-d "Files[folder=problems,file=layer]"`; the gallery's best bounds are read beside it."""

    name = "Files"
    parameters = {"folder": ["problems"], "file": ["layer"]}
    test_parameters = {"folder": ["example"], "file": ["tiny"]}

    def skip(self, folder: str | None = None, file: str | None = None) -> tuple[bool, str | None]:
        """Return whether there is no such file."""
        missing = not self._path.exists()
        return missing, f"there is no file {self._path}" if missing else None

    @property
    def _path(self) -> Path:
        folder = Path(__file__).parents[1] / "example" if self.folder == "example" else Path(self.folder)
        return folder / f"{self.file}.safetensors"

    def get_data(self) -> dict[str, Any]:
        """Return the problem, with the best bound that the gallery knows of it."""
        known = Path(__file__).parents[2] / "results" / "gallery.json"
        best = json.loads(known.read_text(encoding="utf-8"))["instances"] if known.exists() else {}
        problem = load_problem(self._path)
        entry = best.get(self.file, {})
        same = entry.get("fingerprint") == problem.fingerprint()
        return {"problem": problem, "bound": entry.get("bound") if same else None}
