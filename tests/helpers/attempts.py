"""A prune command that would work; a test spoils one thing and sees what is said. The fixtures are in conftest.py."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from optprune.cli import main

SMALL = {"--samples": "8", "--seq-length": "64"}
PROGRESS = (
    *("planned", "tokenising", "loading", "reading", "measuring", "choosing", "passing", "pruning"),
    *("computing", "saving", "starting", "checking", "evaluating"),
)
"""how the lines begin that are no sentence about an error"""


@dataclass
class Attempt:
    """A prune command that would work; a test spoils one thing and sees what is said."""

    model: Path
    text: Path
    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def output(self) -> Path:
        return self.folder / "new" / "out"

    def command(self, *more: str, **options: object) -> list[str]:
        given = {"--calibration": self.text, "--output": self.output, **SMALL}
        given |= {"--" + name.replace("_", "-"): value for name, value in options.items()}
        words = [str(word) for pair in given.items() for word in pair]
        return ["prune", str(self.model), *words, *more]

    def evaluate(self, *more: str) -> list[str]:
        words = ("--text", str(self.text), "--seq-length", "64", "--windows", "2")
        return ["evaluate", str(self.model), *words, *more]

    def fails(self, command: list[str], code: int = 2, *, keeps_run: bool = False) -> str:
        """The sentence; the test's folder must be as it was, but for the finished blocks where a run `keeps` them."""
        before = snapshot(self.folder)
        self.capsys.readouterr()  # what making the test's files has said
        assert main(command) == code
        captured = self.capsys.readouterr()
        assert captured.out == ""
        run = self.output.with_name(f"{self.output.name}.run")
        assert keeps_run == run.exists()
        kept = {str(folder) for folder in run.parents} if keeps_run else set()
        left = {name: data for name, data in snapshot(self.folder).items() if not name.startswith(str(run))}
        assert {name: data for name, data in left.items() if name in before or name not in kept} == before
        sentences = [line for line in captured.err.splitlines() if not line.startswith(PROGRESS)]
        assert len(sentences) == 1, captured.err
        assert sentences[0].startswith("error: ")
        return sentences[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}
