"""Texts: read from files, data sets or the demo, tokenised once, and cut into windows for calibration or evaluation."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optprune.errors import InputError
from optprune.system.files import read_json
from optprune.system.wording import one_line, shown
from optprune.texts.demo import demo_articles, raise_csv_limit

if TYPE_CHECKING:  # torch and transformers take seconds to import, and a text that is not there needs neither
    pass

FORMS = "a .txt, .jsonl or .csv file (FILE.csv:COLUMN), a folder of .txt, hf:DATASET[:CONFIG]:SPLIT, or demo:PART"
"""what a text may be, in words"""
DEFAULT_COLUMN = "text"


def read_documents(spec: str) -> list[str]:
    """The documents of a text; empty ones are dropped.

    `spec` is a .txt file (one document), a .jsonl or .csv file with the column named after a colon ("text" when none
    is), a folder of .txt files (sorted by name), hf:DATASET[:CONFIG]:SPLIT with a column "text", or demo:calibration,
    demo:evaluation or demo:speeches. InputError, in one sentence, when it cannot be read or holds nothing.
    """
    documents = [text for text in _read(spec) if text.strip()]
    if not documents:
        raise InputError(f"the text {spec} is empty: give one that holds words")
    return documents


def _read(spec: str) -> Iterable[str]:
    if spec.startswith("demo:"):
        return demo_articles(spec.removeprefix("demo:"))  # type: ignore[arg-type]  # it checks the name
    if spec.startswith("hf:"):
        return _read_dataset(spec)
    path, column = Path(spec), None
    name = spec
    if not path.exists() and ":" in spec:
        name, _, column = spec.rpartition(":")
        path = Path(name)
    # An empty name would be the current folder.
    if not name.strip() or not path.exists():
        raise InputError(f"there is no text {name!r}: give {FORMS}")
    if column is not None and (path.is_dir() or path.suffix.lower() == ".txt"):
        raise InputError(f"the text {name} has no columns: leave out ':{column}'")
    if path.is_dir():
        return _read_folder(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise InputError(f"the text {path} has an unknown ending {path.suffix!r}: give {FORMS}")
    try:
        return list(readers[path.suffix.lower()](path, DEFAULT_COLUMN if column is None else column))
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text {path} is not UTF-8 (byte {_not_utf8(path)} cannot be decoded): convert it first"
        ) from error
    except OSError as error:
        raise InputError(f"the text {path} cannot be read: {error.strerror}") from error


def _read_folder(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InputError(f"the folder {folder} holds no .txt file: give another text")
    return [text for file in files for text in _read(str(file))]


def _not_utf8(path: Path) -> int | None:
    """Where a file stops being UTF-8, which the error that reading raised knows only within a piece of the file."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _read_txt(path: Path, _: str) -> Iterator[str]:
    yield path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            record = read_json(line, where)
            if not isinstance(record, dict):
                raise InputError(f"{where} is not a JSON object: write one such as {{{json.dumps(column)}: ...}}")
            if column not in record:
                raise InputError(_no_column(where, column, record))
            yield _as_text(record[column], where, column)


def _read_csv(path: Path, column: str) -> Iterator[str]:
    raise_csv_limit()
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        if column not in (rows.fieldnames or ()):
            raise InputError(_no_column(path, column, rows.fieldnames or ()))
        try:
            for row in rows:
                yield row[column] or ""
        except csv.Error as error:
            raise InputError(f"line {rows.line_num} of {path} is not valid CSV: {error}") from error


def _read_dataset(spec: str) -> list[str]:
    """The texts of a data set, without remote code: the data sets library has none since version 4."""
    # A split may hold a slice with a colon of its own, as in train[:100].
    parts = re.split(r":(?![^\[]*\])", spec)[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"the data set {spec!r} cannot be found: write hf:DATASET[:CONFIG]:SPLIT")
    name, *config, split = parts
    import datasets

    try:
        data: Any = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # the library raises errors of many kinds for a name, a config or a connection
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the data set {spec} cannot be loaded: {reason[0]}") from error
    if DEFAULT_COLUMN not in data.column_names:
        raise InputError(
            f"the data set {spec} has no column {DEFAULT_COLUMN!r} (it has {', '.join(data.column_names)}): write the "
            "column you want to a file and give FILE.jsonl:COLUMN"
        )
    return [_as_text(text, spec, DEFAULT_COLUMN) for text in data[DEFAULT_COLUMN]]


def _as_text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"the column {column!r} in {where} holds {shown(value)}, which is not a text: name another column"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half a surrogate pair; tokenizers refuse it without saying where it was.
        raise InputError(
            f"the column {column!r} in {where} holds {value[error.start]!r}, half a character: repair or remove it"
        ) from error
    return value


def _no_column(where: Any, column: str, columns: Iterable[str]) -> str:
    known = one_line(", ".join(columns)) or "none"
    return f"{where} has no column {column!r} (it has {known}): name one after a colon, as in FILE.csv:COLUMN"
