"""Where a model comes from, as far as others may know: its public name, and the licence that holds for it."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from transformers.utils.hub import cached_file

from optprune.export.own_files import own_file, own_text
from optprune.models.gguf import PlainReader
from optprune.models.sources import DEMO, DEMO_LICENCE, DEMO_NAME, HUB_NAME
from optprune.system.wording import one_line

CARD = "README.md"
LICENCE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)(\.txt|\.md)?", re.IGNORECASE)
"""the names of files that a licence wants to be handed on"""
HUB_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
"""the licence files that are asked for by name, where a folder cannot be listed"""
LONGEST = 1_000_000
"""the most bytes of such a file"""
PUBLIC_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """The model that was pruned, without a path of this machine."""

    name: str
    """its name on a hub, or the last name of its folder or file"""
    licence: str | None = None
    """the identifier of its licence, as its own model card or file has it"""
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()
    licence_files: Mapping[str, str] = field(default_factory=dict)
    """the texts that its licence wants to be handed on, by file name"""

    @property
    def is_repository_name(self) -> bool:
        """Whether a hub takes the name for one of a repository."""
        return PUBLIC_NAME.fullmatch(self.name) is not None


def origin_of(source: str) -> Origin:
    """What is known of a model source; what cannot be read is not known, nor what a link brings from elsewhere."""
    if source == DEMO:
        return Origin(DEMO_NAME, DEMO_LICENCE, languages=("en",))
    path = Path(source)
    if path.suffix == ".gguf" and not path.is_dir():
        return _of_gguf(path)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if LICENCE_FILE.fullmatch(file.name)]
        return _of_card(path.resolve().name, path / CARD, files)
    if not HUB_NAME.fullmatch(source):
        return Origin(one_line(path.name))
    card, *files = (_hub_file(source, name) for name in (CARD, *HUB_FILES))
    return _of_card(source, card, [file for file in files if file is not None])


def _of_card(name: str, card: Path | None, files: Sequence[Path]) -> Origin:
    """The origin whose own model card is that file, if there is one."""
    told: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):  # a card that is none tells nothing
        own = None if card is None else own_file(card.parent, card.name)
        told = (None if own is None else metadata_load(own)) or {}
    found = {file.name: own_text(file.parent, file.name, LONGEST) for file in files}
    texts = {name: text for name, text in found.items() if text is not None}
    link = _said(told, "license_link")
    if link is not None and "://" not in link and link not in texts:
        link = None  # a file that is not handed on
    return Origin(one_line(name), _said(told, "license"), _said(told, "license_name"), link, _languages(told), texts)


def _of_gguf(path: Path) -> Origin:
    try:
        entry = PlainReader(path).fields.get("general.license")
        licence = None if entry is None else entry.contents()
    except (OSError, ValueError, IndexError, KeyError):
        licence = None
    return Origin(one_line(path.stem), _said({"license": licence}, "license"))


def _said(fields: Mapping[str, Any], name: str) -> str | None:
    """A short text among metadata; None for anything else, as for one that a page could take for HTML."""
    value = fields.get(name)
    said = isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable() and not set("<>") & set(value)
    return one_line(value) if said else None


def _languages(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("language")
    listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(code for code in listed if isinstance(code, str) and re.fullmatch(r"[A-Za-z-]{2,12}", code))


def _hub_file(source: str, name: str) -> Path | None:
    """A file of a repository, from the cache or the hub; None where it has none, or the hub is out of reach."""
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)
