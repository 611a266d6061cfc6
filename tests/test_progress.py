"""Progress: every long phase of a run tells how far it is, and the time left is from the speed of that phase alone."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from optprune.allocation.currency import prices_of
from optprune.cli import progress
from optprune.cli.progress import Reporter
from optprune.models import Decoder, Mlp, Values
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.report import BlockFinished, BlockMeasured, BlockStarted, PartsScored, PhaseAdvanced
from tests.tiny_models import tiny_llama


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize("terminal", [False, True])
def test_the_time_left_does_not_count_what_came_before_the_blocks(clock: Clock, terminal: bool) -> None:
    told = io.StringIO()
    console = Console(file=told, force_terminal=terminal, width=200, get_time=clock.monotonic)
    with Reporter(console).blocks() as on_event:
        for group in range(4):
            on_event(PhaseAdvanced("measuring the output metric", "group", group, 4))
            clock.now += 2500  # 10 000 s of the metric
        on_event(PhaseAdvanced("measuring the output metric", "group", 4, 4))
        for block in range(30):
            on_event(BlockStarted(block, 30))
            clock.now += 30
            on_event(BlockFinished(block, 30, 30.0))
            if block == 1 and not terminal:
                last = told.getvalue().splitlines()[-1]
                assert last == "pruning, block 2 of 30, 14 min 00 s left"
    if not terminal:
        lines = told.getvalue().splitlines()
        assert "measuring the output metric, group 1 of 4, 2 h 05 min left" in lines
        assert "measuring the output metric, group 4 of 4, in 2 h 46 min" in lines
        assert lines[-1] == "pruning, block 30 of 30, in 15 min 00 s"
    else:
        assert "measuring the output metric, group" in told.getvalue()
        assert "pruning, block" in told.getvalue()


def test_a_phase_that_fails_ends_its_bar(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, get_time=clock.monotonic)
    with pytest.raises(ZeroDivisionError), Reporter(console).blocks() as on_event:
        on_event(PhaseAdvanced("measuring the output metric", "group", 0, 4))
        raise ZeroDivisionError
    with Reporter(console).blocks() as on_event:  # rich refuses a second bar beside one that is still there
        on_event(BlockStarted(0, 1))


def phases(recipe: str, **fields: Any) -> list[Any]:
    events: list[Any] = []
    batches = list(torch.randint(512, (6, 2, 16), generator=torch.Generator().manual_seed(0)))
    prune(tiny_llama(), batches, load_recipe(recipe, fields), on_event=events.append)
    return events


def counts(events: list[Any], phase: str) -> list[tuple[int, int]]:
    return [(event.done, event.total) for event in events if isinstance(event, PhaseAdvanced) and event.phase == phase]


def test_the_phases_of_a_recipe_with_a_metric_and_probes() -> None:
    events = phases("structured_best", probe_tokens=32)
    metric = counts(events, "measuring the output metric")
    assert metric[0] == (0, metric[-1][1])
    assert [done for done, _ in metric] == list(range(metric[-1][1] + 1))
    assert counts(events, "measuring what blocks would lose") == [(0, 2), (1, 2)]
    kinds = [type(event) for event in events]
    assert kinds.index(BlockMeasured) < kinds.index(BlockStarted)
    assert max(i for i, kind in enumerate(kinds) if kind is PhaseAdvanced) < kinds.index(BlockStarted)


def test_the_phase_that_chooses_sub_blocks_says_when_it_begins() -> None:
    scored = [event for event in phases("depth", sparsity=0.3) if isinstance(event, PartsScored)]
    assert scored[0].weights == 0
    assert 0 < scored[1].weights <= 2 * scored[1].budget


def test_the_phase_that_times_narrower_blocks() -> None:
    timed: list[tuple[int, int]] = []
    prices_of(Decoder(tiny_llama()), "time", 16, [Mlp(), Values()], lambda done, total: timed.append((done, total)))
    assert timed == [(0, 2), (1, 2), (2, 2)]
