"""Files of the model that is exported: which of them an output may copy, and the name and licence of the model."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from transformers.utils.hub import cached_file

from optprune.errors import InputError
from optprune.models.gguf import PlainReader
from optprune.models.sources import DEMO, DEMO_LICENCE, DEMO_NAME, HUB_NAME
from optprune.system.wording import one_line

TAKEN_ALONG = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""files whose text an output copies unseen; the other files of a tokenizer are parsed"""
SHARED_MARK = ".huggingface-shared-blobs"
"""file in the hub's cache that marks a folder of blobs shared by several repositories"""
CARD = "README.md"
LICENCE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)(\.txt|\.md)?", re.IGNORECASE)
"""names of files that a licence requires to be passed on"""
HUB_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
"""licence files to look for by name on a hub, where a folder cannot be listed"""
LONGEST = 1_000_000
"""maximum size of such a file in bytes"""
PUBLIC_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def own_file(folder: Path, name: str) -> Path | None:
    """Return the regular file behind a name in a model folder; None where it lies outside of the model.

    In the hub's cache the files of a snapshot are links to blobs of the same repository, or of the whole cache.
    """
    try:
        place, real = folder.resolve(), (folder / name).resolve()
        own = any(real.is_relative_to(each) for each in (place, *_blobs(place)))
        return real if own and real.is_file() else None
    except (OSError, RuntimeError):  # no such file, or a link that leads back to itself
        return None


def _blobs(folder: Path) -> list[Path]:
    """Return the folders of the hub's cache that the links of a snapshot point into; none for another folder."""
    if folder.parent.name != "snapshots":
        return []
    repository = folder.parent.parent
    shared = repository.parent / "blobs"
    return [repository / "blobs", *([shared] if (shared / SHARED_MARK).is_file() else [])]


def own_text(folder: Path, name: str, longest: int | None = None) -> str | None:
    """Return the text of a folder's own file; None where it is missing, longer than `longest` bytes, or not UTF-8."""
    file = own_file(folder, name)
    try:
        if file is None or (longest is not None and file.stat().st_size > longest):
            return None
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def check_own_files(source: str | Path) -> None:
    """Raise InputError where a model folder links to a text outside of it that its outputs would copy."""
    folder = Path(source)
    if not folder.is_dir():
        return
    for pattern in TAKEN_ALONG:
        for file in sorted(folder.glob(pattern)):
            name = str(file.relative_to(folder))
            if file.exists() and not file.is_dir() and own_file(folder, name) is None:
                raise InputError(
                    f"{name} of {folder} is a link to a file outside of the folder, which the output would copy: put "
                    "the file itself in its place, or delete the link"
                )


@dataclass(frozen=True)
class Origin:
    """Name and licence of a source model, without a path of this machine."""

    name: str
    """its name on a hub, or the last part of its path"""
    licence: str | None = None
    """identifier of its licence, from its model card or its file"""
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()
    licence_files: Mapping[str, str] = field(default_factory=dict)
    """texts that its licence requires to be passed on, by file name"""

    @property
    def is_repository_name(self) -> bool:
        """Whether the name is valid for a repository of a hub."""
        return PUBLIC_NAME.fullmatch(self.name) is not None


def origin_of(source: str) -> Origin:
    """Return name and licence of a source; files that cannot be read, or lie outside of the folder, are left out."""
    if source == DEMO:
        return Origin(DEMO_NAME, DEMO_LICENCE, languages=("en",))
    path = Path(source)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return _of_gguf(path)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if LICENCE_FILE.fullmatch(file.name)]
        return _of_card(path.resolve().name, path / CARD, files)
    if not HUB_NAME.fullmatch(source):
        return Origin(one_line(path.name))
    card, *files = (_hub_file(source, name) for name in (CARD, *HUB_FILES))
    return _of_card(source, card, [file for file in files if file is not None])


def _of_card(name: str, card: Path | None, files: Sequence[Path]) -> Origin:
    """Return the origin described by a model card, where there is one."""
    fields: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):  # a damaged card is ignored
        own = None if card is None else own_file(card.parent, card.name)
        fields = (None if own is None else metadata_load(own)) or {}
    found = {file.name: own_text(file.parent, file.name, LONGEST) for file in files}
    texts = {name: text for name, text in found.items() if text is not None}
    link = _short_text(fields, "license_link")
    if link is not None and "://" not in link and link not in texts:
        link = None  # a file that is not passed on
    licence, licence_name = (_short_text(fields, key) for key in ("license", "license_name"))
    return Origin(one_line(name), licence, licence_name, link, _languages(fields), texts)


def _of_gguf(path: Path) -> Origin:
    try:
        entry = PlainReader(path).fields.get("general.license")
        licence = None if entry is None else entry.contents()
    except (OSError, ValueError, IndexError, KeyError):
        licence = None
    return Origin(one_line(path.stem), _short_text({"license": licence}, "license"))


def _short_text(fields: Mapping[str, Any], name: str) -> str | None:
    """Return a short text from metadata; None for another type, and for a text that could be read as HTML."""
    value = fields.get(name)
    plain = isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable() and not set("<>") & set(value)
    return one_line(value) if plain else None


def _languages(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("language")
    listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(code for code in listed if isinstance(code, str) and re.fullmatch(r"[A-Za-z-]{2,12}", code))


def _hub_file(source: str, name: str) -> Path | None:
    """Return a file of a repository, from the cache or the hub; None where it is missing or the hub is unreachable."""
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)
