"""Progress on stderr: bars with the remaining time in a terminal, and plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from optprune.report.estimate import Position, PositionTracker, TimeLeft
from optprune.report.events import Event, PhaseFinished, PhasesExpected, PhaseStarted
from optprune.system.display import printable
from optprune.system.interrupts import check_interrupted
from optprune.system.wording import one_line

LINE_INTERVAL = 10.0
"""the seconds between two lines without a terminal"""
WHOLE = "the whole run"
IN_ALL = "left in all"
"""the label of the remaining time where nothing follows the run"""

Update = Callable[[int, int], None]
"""a function of the number of done items and the total"""
Say = Callable[[str], None]
Show = Callable[[Position], None]


class Reporter:
    """Reporter of progress and messages to the user."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        log: Say | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Print to a console; `log` gets every line that is printed without a terminal, also when there is one."""
        self.console, self._log, self._clock = console or Console(stderr=True), log, clock
        # Bars in a notebook are widgets, which need ipywidgets.
        self._draws = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)

    def say(self, text: str) -> None:
        """Print one line, with control characters escaped."""
        text = printable(text)
        self._print(text)
        if self._log is not None:
            self._log(text)

    def _write(self, text: str) -> None:
        """Write a line to the log only."""
        if self._log is not None:
            self._log(printable(text))

    def _print(self, text: str) -> None:
        self.console.print(Text(text), highlight=False, soft_wrap=True)

    @contextmanager
    def count(self, what: str, unit: str) -> Iterator[Update]:
        """Show the progress of a loop: yields the function to call after each item."""
        estimate = TimeLeft({}, self._clock)
        with self._follow(estimate, "left", begins=what) as show:
            estimate.advance(what, what, 0.0)
            yield lambda done, total: show(Position(what, what, unit, done, total, done / total if total else 1.0))

    @contextmanager
    def events(self, expected: Mapping[str, float], left: str = IN_ALL) -> Iterator[Callable[[Event], None]]:
        """Show the progress of a run: yields the function to pass to `prune` as on_event.

        `expected` has the known seconds of each phase; the remaining time is that of all phases. `left` is its label,
        where something follows these phases.
        """
        positions, estimate, began = PositionTracker(), TimeLeft(expected, self._clock), self._clock()
        with self._logging_errors(), self._follow(estimate, left) as show:

            def on_event(event: Event) -> None:
                check_interrupted()
                if isinstance(event, PhasesExpected):
                    estimate.expect(event.seconds)
                elif isinstance(event, PhaseStarted):
                    estimate.begin(event.phase)
                elif isinstance(event, PhaseFinished):
                    estimate.end()
                elif (position := positions.after(event)) is not None:
                    show(position)

            yield on_event
        self.say(f"{WHOLE}, in {duration(self._clock() - began)}")

    @contextmanager
    def _logging_errors(self) -> Iterator[None]:
        """Write an error to the log before it is raised further."""
        try:
            yield
        except BaseException as error:
            self._write(f"stopped: {one_line(str(error)) or type(error).__name__}")
            raise

    @contextmanager
    def _follow(self, estimate: TimeLeft, left: str, begins: str | None = None) -> Iterator[Show]:
        """Yield the function that shows a position on the console and in the log; the step `begins` starts now."""
        with ExitStack() as stack:
            shows: list[Show] = []
            if self._draws:
                shows.append(stack.enter_context(_bars(self.console, estimate, left, self._clock)))
                if self._log is not None:
                    shows.append(_Lines(self._write, estimate, left, self._clock, begins).show)
            else:
                shows.append(_Lines(self.say, estimate, left, self._clock, begins).show)

            def show(position: Position) -> None:
                estimate.advance(position.phase, position.step, position.share, position.begins, position.ends)
                for each in shows:
                    each(position)

            yield show


class _Lines:
    """Plain lines: the remaining time at intervals, and the end of each step."""

    def __init__(
        self, say: Say, estimate: TimeLeft, left: str, clock: Callable[[], float], begins: str | None = None
    ) -> None:
        self._say, self._estimate, self._left, self._clock = say, estimate, left, clock
        self._began: dict[str, float] = {} if begins is None else {begins: clock()}
        """the start of each step"""
        self._last: float | None = None
        """the time of the latest line with the remaining time"""

    def show(self, position: Position) -> None:
        now, step = self._clock(), position.step
        began = self._began.setdefault(step, now)
        counts = "" if position.total <= 1 else f", {position.unit} {position.done} of {position.total}"
        if position.share >= 1:
            del self._began[step]
            self._say(f"{step}{counts}, in {duration(now - began)}")
        elif not counts or (position.done and (self._last is None or now - self._last >= LINE_INTERVAL)):
            self._last = now
            self._say(f"{step}{counts}{_time_left_text(self._estimate, ', ', self._left)}")


@contextmanager
def _bars(console: Console, estimate: TimeLeft, left: str, clock: Callable[[], float]) -> Iterator[Show]:
    """Show a bar for the current step, and one for the whole run with the remaining time."""
    began = clock()
    words = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[counts]}", markup=False)
    with Progress(*words, BarColumn(), TimeElapsedColumn(), _Left(estimate, left), console=console) as progress:
        step = progress.add_task("", total=None, counts="", whole=False)
        whole = progress.add_task(WHOLE, total=None, counts="", whole=True)
        described = ""

        def show(position: Position) -> None:
            nonlocal described
            fresh, described = position.step != described, position.step
            if fresh:
                progress.reset(step, description=printable(position.step))
            counts = "" if position.total <= 1 else f"{position.unit} {position.done} of {position.total}"
            progress.update(step, completed=position.share, total=1.0, counts=counts)
            passed = clock() - began
            progress.update(whole, completed=passed, total=passed + estimate.seconds(), refresh=fresh)

        yield show


class _Left(ProgressColumn):
    """Column with the remaining time, on the bar of the whole run."""

    def __init__(self, estimate: TimeLeft, left: str) -> None:
        super().__init__()
        self._estimate, self._left = estimate, left

    def render(self, task: Task) -> Text:
        """Return the remaining time in words."""
        return Text(_time_left_text(self._estimate, "", self._left) if task.fields["whole"] else "")


def _time_left_text(estimate: TimeLeft, before: str, left: str) -> str:
    return f"{before}{about(estimate.seconds())} {left}" if estimate.known else ""


def about(seconds: float) -> str:
    """Return an estimated time in words, such as about 40 s, about 3 min or about 1 h 05 min."""
    if seconds < 5:
        return "a few seconds"
    if seconds < 90:
        return f"about {5 * round(seconds / 5)} s"
    if seconds < 3600:
        return f"about {round(seconds / 60)} min"
    return f"about {duration(seconds)}"


def duration(seconds: float) -> str:
    """Return a time in words, such as 45 s, 3 min 20 s or 1 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
