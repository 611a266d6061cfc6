"""Ctrl-C and SIGTERM where a half-done step would be worse than a moment's wait."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM that come during the block take effect when it is over, by whatever handled them before.

    Only the main thread handles signals, so in another one nothing is held, and nothing need be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, frame: Any) -> None:
        came.append(number)

    def deliver() -> None:
        for number in sorted(set(came)):
            signal.raise_signal(number)

    with ExitStack() as stack:
        stack.callback(deliver)
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not None:  # one that was not set from Python could not be put back
                stack.callback(signal.signal, number, handler)
                signal.signal(number, remember)
        yield


@contextmanager
def when_interrupted(done: str) -> Iterator[None]:
    """Let an interrupt of the block say what is done already, instead of that nothing was written."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(done) from None
