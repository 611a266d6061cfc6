"""The seconds of a cell: those of its run, and of what other cells have measured for it, no more and no less."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import optprune
from optprune import Statistics
from optprune.comparison import session
from optprune.report import Report
from tests.helpers.two_texts import TwoTexts, loaded

RUN, EACH = 7.0, 100.0
"""the seconds that every run is said to take, and everything that it need not measure"""


def test_a_cell_takes_its_run_and_what_was_measured_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune, calls = session.prune, list[int]()

    def save(self: Statistics, seconds: float) -> None:
        self.seconds_saved += EACH
        if calls:  # else the model is measured for all of them, before the first
            calls[-1] += 1

    def timed(*arguments: Any, **options: Any) -> Report:
        calls.append(0)
        return replace(prune(*arguments, **options), seconds=RUN)

    monkeypatch.setattr(Statistics, "_add_saved", save)
    monkeypatch.setattr(session, "prune", timed)
    recipes = ["magnitude", "structured_best", "structured_uniform_best"]
    found = optprune.compare(loaded(), recipes, [0.2, 0.3], **TwoTexts.into(tmp_path).asked())
    cells = [result for result in found.results if result.figures is not None]
    assert len(cells) == len(calls) == 6
    assert sum(calls) > len(calls)
    for result, count in zip(cells, calls, strict=True):
        assert result.figures is not None
        assert (result.spent, result.figures.seconds) == (RUN, RUN + count * EACH)
