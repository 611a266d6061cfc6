"""The time left in all: every phase that a command goes through is expected before it begins, or it is not told so."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from optprune.cli import main
from optprune.cli.demo_run import run_demo
from optprune.comparison.grid import Cell
from optprune.comparison.session import TimeLeft
from optprune.report import Event, PhasesExpected, PhaseStarted
from optprune.report.phases import CHECKING, EVALUATIONS, HEALING, PRUNING, SAVING
from optprune.report.progress import IN_ALL, Reporter
from tests.helpers.tiny_models import save_tiny, tiny_llama

SMALL = ("--samples", "4", "--seq-length", "32", "--sparsity", "0.3")
TEXT = "The report was published on Monday, and officials said that it would be read with care. " * 80


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_tiny(tiny_llama(), tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """The phases that began while a time was told that was left in all, and whether each was expected by then."""
    found, events = dict[str, bool](), Reporter.events

    @contextmanager
    def spied(self: Reporter, expected: Mapping[str, float], left: str = IN_ALL) -> Iterator[Callable[[Event], None]]:
        known = set(expected)
        with events(self, expected, left) as on_event:

            def hear(event: Event) -> None:
                if isinstance(event, PhasesExpected):
                    known.update(event.seconds)
                if isinstance(event, PhaseStarted) and left == IN_ALL:
                    found[event.phase] = event.phase in known
                on_event(event)

            yield hear

    monkeypatch.setattr(Reporter, "events", spied)
    return found


def test_all_phases_of_prune_are_expected(model: str, text: str, heard: dict[str, bool], tmp_path: Path) -> None:
    assert main(["prune", model, "--calibration", text, "--output", str(tmp_path / "out"), *SMALL]) == 0
    assert {PRUNING, SAVING, CHECKING} <= heard.keys()
    assert all(heard.values()), heard


@pytest.mark.e2e
def test_all_phases_of_the_demo_are_expected(
    model: str, text: str, heard: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"calibration": text, "evaluation": text, "samples": 4, "windows": 2, "seq_length": 64}
    monkeypatch.setattr("optprune.cli.demo_run.run_demo", partial(run_demo, model=model, **small))
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    assert {*EVALUATIONS, PRUNING, SAVING, CHECKING} <= heard.keys()
    assert all(heard.values()), heard


@pytest.mark.e2e
def test_all_phases_of_healing_are_expected(model: str, heard: dict[str, bool], tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "{number} {TEXT[:400]}"}}\n' for number in range(40)))
    words = ["--teacher", model, "--text", f"{file}:text", "--tokens", "512", "--seq-length", "32", "--batch-size", "2"]
    assert main(["heal", model, *words, "--held-out", "2", "--output", str(tmp_path / "healed")]) == 0
    assert {HEALING, SAVING, CHECKING} <= heard.keys()
    assert all(heard.values()), heard


@pytest.mark.e2e
def test_a_comparison_tells_what_is_left_of_all_cells_by_those_that_are_finished(
    model: str, tmp_path: Path, heard: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("one.txt", "two.txt")]
    for file in files:
        file.write_text(f"{file.name} {TEXT}")
    words = ["--recipes", "magnitude,wanda", "--sparsities", "0.5", "--samples", "4", "--seq-length", "32"]
    places = ["--calibration", str(files[0]), "--text", str(files[1]), "--output", str(tmp_path / "compared")]
    assert main(["compare", model, *words, *places]) == 0
    assert not heard
    told = [line for line in capsys.readouterr().err.splitlines() if line.endswith("left in all")]
    assert told == ["1 of 2 cells, a few seconds left in all"]


def test_cells_to_come_take_what_those_of_their_recipe_took() -> None:
    pace = TimeLeft()
    pace.prepare(0, 100.0)
    pace.finish(Cell("fasp", 0.1, 0), 10.0)
    pace.finish(Cell("fasp", 0.2, 0), 20.0)
    pace.finish(Cell("wanda", 0.1, 0), 60.0)
    assert pace.left([Cell("fasp", 0.3, 0)]) == 15.0
    assert pace.left([Cell("alps", 0.3, 0)]) == 30.0
    assert pace.left([Cell("fasp", 0.1, 1), Cell("wanda", 0.1, 1)]) == 15.0 + 60.0 + 100.0
