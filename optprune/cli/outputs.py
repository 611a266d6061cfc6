"""What a command says and writes: progress on stderr, lines on stdout, results as JSON."""

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from optprune.errors import InputError, OptpruneError
from optprune.interrupts import interrupts_held, when_interrupted

if TYPE_CHECKING:
    from optprune.progress import Reporter

OF_A_MODEL = re.compile(
    r"(report|(generation_)?config|tokenizer(_config)?|special_tokens_map|added_tokens|vocab|.*\.index)\.json"
    r"|recipe\.yaml|(vocab|merges)\.txt|.*\.(safetensors|model|jinja|py)"
)
"""the names that files of a saved folder may have"""


def start() -> "Reporter":
    """Import and quieten what is heavy; the command's own progress goes to stderr."""
    from optprune.progress import Reporter

    # Before transformers is imported, because its tokenizers warn when a process is forked after they ran.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # This one bar is not made by transformers' own tqdm, which can be switched off.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # type: ignore[attr-defined]
    return Reporter()


def check_json(file: Path | None, output: Path | None = None) -> None:
    """Raise InputError when the JSON file could not be written at the end."""
    check_file(file, "JSON file", output)


def check_file(file: Path | None, what: str, output: Path | None = None) -> None:
    """Raise InputError when a file could not be written at the end, be it into the folder `output` to come."""
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"the {what} {file} is a folder: name a file")
    parent, within = file.absolute().parent, output is not None and file.parent.resolve() == output.resolve()
    if OF_A_MODEL.fullmatch(file.name) and (within or (parent / "config.json").is_file()):
        model = output if within else file.parent
        raise InputError(f"the {what} {file} has a name that a file of the model in {model} may have: choose another")
    if not parent.is_dir() and not within:
        raise InputError(f"the {what} {file} cannot be written: there is no folder {file.parent}")
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise InputError(f"the {what} {file} cannot be written: the folder {file.parent} is not writable")


def write_json(file: Path | None, text: str, already: str) -> None:
    """Write the JSON file whole or not at all; `already` says what is not lost when that fails."""
    write_file(file, text.encode("utf-8"), "JSON file", already)


def write_file(file: Path | None, data: bytes, what: str, already: str) -> None:
    """Write a file whole or not at all; `already` says what is not lost when that fails."""
    if file is None:
        return
    draft = file.absolute().with_name(f".{file.name}.{secrets.token_hex(4)}")
    with when_interrupted(already):
        try:
            with draft.open("xb") as stream:
                stream.write(data)
            draft.replace(file)
        except BaseException as error:
            with interrupts_held(), contextlib.suppress(OSError):
                draft.unlink()
            if isinstance(error, OSError):
                raise OptpruneError(f"the {what} {file} cannot be written ({error.strerror}), but {already}") from error
            raise
