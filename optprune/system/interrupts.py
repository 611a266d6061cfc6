"""Ctrl-C and SIGTERM: held where a half-done step would be worse than a moment's wait; and what is done by then."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_DONE: list[str] = []


def record_done(sentence: str) -> None:
    """Say what an interrupt does not undo from now on; the command line tells it."""
    _DONE[:] = [sentence]


def forget_done() -> None:
    """A new command begins: nothing is done."""
    _DONE.clear()


def what_is_done() -> str:
    """What has been recorded last."""
    return _DONE[0] if _DONE else "nothing was written"


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
