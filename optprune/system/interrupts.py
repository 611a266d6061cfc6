"""Ctrl-C and SIGTERM: each raises KeyboardInterrupt, and is recorded until a step of the work sees it.

Python ignores errors that are raised in a finaliser or in the callback of a weak reference, and prints them: it does
not print such an interrupt, and the next step raises it again. Interrupts are delayed during steps that must not be
left half done.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NOTHING = "nothing was written"
_DONE: list[str] = []
_RECEIVED: list[int] = []
"""the latest signal, until the end of the command"""


def raise_on_signals() -> Callable[[], None]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt in the main thread; return a function that restores the handlers.

    SIGINT stays ignored if it is, as in a background job of a shell.
    """
    _RECEIVED.clear()
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def interrupt(number: int, frame: FrameType | None) -> None:
        _RECEIVED[:] = [number]
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM] if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, interrupt) for number in numbers}

    print_ignored = sys.unraisablehook

    def print_others(ignored: "sys.UnraisableHookArgs") -> None:
        if not (_RECEIVED and ignored.exc_type is KeyboardInterrupt):
            print_ignored(ignored)

    sys.unraisablehook = print_others

    def restore() -> None:
        sys.unraisablehook = print_ignored
        _RECEIVED.clear()
        for number, handler in before.items():
            _handle(number, handler)

    return restore


def check_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal was received; called between steps."""
    if _RECEIVED:
        raise KeyboardInterrupt


def record_done(sentence: str) -> None:
    """Record a sentence about results that an interrupt does not undo; the command line prints it."""
    _DONE[:] = [sentence]


def forget_done() -> None:
    """Delete the recorded sentence, at the start of a command."""
    _DONE.clear()


def done_sentence() -> str:
    """Return the sentence that was recorded last."""
    return _DONE[0] if _DONE else NOTHING


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to the end of the context, and then call their earlier handlers.

    A handler that raises does so there. In threads other than the main one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: dict[int, FrameType | None] = {}
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def remember(number: int, frame: FrameType | None) -> None:
        came[number] = frame

    # SIGINT, which a user may send repeatedly, is delayed first and delivered last: it never leaves a step half done.
    # The handler of SIGTERM may raise in between: hence a `finally` for each step.
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
    if handler is not None:  # a handler from outside Python cannot be restored
        signal.signal(number, handler)


def _deliver(number: int, handler: Any, came: dict[int, FrameType | None]) -> None:
    if number not in came:
        return
    if callable(handler):
        handler(number, came[number])
    else:
        signal.raise_signal(number)
