"""Progress: every long phase of a run shows how far it is, and the remaining time of the whole run."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from optprune.allocation.currency import prices_of
from optprune.models import Decoder, Mlp, Values
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.report import (
    BlockFinished,
    BlockStarted,
    LayerSolved,
    PhaseAdvanced,
    PhaseFinished,
    PhaseReport,
    PhaseStarted,
)
from optprune.report.estimate import SOLVED_SHARE, PositionTracker
from optprune.report.progress import Reporter, about
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches

METRIC = "measuring the output metric"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """Reporter on a console, with its output and its log."""

    def __init__(self, terminal: bool) -> None:
        self.clock, self.stream, self.log = Clock(), io.StringIO(), list[str]()
        console = Console(file=self.stream, force_terminal=terminal, width=200, get_time=self.clock)
        self.reporter = Reporter(console, log=self.log.append, clock=self.clock)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def run(screen: Screen) -> None:
    """A run that takes as long as it was expected to: 10 000 s of the metric, then 30 blocks of 30 s each."""
    expected = {"metric": 10_000.0, "budget": 0.0, "pruning": 900.0, "saving": 40.0}
    with screen.reporter.events(expected) as on_event:
        on_event(PhaseStarted("metric"))
        for group in range(4):
            on_event(PhaseAdvanced("metric", METRIC, "group", group, 4))
            screen.clock.now += 2500
        on_event(PhaseAdvanced("metric", METRIC, "group", 4, 4))
        on_event(PhaseFinished(PhaseReport("metric", 10_000.0, None, None)))
        on_event(PhaseStarted("pruning"))
        for block in range(30):
            on_event(BlockStarted(block, 30))
            screen.clock.now += 30
            on_event(BlockFinished(block, 30, 30.0))
        on_event(PhaseFinished(PhaseReport("pruning", 900.0, None, None)))


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_tell_the_time_left_of_the_whole_run(terminal: bool) -> None:
    """Where there is a terminal they are in the log, and the terminal shows bars."""
    screen = Screen(terminal)
    run(screen)
    assert screen.log[:3] == [f"{METRIC}, group {done} of 4, about {left} left in all" for done, left in LEFT]
    assert screen.log[3] == f"{METRIC}, group 4 of 4, in 2 h 46 min"
    assert screen.log[4] == "pruning, block 1 of 30, about 15 min left in all"
    assert screen.log[-3:] == [
        "pruning, block 29 of 30, about 70 s left in all",
        "pruning, block 30 of 30, in 15 min 00 s",
        "the whole run, in 3 h 01 min",
    ]
    if terminal:
        for words in (METRIC, "group 0 of 4", "pruning", "block 30 of 30", "the whole run", "about 40 s left in all"):
            assert words in screen.stream.getvalue()
        assert not set(screen.lines) & set(screen.log)
        assert screen.lines[-1].endswith(screen.log[-1])
    else:
        assert screen.lines == screen.log


LEFT = ((1, "2 h 20 min"), (2, "1 h 39 min"), (3, "57 min"))
"""the remaining part of 10 940 s after each quarter of the metric"""


def test_lines_are_some_seconds_apart_but_for_the_ends_of_steps() -> None:
    screen = Screen(False)
    with screen.reporter.events({"metric": 100.0}) as on_event:
        on_event(PhaseAdvanced("metric", METRIC, "pass", 0, 100))
        for done in range(1, 101):
            screen.clock.now += 1
            on_event(PhaseAdvanced("metric", METRIC, "pass", done, 100))
    counts = [int(line.split()[5]) for line in screen.lines[:-1]]
    assert counts == [*range(1, 100, 10), 100]


def test_a_step_of_one_is_told_when_it_begins() -> None:
    screen = Screen(False)
    with screen.reporter.events({"loading": 100.0}) as on_event:
        on_event(PhaseAdvanced("loading", "loading demo", "step", 0, 1))
        screen.clock.now += 90
        on_event(PhaseAdvanced("loading", "loading demo", "step", 1, 1))
    assert screen.lines == ["loading demo, about 2 min left in all", "loading demo, in 1 min 30 s", screen.log[-1]]


def test_a_loop_by_itself_is_the_whole() -> None:
    screen = Screen(False)
    with screen.reporter.count("evaluating", "window") as update:
        for done in range(3):
            update(done, 2)
            screen.clock.now += 60
    assert screen.lines == ["evaluating, window 1 of 2, about 60 s left", "evaluating, window 2 of 2, in 2 min 00 s"]


def test_a_phase_that_fails_ends_its_bars() -> None:
    screen = Screen(True)
    with pytest.raises(ZeroDivisionError), screen.reporter.events({}) as on_event:
        on_event(PhaseAdvanced("metric", METRIC, "group", 0, 4))
        raise ZeroDivisionError
    assert screen.log == ["stopped: ZeroDivisionError"]
    with screen.reporter.events({}) as on_event:  # rich refuses a second bar beside one that is still there
        on_event(BlockStarted(0, 1))


def test_times_are_told_as_roughly_as_they_are_known() -> None:
    assert list(map(about, (0, 4, 42, 88, 200, 4000))) == [
        *("a few seconds", "a few seconds", "about 40 s", "about 90 s", "about 3 min", "about 1 h 06 min")
    ]


def test_solved_layers_are_parts_of_a_block() -> None:
    positions, solved = PositionTracker(), LayerSolved(None)  # type: ignore[arg-type]  # whatever it says
    events = [BlockStarted(1, 4, layers=(0.25, 0.75)), solved, solved, BlockFinished(1, 4, 1.0), solved]
    shares = [position and position.share for position in map(positions.after, events)]
    assert shares == [0.25, (1 + 0.25 * SOLVED_SHARE) / 4, (1 + SOLVED_SHARE) / 4, 0.5, None]


def phases(recipe: str, **fields: Any) -> list[Any]:
    events: list[Any] = []
    few = list(torch.randint(512, (6, 2, 16), generator=torch.Generator().manual_seed(0)))
    prune(tiny_llama(), few, load_recipe(recipe, fields), on_event=events.append)
    return events


def counts(events: list[Any], step: str) -> list[tuple[int, int]]:
    return [(event.done, event.total) for event in events if isinstance(event, PhaseAdvanced) and event.step == step]


def test_the_phases_of_a_recipe_with_a_metric_and_probes() -> None:
    events = phases("structured_best", **{"allocation.probe_tokens": 32})
    metric = counts(events, METRIC)
    assert metric[0] == (0, metric[-1][1]) and metric[-1][0] == metric[-1][1]
    assert metric == sorted(set(metric))
    assert counts(events, "measuring the costs of removal") == [(0, 2), (1, 2), (2, 2)]
    names = [
        event.phase if isinstance(event, PhaseStarted) else event.phase.name for event in events if of_phases(event)
    ]
    assert names == ["metric", "metric", "budget", "budget", "pruning", "pruning"]
    # Progress of a phase is shown while it lasts.
    at_work = ""
    for event in events:
        if isinstance(event, PhaseStarted):
            at_work = event.phase
        else:
            phase = event.phase.name if isinstance(event, PhaseFinished) else getattr(event, "phase", "pruning")
            assert phase == at_work


def of_phases(event: object) -> bool:
    return isinstance(event, PhaseStarted | PhaseFinished)


def test_the_phase_that_chooses_sub_blocks_says_when_it_begins() -> None:
    scored = counts(phases("depth", sparsity=0.3), "choosing sub-blocks to remove")
    assert scored[0][0] == 0
    assert 0 < scored[1][0] <= 2 * scored[1][1]


def test_the_phase_that_times_narrower_blocks() -> None:
    timed: list[tuple[int, int]] = []
    prices_of(Decoder(tiny_llama()), "time", 16, [Mlp(), Values()], lambda done, total: timed.append((done, total)))
    assert timed == [(0, 2), (1, 2), (2, 2)]


def test_prune_shows_its_progress_where_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[object] = []
    prune(tiny_llama(), batches(), load_recipe("fasp"))
    assert capsys.readouterr().err == ""
    prune(tiny_llama(), batches(), load_recipe("fasp"), progress=True, on_event=events.append)
    assert "pruning, block 2 of 2, in " in capsys.readouterr().err
    assert any(isinstance(event, BlockFinished) for event in events)


def test_a_loop_that_is_told_of_once_took_the_time_since_it_began() -> None:
    screen = Screen(False)
    with screen.reporter.count("evaluating", "window") as update:
        screen.clock.now += 27
        update(2, 2)
    assert screen.lines == ["evaluating, window 2 of 2, in 27 s"]
