"""The output of a command: progress on stderr, lines on stdout, results as JSON."""

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from optprune.errors import InputError, OptpruneError
from optprune.system.display import printable
from optprune.system.environment import is_first
from optprune.system.files import GENERATOR, MARK, is_marked, json_text, real_path
from optprune.system.interrupts import interrupts_held, record_done
from optprune.system.wording import one_line

if TYPE_CHECKING:
    from optprune.report.progress import Reporter


BEGAN = time.monotonic()
"""the time at which this process began, apart from the start of Python itself"""


def started() -> float:
    """Return the seconds since this process began."""
    return time.monotonic() - BEGAN


def start(log: Callable[[str], None] | None = None) -> "Reporter":
    """Import torch and transformers, silence their output, and return the reporter of progress on stderr and to a log.

    Of processes that share a run only the first one prints.
    """
    from rich.console import Console

    from optprune.report.progress import Reporter

    # Before transformers is imported, because its tokenizers warn when a process is forked after they ran.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import logging as hub_logging
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    # It prints every failed attempt to reach the hub; the error that follows says so once.
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    # This bar does not use transformers' own tqdm, which can be switched off.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # type: ignore[attr-defined]
    return Reporter(Console(stderr=True, quiet=not is_first()), log=log if is_first() else None)


def echo(text: str, *, err: bool = False) -> None:
    """Print lines without control characters, because names in files and models are untrusted."""
    for line in text.split("\n"):
        typer.echo(printable(line), err=err)


Input = str | Path | None
"""value of an option that may name an input file: a text in any of its forms, a recipe or another path"""


def check_json(
    file: Path | None, *, output: Path | None = None, models: Sequence[str] = (), inputs: Iterable[Input] = ()
) -> None:
    """Raise InputError if the JSON file cannot be written, or the file there is not one that `write_json` wrote."""
    check_file(file, "JSON file", output=output, models=models, inputs=inputs)


def check_file(
    file: Path | None,
    kind: str,
    *,
    output: Path | None = None,
    models: Sequence[str] = (),
    inputs: Iterable[Input] = (),
    replaces: Callable[[Path], bool] = is_marked,
) -> None:
    """Raise InputError if a file cannot be written, is an input or a model's file, or is there and not one of ours.

    `output` is the folder of the model to write, in which the file may lie; `models` and `inputs` are read. `replaces`
    returns whether an existing file may be replaced.
    """
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"the {kind} {file} is a folder: name a file")
    from optprune.export.place import may_be_of_model

    place = real_path(file)
    for given in inputs:
        if any(_is_read(place, path) for path in _paths_in(given)):
            raise InputError(f"the {kind} {file} is an input too ({one_line(given)}): choose another")
    within = output is not None and place.parent == real_path(output)
    read = [model for model in models if Path(os.path.realpath(model)) in (place, place.parent)]
    if (read and place.exists()) or ((read or within) and may_be_of_model(place.name)):
        model = read[0] if read else output
        raise InputError(f"the {kind} {file} has a name that a file of the model in {model} may have: choose another")
    if _is_special(file):
        if not os.access(file, os.W_OK):
            raise InputError(f"the {kind} {file} cannot be written: it is not writable")
        return
    if place.is_file() and not is_standard_stream(file) and not replaces(place):
        raise InputError(f"the {kind} {file} exists, and no such command of optprune wrote it: choose another name")
    parent = place.parent
    named = parent if file.is_symlink() else file.parent
    if not parent.is_dir() and not within:
        raise InputError(f"the {kind} {file} cannot be written: there is no folder {named}")
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise InputError(f"the {kind} {file} cannot be written: the folder {named} is not writable")


def files_in(words: Iterable[str]) -> list[str]:
    """Return the words that end like a file name; the others name recipes or tasks."""
    return [word for word in words if Path(word).suffix]


def _paths_in(given: Input) -> Iterator[Path]:
    """Yield the existing paths in the value of an option, without `images:`, shares and columns."""
    from optprune.texts.calibration import read_shares
    from optprune.texts.documents import IMAGES

    if given is None:
        return
    with contextlib.suppress(InputError, OSError):  # the command raises them where it reads the text
        for name in (str(given), *(text.name for text in read_shares(str(given)))):
            forms = (name, name.removeprefix(IMAGES), name.rpartition(":")[0])
            yield from [Path(form) for form in forms if form and Path(form).exists()][:1]


def _is_read(place: Path, path: Path) -> bool:
    """Return whether the file `place` is the input `path`, or a text file in the input folder `path`."""
    from optprune.texts.documents import is_txt

    if path.is_dir():
        return is_txt(place) and place.parent.is_dir() and place.parent.samefile(path)
    return place.is_file() and place.samefile(path)


def check_outside(file: Path | None, folder: Path) -> None:
    """Raise InputError where the JSON file lies in the output folder of a comparison, which has its own JSON file."""
    if file is not None and real_path(file).is_relative_to(real_path(folder)):
        raise InputError(f"the JSON file {file} lies in {folder}, which gets the same content: name another place")


def check_distinct(*files: Path | None) -> None:
    """Raise InputError where two outputs of a command are the same file."""
    named = [file for file in files if file is not None and not _is_special(file)]
    places = list(map(real_path, named))
    for number, file in enumerate(named):
        if places[number] in places[:number]:
            raise InputError(f"two options name the file {file} as their output: name two files")


def write_json(file: Path | None, text: str, already: str) -> None:
    """Write a JSON object with our mark, whole or not at all; `already` is as for `write_file`."""
    marked = json_text({GENERATOR: MARK, **json.loads(text)})
    write_file(file, marked.encode("utf-8"), "JSON file", already)


def write_file(file: Path | None, data: bytes, kind: str, already: str) -> None:
    """Write a file whole or not at all; `already` names the results that survive a failure or an interrupt.

    A device or a pipe receives the bytes and is not replaced; a link stays a link.
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
            # Interrupts are not held, because opening a pipe waits for a reader.
            with file.open("wb") as special:
                special.write(data)
        else:
            _replace(real_path(file), data)
    except OSError as error:
        raise OptpruneError(f"the {kind} {file} cannot be written ({error.strerror}), but {already}") from error


def _replace(place: Path, data: bytes) -> None:
    """Write a regular file under a temporary name beside its place and rename it."""
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


def is_standard_stream(file: Path) -> bool:
    """Return whether a file is what stdout or stderr write to."""
    return _standard_stream(file) is not None


def _standard_stream(file: Path) -> TextIO | None:
    """Return stdout or stderr if the file is one of them, which a second handle would overwrite."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the stream is closed, or not a file
            if os.path.samestat(file.stat(), os.fstat(stream.fileno())):
                return stream
    return None
