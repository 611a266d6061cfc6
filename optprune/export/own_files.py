"""The files of a model folder that are its own, and not brought in by a link: only those are copied into an output."""

from pathlib import Path

from optprune.errors import InputError

TAKEN_ALONG = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""the files of which an output has the text, whatever it says; other files of a tokenizer have to be one"""
SHARED_MARK = ".huggingface-shared-blobs"
"""the file by which the hub's cache says that a folder holds what several repositories have in common"""


def own_file(folder: Path, name: str) -> Path | None:
    """Return the regular file that a name in a model folder stands for; None where it lies outside of the model.

    In the hub's cache the files of a snapshot are links to the blobs of the same repository, or of the whole cache.
    """
    try:
        place, real = folder.resolve(), (folder / name).resolve()
        own = any(real.is_relative_to(each) for each in (place, *_blobs(place)))
        return real if own and real.is_file() else None
    except (OSError, RuntimeError):  # no such file, or a link that leads back to itself
        return None


def _blobs(folder: Path) -> list[Path]:
    """The folders of the hub's cache that the links of a snapshot lead to; none where the folder is no snapshot."""
    if folder.parent.name != "snapshots":
        return []
    repository = folder.parent.parent
    shared = repository.parent / "blobs"
    return [repository / "blobs", *([shared] if (shared / SHARED_MARK).is_file() else [])]


def own_text(folder: Path, name: str, longest: int | None = None) -> str | None:
    """Return the text of a folder's own file; None where there is none, or more than so many bytes, or no UTF-8."""
    file = own_file(folder, name)
    try:
        if file is None or (longest is not None and file.stat().st_size > longest):
            return None
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def check_own_files(source: str | Path) -> None:
    """Raise InputError where a model folder has a text from elsewhere that its outputs would have a copy of."""
    folder = Path(source)
    if not folder.is_dir():
        return
    for pattern in TAKEN_ALONG:
        for file in sorted(folder.glob(pattern)):
            name = str(file.relative_to(folder))
            if file.exists() and not file.is_dir() and own_file(folder, name) is None:
                raise InputError(
                    f"{name} of {folder} is a link to a file outside of the folder, of which the output would have a "
                    "copy: put the file itself in its place, or delete the link"
                )
