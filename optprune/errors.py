"""The errors of optprune, whose messages are sentences with the cause and the remedy."""

import errno
import operator
import re

from optprune.system.wording import shown

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EFBIG: "a file would be larger than the file system or a limit (ulimit -f) allows",
}


class OptpruneError(Exception):
    """Base of every error that optprune raises on purpose; the command line prints it and exits with 2."""


class InputError(OptpruneError, ValueError):
    """Something the user gave (a path, a number, a text, a model) cannot be used: a ValueError, as Python names it."""


class NumericalError(OptpruneError):
    """A matrix violates an assumption of the mathematics (NaN, indefinite); nothing was silently replaced."""


class NoSolver(OptpruneError):
    """No solver accepts the problem; the message lists each solver's reason."""


class StrictError(OptpruneError):
    """Strict mode met a fallback, a dead input, tokens that are too few or too alike, or a missed budget."""


class OwnCodeError(OptpruneError):
    """A solver, an objective or another part that the user wrote has failed; the cause is its own error."""


class WorkerError(OptpruneError):
    """A process or a machine that did a part of the work has failed."""


def check_at_least(option: str, value: float | None, least: float) -> None:
    """Raise InputError where the value of an option is too small or NaN; None is no value."""
    if value is not None and not value >= least:
        raise InputError(f"{option} cannot be {value}: it is at least {least}")


def check_kind(what: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raise InputError, whose message ends with the remedy, where a value is not of a kind."""
    if not isinstance(value, kind):
        plain = value is None or isinstance(value, str | int | float | type)
        given = shown(value) if plain else f"of type {type(value).__name__}"
        raise InputError(f"{what} cannot be {given}: {remedy}")


LARGEST_COUNT = 2**63 - 1
"""the largest whole number that a tensor holds; a message shows it whole"""


def check_count(what: str, value: object) -> None:
    """Raise InputError unless a value is a whole number that is not negative, and that a tensor holds."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]  # the error says whether it has an index
    except TypeError:
        count = -1
    if count < 0:
        raise InputError(f"{what} cannot be {shown(value)}: give a whole number of at least 0")
    if count > LARGEST_COUNT:
        raise InputError(f"{what} cannot be {shown(value)}: give a smaller number")


NO_MEMORY = ("out of memory", "can't allocate memory", "can't start new thread", "std::bad_alloc", "failed to map")
"""words of an error of Python or torch that has no memory, for a thread's stack or for a library too"""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python or torch reports that memory is exhausted, or a limit of it (ulimit -v)."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError) and any(map(words.__contains__, NO_MEMORY))
    )


def no_room_behind(error: BaseException) -> str | None:
    """Return what is exhausted where an error or its cause reports a lack of space, else None."""
    return no_room(error) or (None if error.__cause__ is None else no_room(error.__cause__))


def no_room(error: BaseException) -> str | None:
    """Return what is exhausted where an error of Python, numpy or a Rust library reports a lack of space, else None."""
    if isinstance(error, OSError):
        # numpy's message, whose error has no number.
        cut_short = error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error))
        return "the disk has no room for a file" if cut_short else NO_ROOM.get(error.errno or 0)
    code = re.search(r"\(os error (\d+)\)", str(error))
    return NO_ROOM.get(int(code[1])) if code else None
