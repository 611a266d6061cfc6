"""Progress on stderr: in a terminal a bar with the time left, elsewhere a plain line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from optprune.report import Event

LINES_APART = 10.0
"""the seconds between two lines where there is no terminal"""

Update = Callable[[int, int], None]
"""a function that is called with how many are done, and of how many"""


def _nothing(done: int, total: int) -> None:
    """What hears of no phase."""


class Reporter:
    """Tells a person how far a run is."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """One line, as it is."""
        self.console.print(Text(text), highlight=False, soft_wrap=True)

    @contextmanager
    def count(self, what: str, unit: str) -> Iterator[Update]:
        """Follow a loop: yields the function to call after each step."""
        follow = self._bar if self.console.is_terminal else self._lines
        with follow(what, unit) as update:
            yield update

    @contextmanager
    def blocks(self) -> "Iterator[Callable[[Event], None]]":
        """Follow a pruning run: yields the function to hand to `prune` as on_event.

        What comes before the blocks is followed by itself, so that the time left of each phase is from its own speed.
        """
        from optprune.report import BlockFinished, BlockMeasured, BlockStarted, PartsScored, PhaseAdvanced

        with ExitStack() as open_phase:
            phase = ""
            update: Update = _nothing

            def follow(what: str, unit: str, done: int, total: int) -> None:
                nonlocal phase, update
                if what != phase:
                    open_phase.close()
                    phase, update = what, open_phase.enter_context(self.count(what, unit))
                update(done, total)

            def on_event(event: "Event") -> None:
                if isinstance(event, PhaseAdvanced):
                    follow(event.phase, event.unit, event.done, event.total)
                elif isinstance(event, BlockStarted):
                    follow("pruning", "block", event.block if event.done is None else event.done, event.blocks)
                elif isinstance(event, BlockFinished):
                    follow("pruning", "block", event.block + 1 if event.done is None else event.done, event.blocks)
                elif isinstance(event, BlockMeasured):
                    follow("measuring what blocks would lose", "block", event.block + 1, event.blocks)
                    if event.block + 1 == event.blocks:
                        self.say("the budget is divided by what the layers would lose")
                elif isinstance(event, PartsScored):
                    follow("choosing sub-blocks to remove", "weight", event.weights, event.budget)

            yield on_event

    @contextmanager
    def _bar(self, what: str, unit: str) -> Iterator[Update]:
        columns = (TextColumn(f"{what}, {unit}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), _TimeLeft())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=None, updated=0.0)
            began = time.monotonic()
            yield lambda done, total: progress.update(
                task, completed=done, total=total, updated=time.monotonic() - began
            )

    @contextmanager
    def _lines(self, what: str, unit: str) -> Iterator[Update]:
        began = time.monotonic()
        last = -LINES_APART

        def update(done: int, total: int) -> None:
            nonlocal last
            passed = time.monotonic() - began
            if done and (done == total or passed - last >= LINES_APART):
                last = passed
                left = duration(passed / done * (total - done)) + " left" if done < total else f"in {duration(passed)}"
                self.say(f"{what}, {unit} {done} of {total}, {left}")

        yield update


class _TimeLeft(ProgressColumn):
    """The time left by the mean speed so far: blocks take long, so the speed of the last seconds says nothing."""

    def render(self, task: Task) -> Text:
        """The time left, in words."""
        updated = task.fields["updated"]
        if not task.completed or task.total is None:
            return Text("")
        left = updated / task.completed * task.total - (task.elapsed or updated)
        return Text(f"{duration(max(left, 0.0))} left")


def duration(seconds: float) -> str:
    """A time in words, such as 45 s, 3 min 20 s or 1 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
