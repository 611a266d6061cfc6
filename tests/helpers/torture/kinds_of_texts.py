"""Texts of every form whose documents are known, because they were made of them: what is read is that, or a refusal."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.torture.drawing import FAILED, Case, Drawn

PIECES = [
    "Hello, world", 'a "beta" two', "one\ntwo", "é", "\u2028line\u2029", "a\x85b", " leads", "trails ", "3.5", "-",
    "#x",
    "tab\there", '""', "", "  ", "it's", "semi;colon", "a\r\nb", "{}", "null", "text", "\u200b", "x" * 3000,
]  # fmt: skip
WRONG = ["a comma", "an open quote", "words behind a quote", "a short row", "two columns", "no column"]
"""flaws of a table that no reader may pass over"""
ODD = ["a quote inside", "a null", "two other columns", "a blank line"]
"""what may be refused, or read as it stands"""


def words(drawn: Drawn, fewest: int = 30) -> str:
    """A text with an odd piece in it."""
    plain = drawn.rng.choices(["one", "two", "three", "four", "words", "of", "the", "text"], k=fewest)
    plain.insert(drawn.rng.randrange(len(plain)), drawn.rng.choice(PIECES))
    return " ".join(plain)


def read(drawn: Drawn, file: Path, expected: list[str] | None, *, must: bool = True, column: str = "") -> Case:
    """Read a text by the library: its documents, or a refusal where nothing can be expected."""
    found = drawn.sandbox.place / "found.json"
    code = (
        "import json, pathlib, optprune\n"
        f"found = optprune.read_documents({f'{file}{column}'!r})\n"
        f"pathlib.Path({str(found)!r}).write_text(json.dumps(found))\n"
        "print(len(found), 'documents')\n"
    )
    if expected is None:
        return drawn.program(code, files={found: "json"}, statuses=(FAILED,), named=(file.name,))
    kept = [text for text in expected if text.split()]
    statuses = (FAILED,) if not kept else (0,) if must else (0, FAILED)
    checks = (("documents", {"file": str(found), "expected": kept}),)
    return drawn.program(code, files={found: "json"}, statuses=statuses, checks=checks)


def quoted(text: str, always: bool) -> str:
    """A cell of a table."""
    needs = always or not text or any(mark in text for mark in ',"\n\r\t') or text != text.strip()
    return '"' + text.replace('"', '""') + '"' if needs else text


def table(drawn: Drawn) -> Case:
    """A CSV file, which may have one flaw; those in which words would be lost are refused."""
    rng = drawn.rng
    names = rng.choice([["text"], ["text", "id"], ["id", "text"], ["id", "text", "note"]])
    texts = [words(drawn) if rng.random() < 0.7 else rng.choice(PIECES) for _ in range(rng.randrange(1, 6))]
    always, end = rng.random() < 0.3, rng.choice(["\n", "\n", "\r\n"])
    rows = [[quoted(text if name == "text" else "7", always) for name in names] for text in texts]
    flaws = [None, None, *WRONG, *WRONG, *ODD]
    flaw = rng.choice([each for each in flaws if len(names) > 1 or each != "a short row"])
    flawed(drawn, flaw, rows, texts, names)
    if flaw in HEADERS:
        names, rows = [*names, *HEADERS[flaw]], [[*row, *(["1"] * len(HEADERS[flaw]))] for row in rows]
    elif flaw == "no column":
        names[names.index("text")] = rng.choice(["Text", "texts", " text", ""])
    lines = [",".join(names), *(",".join(row) for row in rows)]
    if flaw == "a blank line":
        lines.insert(rng.randrange(1, len(lines) + 1), "")
    content = end.join(lines) + rng.choice(["", end])
    file = drawn.sandbox.inputs / rng.choice(["t.csv", "t.csv", "t.CSV", "a b.Csv"])
    file.write_bytes(("\ufeff" if rng.random() < 0.2 else "").encode() + content.encode())
    if flaw not in WRONG:
        return read(drawn, file, texts, must=flaw is None, column=rng.choice(["", ":text"]))
    if rng.random() < 0.3:
        by_command = [drawn.prune(calibration=file), drawn.evaluate(text=file), drawn.heal(text=file)]
        return Case(rng.choice(by_command).words, statuses=(FAILED,))
    return read(drawn, file, None)


HEADERS = {"two columns": ["text"], "two other columns": ["x", "x"]}
"""the columns that a flaw adds"""
CELLS = {"a comma": "Hello, world", "an open quote": '"never closed', "words behind a quote": '"beta" two'}
"""the cells of a flaw in which a text would be cut"""
WHOLE = {"a quote inside": '5" disk', "a null": "a\0b"}
"""the cells of a flaw that hold the whole text"""


def flawed(drawn: Drawn, flaw: str | None, rows: list[list[str]], texts: list[str], names: list[str]) -> None:
    """Give a row of a table a flaw."""
    number = drawn.rng.randrange(len(rows))
    if flaw in CELLS | WHOLE:
        rows[number][names.index("text")] = (CELLS | WHOLE)[flaw]
        texts[number] = WHOLE.get(flaw, texts[number])
    elif flaw == "a short row":
        del rows[number][drawn.rng.randrange(len(names))]


def lines(drawn: Drawn) -> Case:
    """JSON lines with any character in their texts."""
    rng = drawn.rng
    texts = [
        words(drawn, 3) + rng.choice(["", "\x0c", "\x1c", "\x0b", "\u2028", "\x85"]) for _ in range(rng.randrange(1, 6))
    ]
    raw = rng.random() < 0.2
    written = [json.dumps({"text": text, "n": 1}, ensure_ascii=rng.random() < 0.3) for text in texts]
    if raw:  # JSON has them escaped
        written = [line.replace("\\f", "\x0c").replace("\\u000b", "\x0b") for line in written]
    if rng.random() < 0.2:
        written.insert(rng.randrange(len(written) + 1), rng.choice(["", "   "]))
    file = drawn.sandbox.inputs / rng.choice(["t.jsonl", "t.JSONL", "t.Jsonl"])
    end = rng.choice(["\n", "\n", "\r\n"])
    file.write_bytes(("\ufeff" if rng.random() < 0.2 else "").encode() + (end.join(written) + end).encode())
    return read(drawn, file, texts, must=not raw, column=rng.choice(["", ":text"]))


def parquet(drawn: Drawn) -> Case:
    """A Parquet file with one column of texts, two, or none."""
    import pyarrow
    from pyarrow import parquet as files

    rng = drawn.rng
    texts: list[Any] = [words(drawn, 3) for _ in range(rng.randrange(1, 6))]
    how = rng.choice(["one", "one", "two", "two others", "none"])
    kind = rng.choice([pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
    arrays = [pyarrow.array(texts, pyarrow.string() if kind == pyarrow.string_view() else kind)]
    if rng.random() < 0.3:
        arrays = [arrays[0].dictionary_encode()]
    names = {"one": ["text"], "two": ["text", "text"], "two others": ["x", "text", "x"], "none": ["Text"]}[how]
    file = drawn.sandbox.inputs / rng.choice(["t.parquet", "t.PARQUET"])
    files.write_table(
        pyarrow.Table.from_arrays(arrays * len(names), names=names), file, row_group_size=rng.choice([1, 9])
    )
    if how in ("two", "none"):
        return read(drawn, file, None)
    return read(drawn, file, texts, must=how == "one")


def folder(drawn: Drawn) -> Case:
    """A folder of texts whose names end in any case, beside other things."""
    rng = drawn.rng
    place = drawn.sandbox.inputs / rng.choice(["texts", "te xts", "texts.txt"])
    place.mkdir()
    names = rng.sample(["a.txt", "B.TXT", "c.Txt", "é.txt", "a b.tXt", "1.txt", "z.TXT"], rng.randrange(1, 5))
    texts = [words(drawn, 3) for _ in names]
    for name, text in zip(names, texts, strict=True):
        (place / name).write_bytes(text.encode())
    for other in rng.sample(["notes.md", "x.csv", "txt", "a.txt.bak"], rng.randrange(3)):
        (place / other).write_text("not a text")
    if rng.random() < 0.2:
        (place / "latin.txt").write_bytes("é".encode("latin-1"))
        return drawn.program(read(drawn, place, None).code or "", statuses=(FAILED,), named=("latin.txt",))
    if rng.random() < 0.2:
        (place / "deep.txt").mkdir()
        return read(drawn, place, texts, must=False)
    return read(drawn, place, texts)


def records(drawn: Drawn) -> Case:
    """Records with images, with any character in their texts."""
    rng, images = drawn.rng, drawn.sandbox.inputs / "images"
    drawn.sandbox.copied(drawn.stock.records.parent)
    file = images / "records.jsonl"
    written = [json.loads(line) for line in file.read_text().splitlines()]
    for record in written:
        if "text" in record:
            record["text"] += rng.choice(["\u2028", "\x85", "\x0c", "\u2029", ""]) + "end"
    texts = [record["text"] for record in written if "text" in record]
    if rng.random() < 0.4:
        key, value = rng.choice(["text", "images", "messages", "x"]), drawn.spoil.value()
        rng.choice(written)[key] = value
        texts = None
    content = "\n".join(json.dumps(record, ensure_ascii=False) for record in written)
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        drawn.words = type(drawn.words)(drawn.stock.vision, drawn.words.pruned, drawn.words.text, drawn.words.held)
        return rng.choice([drawn.prune, drawn.plan])(calibration=f"images:{file}")
    found = drawn.sandbox.place / "found.json"
    code = (
        "import json, pathlib\nfrom optprune.texts.records import read_records\n"
        f"found = [record.text for record in read_records({str(file)!r}) if record.text]\n"
        f"pathlib.Path({str(found)!r}).write_text(json.dumps(found))\nprint(len(found))\n"
    )
    if texts is None:
        return drawn.program(code, files={found: "json"})
    checks = (("documents", {"file": str(found), "expected": texts}),)
    return drawn.program(code, files={found: "json"}, statuses=(0,), checks=checks)


def constant(drawn: Drawn) -> Case:
    """A text that says one thing over and over: its inputs have few directions, and a strict run refuses it."""
    rng = drawn.rng
    one = rng.choice(["the ", "x", "0", "word word ", "a b ", ". ", "é", "\n- ", "Yes. No. "])
    file = drawn.sandbox.inputs / "constant.txt"
    file.write_text(one * (20000 // len(one)))
    recipe = rng.choice(["fasp", "wanda", "sparsegpt", "alps", "osscar", "structured_best", "sparse_best"])
    if rng.random() < 0.3:
        return drawn.prune(calibration=file, recipe=recipe, samples=8)
    case = drawn.prune("--strict", calibration=file, recipe=recipe, samples=8)
    return Case(case.words, statuses=(FAILED,), output=case.output, run=case.run)
