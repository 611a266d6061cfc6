"""Ctrl-C and SIGTERM: each raises KeyboardInterrupt, and is remembered until a step of the work sees it.

Python drops what is raised in a finaliser, so an interrupt that lands there is raised again by the next step. Where a
half-done step would be worse than a moment's wait, interrupts are held.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NOTHING = "nothing was written"
_DONE: list[str] = []
_CAME: list[int] = []
"""the signal that came last, until the command that it ends is over"""


def raise_on_signals() -> Callable[[], None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt in the main thread; returns what puts the old handlers back.

    SIGINT stays ignored where it is, as in a background job of a shell.
    """
    _CAME.clear()
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def interrupt(number: int, frame: FrameType | None) -> None:
        _CAME[:] = [number]
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM] if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, interrupt) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            _handle(number, handler)

    return restore


def check_interrupted() -> None:
    """Raise KeyboardInterrupt where a signal came whose KeyboardInterrupt nobody saw; called between steps."""
    if _CAME:
        raise KeyboardInterrupt


def record_done(sentence: str) -> None:
    """Say what an interrupt does not undo from now on; the command line tells it."""
    _DONE[:] = [sentence]


def forget_done() -> None:
    """A new command begins: nothing is done."""
    _DONE.clear()


def done_sentence() -> str:
    """What has been recorded last."""
    return _DONE[0] if _DONE else NOTHING


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM that come during the block take effect when it is over, by whatever handled them before.

    Only the main thread can hold them, and a handler that raises raises there; in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: dict[int, FrameType | None] = {}
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def remember(number: int, frame: FrameType | None) -> None:
        came[number] = frame

    # SIGINT, which comes in numbers when somebody is impatient, is the first to be held and the last to be let go, so
    # nothing is ever left half done by it. A handler of SIGTERM may raise in between: hence a `finally` for each step.
    try:
        try:
            _handle(signal.SIGINT, None if interrupt is None else remember)
            _handle(signal.SIGTERM, None if terminate is None else remember)
            yield
        finally:
            try:
                _handle(signal.SIGTERM, terminate)
            finally:
                _handle(signal.SIGINT, interrupt)
    finally:
        try:
            _deliver(signal.SIGTERM, terminate, came)
        finally:
            _deliver(signal.SIGINT, interrupt, came)


def _handle(number: int, handler: Any) -> None:
    if handler is not None:  # one that was not set from Python could not be put back
        signal.signal(number, handler)


def _deliver(number: int, handler: Any, came: dict[int, FrameType | None]) -> None:
    if number not in came:
        return
    if callable(handler):
        handler(number, came[number])
    else:
        signal.raise_signal(number)
