"""What a command says and writes: progress on stderr, lines on stdout, results as JSON."""

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from optprune.errors import InputError, OptpruneError
from optprune.system.display import printable
from optprune.system.environment import is_first
from optprune.system.files import real_path
from optprune.system.interrupts import interrupts_held, record_done

if TYPE_CHECKING:
    from optprune.report.progress import Reporter


BEGAN = time.monotonic()
"""when this process began, but for the start of Python itself"""


def started() -> float:
    """The seconds since this process began."""
    return time.monotonic() - BEGAN


def start(log: Callable[[str], None] | None = None) -> "Reporter":
    """Import and quieten what is heavy; the command's own progress goes to stderr, and its lines to a log as well.

    Of processes that share a run the first one tells, and the others nothing.
    """
    from rich.console import Console

    from optprune.report.progress import Reporter

    # Before transformers is imported, because its tokenizers warn when a process is forked after they ran.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import logging as hub_logging
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    # It tells of every attempt to reach a hub that is out of reach; the error that follows says so once.
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    # This one bar is not made by transformers' own tqdm, which can be switched off.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # type: ignore[attr-defined]
    return Reporter(Console(stderr=True, quiet=not is_first()), log=log if is_first() else None)


def echo(text: str, *, err: bool = False) -> None:
    """Print lines, without what a terminal would obey in them: files and models have their say in what is told."""
    for line in text.split("\n"):
        typer.echo(printable(line), err=err)


def check_json(file: Path | None, *, output: Path | None = None, models: Sequence[str] = ()) -> None:
    """Raise InputError when the JSON file could not be written at the end, or would replace one of a model's."""
    check_file(file, "JSON file", output=output, models=models)


def check_file(file: Path | None, what: str, *, output: Path | None = None, models: Sequence[str] = ()) -> None:
    """Raise InputError when a file could not be written at the end, or would replace one of a model's.

    `output` is the folder of the model to come, where it may be written; `models` are those that are read.
    """
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"the {what} {file} is a folder: name a file")
    from optprune.export.place import MODEL_FILES

    place = real_path(file)
    within = output is not None and place.parent == real_path(output)
    read = [model for model in models if Path(os.path.realpath(model)) in (place, place.parent)]
    if (read and place.exists()) or ((read or within) and MODEL_FILES.fullmatch(place.name)):
        model = read[0] if read else output
        raise InputError(f"the {what} {file} has a name that a file of the model in {model} may have: choose another")
    if _is_special(file):
        if not os.access(file, os.W_OK):
            raise InputError(f"the {what} {file} cannot be written: it is not writable")
        return
    parent = place.parent
    named = parent if file.is_symlink() else file.parent
    if not parent.is_dir() and not within:
        raise InputError(f"the {what} {file} cannot be written: there is no folder {named}")
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise InputError(f"the {what} {file} cannot be written: the folder {named} is not writable")


def write_json(file: Path | None, text: str, already: str) -> None:
    """Write the JSON file whole or not at all; `already` says what is not lost when that fails or is interrupted."""
    write_file(file, text.encode("utf-8"), "JSON file", already)


def write_file(file: Path | None, data: bytes, what: str, already: str) -> None:
    """Write a file whole or not at all; `already` says what is not lost when that fails or is interrupted.

    What is not a regular file (a device, a pipe) stays what it is and gets the bytes; a link stays a link.
    """
    record_done(already)
    if file is None:
        return
    try:
        stream = _standard_stream(file)
        if stream is not None:
            stream.flush()
            stream.buffer.write(data)
            stream.flush()
        elif _is_special(file):
            # Not held: opening a pipe waits for a reader, and one must be able to stop that.
            with file.open("wb") as special:
                special.write(data)
        else:
            _replace(real_path(file), data)
    except OSError as error:
        raise OptpruneError(f"the {what} {file} cannot be written ({error.strerror}), but {already}") from error


def _replace(place: Path, data: bytes) -> None:
    """Write a regular file beside its place and rename it."""
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    with interrupts_held():
        try:
            with draft.open("xb") as stream:
                stream.write(data)
            draft.replace(place)
        finally:
            draft.unlink(missing_ok=True)


def _is_special(file: Path) -> bool:
    return file.exists() and not file.is_file()


def _standard_stream(file: Path) -> TextIO | None:
    """The stream of ours that a file (such as /dev/stdout) is: opened a second time, it would be written over."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is not there, or is no file of the system
            if os.path.samestat(file.stat(), os.fstat(stream.fileno())):
                return stream
    return None
