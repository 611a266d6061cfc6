"""Errors as one sentence on stderr and an exit status; a traceback only on request."""

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

import typer

from optprune.cli.outputs import echo
from optprune.errors import OptpruneError, is_out_of_memory, no_room
from optprune.system.interrupts import NOTHING, done_sentence, forget_done
from optprune.system.wording import one_line

INTERRUPTED = 130
FAILED = 2
LONGEST = 4000
"""the most characters of a sentence; one that lists the reasons of all solvers is half as long"""

P = ParamSpec("P")


def open_standard_streams() -> None:
    """Open stdin, stdout and stderr, where the shell has closed them (`2>&-`), to the null device.

    A file would get the number of a closed one, and what is printed would be written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            free = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(free, True)
            setattr(sys, name, os.fdopen(free, mode, closefd=False))


def report_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Return the command, with its errors printed as one sentence, also when typer runs it without `main`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        forget_done()
        try:
            command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(report_error(error)) from error

    return run


def report_error(error: BaseException) -> int:
    """Print what went wrong as one sentence on stderr; return the exit status."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # The reader (head, less) has closed the pipe; Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if os.environ.get("OPTPRUNE_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        echo(f"interrupted; {done_sentence()}", err=True)
        return INTERRUPTED
    # The sentence may hold untrusted names of files, tensors and columns; echo makes them printable.
    echo(f"error: {_sentence(error)}", err=True)
    return FAILED


def _with_done(text: str) -> str:
    """Return a sentence with the results that are kept, which an error of ours names itself."""
    done = done_sentence()
    return text if done == NOTHING else f"{text}; {done}"


def _remedy(error: OSError) -> str:
    """Return what to do about an error of the operating system, where it says too little itself."""
    many = error.errno in (errno.EMFILE, errno.ENFILE)
    return ": let a process open more of them (ulimit -n 1024)" if many else ""


def _sentence(error: BaseException) -> str:
    if isinstance(error, OptpruneError):
        text = str(error)
    elif hasattr(error, "format_message"):  # a wrong option or argument, in typer's words
        context = getattr(error, "ctx", None)
        command = "optprune" if context is None else context.command_path
        text = f"{error.format_message().rstrip('.')} (see {command} --help)"  # type: ignore[attr-defined]
    elif is_out_of_memory(error):
        text = (
            "the memory is not enough: lower --samples, --seq-length, --batch or --prompt-tokens (whichever the "
            "command takes), or use --dtype bfloat16"
        )
        text = _with_done(text)
    elif (full := no_room(error)) is not None:
        text = f"{full} ({done_sentence()}): make room and run again"
    elif isinstance(error, OSError):
        text = _with_done(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}{_remedy(error)}")
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        text = f"{type(error).__name__}: {first} (unexpected: set OPTPRUNE_DEBUG=1 for the traceback, and report it)"
        text = _with_done(text)
    return one_line(text, LONGEST)
