"""Atomic writing of files, and strict reading of YAML and JSON."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import yaml

from optprune.errors import InputError, no_room
from optprune.system.interrupts import interrupts_held
from optprune.system.wording import one_line, shown

LONGEST_NAME = 240
"""the largest number of bytes in the name of an output: its draft has 15 more, and file systems allow 255"""
MARK = "written by optprune"
"""the text in files that commands write, by which a later command knows that it may replace them"""
GENERATOR = "generator"
"""the key of the mark"""
MARKED_WITHIN = 1 << 16
"""the number of bytes at both ends of a file in which the mark is looked for"""
DEEPEST = 20
"""the largest depth of YAML; a recipe needs five"""
MOST_VALUES = 50_000
"""the largest number of values of a YAML text, with aliases expanded; a recipe has a few dozen, and one that lists
scores of experts has one for each of them"""

NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""the errors of file systems that cannot flush a file"""
FLUSHED_AT_ONCE = 8
"""number of files that are flushed together, so that the file system writes its journal fewer times"""


def write_whole(
    file: Path,
    write: Callable[[BinaryIO], object],
    *,
    lasting: bool = True,
    commit: Callable[[str], object] | None = None,
) -> None:
    """Write a file as a whole or not at all; a `lasting` file survives a crash of the machine.

    `write` writes bytes to a stream in order. `commit` gets the SHA-256 hex digest of these bytes before the file gets
    its name. Raises InputError where the disk is full.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is not a regular file, so it is not replaced: name another")
    draft: Path | None = None
    try:
        with interrupts_held():
            draft = exclusive_draft(file)
        with draft.open("wb") as stream:
            hashed = _Hashed(stream)
            write(stream if commit is None else cast(BinaryIO, hashed))
            if lasting:
                stream.flush()
                _flush(stream.fileno())
        if commit is not None:
            commit(hashed.digest.hexdigest())
        draft.replace(file)
        if lasting:
            _flush_folder(file.parent)
    except BaseException as error:
        if draft is not None:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        full = no_room(error)
        if full is None:
            raise
        raise InputError(f"{full}, so {file} was not written: make room and run again") from error


class _Hashed:
    """Stream that hashes the written bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._stream.write(data)


def exclusive_draft(target: Path) -> Path:
    """Create an empty file with a random new name beside a target, and return its path.

    Links are not followed.
    """
    while True:
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        with suppress(FileExistsError):
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return draft


def is_draft(name: str, target: str | None = None) -> bool:
    """Return whether `exclusive_draft` could have made a name, for this target or for any."""
    stem = r"[^/]+" if target is None else re.escape(target)
    return re.fullmatch(rf"\.{stem}\.[0-9a-f]{{8}}\.part", name) is not None


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 hex digest of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_of_file(file: Path) -> str:
    """Return the SHA-256 hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_marked(file: Path) -> bool:
    """Return whether a file is empty, or its first or last 64 KiB hold the mark of a file that a command writes."""
    with suppress(OSError), file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        for place in (0, max(0, size - MARKED_WITHIN)):
            stream.seek(place)
            if MARK.encode() in stream.read(MARKED_WITHIN):
                return True
        return not size
    return False


def own_place(path: str | Path) -> Path:
    """Return the real path of a file to write. Raises InputError where a file without our mark, or no folder, is there.

    The function that calls this writes the mark.
    """
    place = real_path(Path(path))
    if place.is_file() and not is_marked(place):
        raise InputError(f"the file {path} exists, and optprune did not write it: choose another name")
    if not place.parent.is_dir():
        raise InputError(f"the file {path} cannot be written: there is no folder {place.parent}")
    return place


def is_own_file(path: Path) -> bool:
    """Return whether a path is a regular file, not a link."""
    return path.is_file() and not path.is_symlink()


def is_own_folder(path: Path) -> bool:
    """Return whether a path is a folder, not a link."""
    return path.is_dir() and not path.is_symlink()


def flush_all(path: Path) -> None:
    """Flush a file, or a folder and all that it holds, to the disk. Raises OSError where they cannot be written."""
    below = [path, *path.rglob("*")]
    with ThreadPoolExecutor(FLUSHED_AT_ONCE) as pool:
        for _ in pool.map(_flush_file, filter(is_own_file, below)):
            pass
    for folder in filter(is_own_folder, below):
        _flush_folder(folder)


def flush_name(path: Path) -> None:
    """Flush the name of a path and those of its parents in the same file system to the disk, where that is possible."""
    for parent in path.parents:
        _flush_folder(parent)
        if parent.is_mount():
            break


def _flush_file(file: Path) -> None:
    number = os.open(file, os.O_RDONLY)
    try:
        _flush(number)
    finally:
        os.close(number)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system supports it."""
    with suppress(OSError):
        _flush_file(folder)


def _flush(number: int) -> None:
    """Flush an open file to the disk, where its file system supports it."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise


def real_path(path: Path) -> Path:
    """Return the path of an output with links resolved; InputError where it or its draft could not be created."""
    place = Path(os.path.realpath(path))
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise InputError(f"the name {shown(str(path))} is not UTF-8: choose another") from None
    if len(os.fsencode(place.name)) > LONGEST_NAME:
        raise InputError(f"the name {place.name} is longer than {LONGEST_NAME} bytes: choose a shorter one")
    if any(path.is_symlink() for path in (place, *place.parents)):  # only circular links remain
        raise InputError(f"{path} is a link that leads back to itself: choose another name")
    return place


class _Loader(yaml.SafeLoader):
    """Loader of plain data with 2:4 as text (in YAML 1.1 a number in base 60) and 1e-3 as a number (there a text).

    Repeated keys, deep nesting and aliases that expand to many values are errors.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.extents: dict[yaml.Node, tuple[int, int]] = {}
        """the depth of each node and its number of values, with aliases expanded"""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self.depth += 1
        self.check(self.depth <= DEEPEST, f"it is more than {DEEPEST} levels deep", mark)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if alias:
            self.check(node in self.extents, "it contains itself", mark)
            return node
        inner = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = [key for key, times in Counter(keys).items() if times > 1]
            self.check(not twice, f"the key {shown(twice[0][1]) if twice else ''} is given twice", mark)
        extents = [self.extents[part] for part in inner]
        deep, many = 1 + max((extent[0] for extent in extents), default=0), 1 + sum(extent[1] for extent in extents)
        self.check(deep <= DEEPEST, f"it is more than {DEEPEST} levels deep", mark)
        self.check(many <= MOST_VALUES, f"it has more than {MOST_VALUES} values", mark)
        self.extents[node] = deep, many
        return node

    def check(self, fine: bool, problem: str, mark: Any) -> None:
        if not fine:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_NUMBERS = {
    "tag:yaml.org,2002:int": (r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str, where: str) -> Any:
    """Return the plain data in a YAML text; InputError with the place of the text when it is not valid."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is not valid YAML: {_reason(error)}") from error


def read_json(text: str, where: str) -> Any:
    """Return the plain data in a JSON text; InputError with the place of the text when it is not valid."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply: use fewer levels") from error
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON: {_reason(error)}") from error


def read_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place of each line of a UTF-8 file that is not blank, for errors, and the data in its JSON.

    A line ends at a line feed or a carriage return, which JSON writes as escapes in its strings; other line separators
    are a part of them. InputError as for `read_json`; OSError and UnicodeDecodeError where the file cannot be read.
    """
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"line {number} of {file}"
                yield where, read_json(line, where)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InputError(f"the key {shown(twice)} is given twice")
    return known


def _reason(error: Exception) -> str:
    """Return the text of an error, without Python's advice about long numbers."""
    limit = sys.get_int_max_str_digits()
    return f"it holds a number of over {limit} digits" if "integer string conversion" in str(error) else one_line(error)


def json_text(value: Any) -> str:
    """Return plain data as indented JSON, with null for NaN and infinity."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
