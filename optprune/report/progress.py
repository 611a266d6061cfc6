"""Progress on stderr: in a terminal bars with the time left of the whole run, elsewhere a plain line now and then."""

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
"""the seconds between two lines where there is no terminal"""
WHOLE = "the whole run"
IN_ALL = "left in all"
"""what the time left is called where it is of everything that there is to wait for"""

Update = Callable[[int, int], None]
"""a function that is called with how many are done, and of how many"""
Say = Callable[[str], None]
Show = Callable[[Position], None]


class Reporter:
    """Tells a person how far a run is."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        log: Say | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`log` takes every line that is told where there is no terminal, also where there is one."""
        self.console, self._log, self._clock = console or Console(stderr=True), log, clock
        # What draws in a notebook is a widget, which not every notebook has.
        self._draws = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)

    def say(self, text: str) -> None:
        """One line, without what a terminal would obey."""
        text = printable(text)
        self._print(text)
        if self._log is not None:
            self._log(text)

    def _write(self, text: str) -> None:
        """A line of the log alone."""
        if self._log is not None:
            self._log(printable(text))

    def _print(self, text: str) -> None:
        self.console.print(Text(text), highlight=False, soft_wrap=True)

    @contextmanager
    def count(self, what: str, unit: str) -> Iterator[Update]:
        """Follow a loop that is all there is to do: yields the function to call after each step."""
        estimate = TimeLeft({}, self._clock)
        with self._follow(estimate, "left", begins=what) as show:
            estimate.advance(what, what, 0.0)
            yield lambda done, total: show(Position(what, what, unit, done, total, done / total if total else 1.0))

    @contextmanager
    def events(self, expected: Mapping[str, float], left: str = IN_ALL) -> Iterator[Callable[[Event], None]]:
        """Follow a pruning run: yields the function to hand to `prune` as on_event.

        `expected` has the seconds of each phase, as far as they are known: what is told is the time left of them all.
        `left` says of what that is, where it is not everything that the person waits for.
        """
        positions, estimate, began = PositionTracker(), TimeLeft(expected, self._clock), self._clock()
        with self._noting_errors(), self._follow(estimate, left) as show:

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
    def _noting_errors(self) -> Iterator[None]:
        """Have the log end with what ended the run, which whoever catches it tells on the screen."""
        try:
            yield
        except BaseException as error:
            self._write(f"stopped: {one_line(str(error)) or type(error).__name__}")
            raise

    @contextmanager
    def _follow(self, estimate: TimeLeft, left: str, begins: str | None = None) -> Iterator[Show]:
        """Yields the function that shows a position, wherever it is to be seen; the step `begins` now."""
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
    """A plain line with the time left now and then, and one at the end of each step."""

    def __init__(
        self, say: Say, estimate: TimeLeft, left: str, clock: Callable[[], float], begins: str | None = None
    ) -> None:
        self._say, self._estimate, self._left, self._clock = say, estimate, left, clock
        self._began: dict[str, float] = {} if begins is None else {begins: clock()}
        """when each step began"""
        self._last: float | None = None
        """when the time left was told last"""

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
    """A bar for the step at work, and one for the whole run with the time left."""
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
    """The time left, on the bar of the whole run; looked up anew whenever it is drawn."""

    def __init__(self, estimate: TimeLeft, left: str) -> None:
        super().__init__()
        self._estimate, self._left = estimate, left

    def render(self, task: Task) -> Text:
        """The time left, in words."""
        return Text(_time_left_text(self._estimate, "", self._left) if task.fields["whole"] else "")


def _time_left_text(estimate: TimeLeft, before: str, left: str) -> str:
    return f"{before}{about(estimate.seconds())} {left}" if estimate.known else ""


def about(seconds: float) -> str:
    """A time that is not known well, in words, such as about 40 s, about 3 min or about 1 h 05 min."""
    if seconds < 5:
        return "a few seconds"
    if seconds < 90:
        return f"about {5 * round(seconds / 5)} s"
    if seconds < 3600:
        return f"about {round(seconds / 60)} min"
    return f"about {duration(seconds)}"


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
