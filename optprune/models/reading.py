"""Reading: what the libraries that read models raise, as sentences that say what to do."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optprune.errors import InputError, is_out_of_memory

ADVICE = {
    "config": "correct config.json, or fetch it again",
    "tokenizer": "fetch its files again, or save it anew with transformers",
    "weights": "see that they are whole and belong to config.json, or fetch both again",
}
PANIC = "PanicException"
WHOLE_GGUF = "see that the file is whole, and that its architecture is one that optprune prunes"


@contextmanager
def reading(what: str, source: str, where: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Errors of the libraries that read models, which are of many kinds, as a sentence that says what to do."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception of Python's.
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == PANIC):
            raise
        advice = f"; {WHOLE_GGUF if 'gguf_file' in options else ADVICE[what]}"
        if isinstance(error, OSError) and not Path(where).exists():
            advice = ""  # it is not in the hub, or the hub is out of reach
        raise InputError(f"the {what} of {source} cannot be loaded: {cause(error)}{advice}") from error


def cause(error: BaseException) -> str:
    """The first line of what an error says; all of it where that line only announces it."""
    text = str(error).strip()
    if "weights_only" in text:  # torch's advice is to switch it off
        return "it is pickle, which is not read"
    first = text.splitlines()[0].strip() if text else type(error).__name__
    reason = " ".join(text.split()) if first.endswith(":") else first
    return f"{type(error).__name__}: {reason}" if isinstance(error, KeyError) else reason.rstrip(".!")
