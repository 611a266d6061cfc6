"""Folder of a frontier: finished rows, the files that are timed, pruned models, and the final page."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from optprune.comparison.frontier import Frontier, FrontierRow, Speed
from optprune.system.files import real_path
from optprune.system.folders import ManifestFolder

ROWS, FILES, PRUNED, MODELS = "rows", "files", "pruned", "models"
JSON, TABLE, PAGE, SPEEDS = "frontier.json", "frontier.md", "frontier.html", "speeds.json"
ROW, SPEEDS_OF = TypeAdapter(FrontierRow), TypeAdapter(dict[str, Speed])


class FrontierFolder(ManifestFolder):
    """Folder with the options of a frontier, and a file for each finished row."""

    noun = "frontier"
    begin_anew = "choose another output"
    written = (f"{ROWS}/*.json", JSON, TABLE, PAGE, SPEEDS)

    def __init__(self, folder: str | Path) -> None:
        """Take a folder that is new, empty, or holds a frontier. Raises InputError otherwise."""
        super().__init__(real_path(Path(folder)))

    @property
    def worth_keeping(self) -> bool:
        return super().worth_keeping or (PRUNED in self.subfolders and any((self.folder / PRUNED).iterdir()))

    def row(self, name: str, make: Callable[[], FrontierRow]) -> FrontierRow:
        """Return a row: the stored one, or a new one, which is stored."""
        file = f"{ROWS}/{name}.json"
        if self.holds(file):
            return self.read_as(file, ROW.validate_python)
        made = make()
        self.subfolder(ROWS)
        self.write(file, asdict(made))
        return made

    def speeds(self, names: list[str], make: Callable[[], dict[str, Speed]]) -> dict[str, Speed]:
        """Return the speeds of all rows: the stored ones if they are of these rows, or new ones, which are stored."""
        if self.holds(SPEEDS):
            found = self.read_as(SPEEDS, SPEEDS_OF.validate_python)
            if set(found) == set(names):
                return found
        made = make()
        self.write(SPEEDS, {name: asdict(speed) for name, speed in made.items()})
        return made

    def conclude(self, found: Frontier) -> None:
        """Write the tables and the page, each file whole or not at all, and delete the files that were timed."""
        self.keep_texts({JSON: found.to_json(), TABLE: found.markdown(), PAGE: found.page()})
        self.remove_subfolder(FILES)
