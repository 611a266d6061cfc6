"""Texts in all forms, and their windows."""

import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from optprune.errors import InputError
from optprune.texts import (
    NAMED_SETS,
    Conversation,
    NamedSet,
    calibration_batches,
    check_seq_length,
    check_vocabulary,
    demo_articles,
    evaluation_windows,
    read_documents,
    read_texts,
    tokenise,
)
from tests.helpers.tiny_models import tiny_llama, tiny_tokenizer

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]

# -- documents


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffGrüße\nan alle\n".encode())
    assert read_documents(str(file)) == ["Grüße\nan alle\n"]


def test_a_folder_is_its_txt_files_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "C.TXT", "ignored.md"):
        (tmp_path / name).write_text(name)
    assert read_documents(str(tmp_path)) == ["C.TXT", "a.txt", "b.txt"]


def test_csv_columns_quotes_and_long_fields(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    long = "word " * 100_000
    file.write_text(f'text,body\none,"two\nlines, and a ""quote"""\n,\n\nthree,{long}\na 5" disk,\n')
    assert read_documents(str(file)) == ["one", "three", 'a 5" disk']
    assert read_documents(f"{file}:body") == ['two\nlines, and a "quote"', long]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text\nHello, world\n", "the row at line 2 of .*a.csv has 2 cells, and the header 1: write each text within"),
        ("text,body\none,two\nshort row\n", "the row at line 3 of .*a.csv has 1 cell, and the header 2"),
        ('text,body\n"a\nb",two\n"beta" two,x\n', r"the row at line 4 of .* is not valid CSV \(',' expected after"),
        ('text,body\none,two\nthree,"four\nfive,six\n' * 2, r"the row at line 3 of .* is not valid CSV \(',' expected"),
        ('text,body\none,two\n"three,four\nfive,six\n', "the row at line 3 of .* is not valid CSV .unexpected end of"),
    ],
    ids=["a comma", "a short row", "text behind quotes", "a stray quote in another column", "a quote that stays open"],
)
def test_csv_that_would_lose_text_is_refused_with_its_first_bad_row(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(content)
    with pytest.raises(InputError, match=f"^{reason}"):
        read_documents(str(file))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    csv, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"
    csv.write_text("text,body,text\none,two,three\n")
    columns = [pyarrow.array(["one"]), pyarrow.array(["two"]), pyarrow.array(["three"])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "body", "text"]), parquet)
    for file in (csv, parquet):
        with pytest.raises(InputError, match=f"^{file} has 2 columns 'text': rename all but one$"):
            read_documents(str(file))
        assert read_documents(f"{file}:body") == ["two"]


def test_jsonl_columns_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "body": "two"}\n\n{"text": null, "body": "dr\\u00e4i"}\n')
    assert read_documents(str(file)) == ["one"]
    assert read_documents(f"{file}:body") == ["two", "dräi"]


def test_lines_of_jsonl_end_at_line_feeds_only(tmp_path: Path) -> None:
    """Other separators, and a carriage return that is escaped, are a part of a text."""
    text, file = "a\u2028b\u2029c\x85d\u3000e\rf", tmp_path / "a.jsonl"
    for end in ("\n", "\r\n"):
        file.write_bytes((json.dumps({"text": text}, ensure_ascii=False) + end).encode() * 2)
        assert read_documents(str(file)) == [text, text]


def test_demo_texts() -> None:
    assert read_documents("demo:evaluation") == demo_articles("evaluation")


def test_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(4)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert read_documents(f"hf:{data}:train") == [f"document {i}" for i in range(4)]
    assert read_documents(f"hf:{data}:default:train[:2]") == ["document 0", "document 1"]
    with pytest.raises(InputError, match="cannot be loaded"):
        read_documents(f"hf:{data}:validation")


def test_data_sets_are_known_by_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps({"text": f"document {i}", "url": "x"}) + "\n" for i in range(6))
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(lines.replace("document", split))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(NAMED_SETS, "c4", NamedSet(str(tmp_path), None, "train", most=4))
    monkeypatch.setitem(NAMED_SETS, "wikitext2", NamedSet(str(tmp_path), "default", "train"))
    assert read_documents("c4") == [f"train {i}" for i in range(4)]
    assert read_documents("wikitext2:test") == [f"test {i}" for i in range(6)]
    assert [text.name for text in read_texts("c4=0.5,wikitext2=0.5")] == ["c4", "wikitext2"]
    with pytest.raises(InputError, match="the data set c4:dev cannot be loaded"):
        read_documents("c4:dev")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()  # a folder of the user's comes first
    (tmp_path / "c4" / "own.txt").write_text("mine")
    assert read_documents("c4") == ["mine"]


def test_usual_data_sets_are_streamed_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[tuple, dict]]()

    def stream(*name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_dict({"prompt": ["a"] * 9, "messages": [CHAT] * 9}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", stream)
    for name in ("wikitext2", "c4", "ultrachat"):
        found = read_documents(name)
        assert [document.contents for document in found if isinstance(document, Conversation)] == [("hello", "yes")] * 9
    splits = [(name, options["split"], options["streaming"]) for name, options in asked]
    assert splits == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), "train", True),
        (("allenai/c4", "en"), "train", True),
        (("HuggingFaceH4/ultrachat_200k",), "train_sft", True),
    ]


def test_a_stream_that_breaks_off_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():
        yield {"text": "first"}
        raise ConnectionError("the line is cut\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **options: broken())
    with pytest.raises(InputError, match=r"^the data set c4 cannot be read: the line is cut"):
        read_documents("c4")


def test_a_data_set_without_a_text_column(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"question": ["why"], "answer": ["because"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(InputError, match=r"no column 'text' \(it has question, answer\): write .* FILE.jsonl:COLUMN"):
        read_documents("hf:some/set:train")


@pytest.mark.parametrize(
    ("name", "content", "spec", "reason"),
    [
        ("a.txt", b"words", "missing.txt", "there is no text"),
        ("a.txt", b"words", "missing.csv:body", r"missing\.csv"),
        ("a.md", b"words", "a.md", r"unknown ending '\.md'"),
        ("a.txt", b" \n", "a.txt", "is empty"),
        ("a.txt", b"caf\xe9", "a.txt", "not UTF-8"),
        ("a.txt", b"\xef\xbb\xbf" + b"x" * 20_000 + b"\xe9", "a.txt", r"\(byte 20003 cannot"),
        ("a.csv", b"text\n" + b"words\n" * 5_000 + b"caf\xe9\n", "a.csv", r"\(byte 30008 cannot"),
        ("a.jsonl", b'{"text": "one"}\n' * 2_000 + b'{"text": "caf\xe9"}\n', "a.jsonl", r"\(byte 32013 cannot"),
        ("a.txt", b"words", "a.txt:body", r"a\.txt has no columns: leave out ':body'"),
        ("folder/a.txt", b"words", "folder:body", "folder has no columns: leave out ':body'"),
        ("a.csv", b"text,body\none,two\n", "a.csv:title", r"no column 'title' \(it has text, body\)"),
        ("a.csv", b"", "a.csv", "no column 'text'"),
        ("a.csv", b"text\n\n", "a.csv", "is empty"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "a.jsonl", r"line 2 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', "a.jsonl", "line 2 of .* is not a JSON object"),
        ("a.jsonl", b'{"body": "one"}\n', "a.jsonl", r"no column 'text' \(it has body\)"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl", "holds 3, which is not a text"),
        ("a.jsonl", b'{"text": "half a \\ud83d"}\n', "a.jsonl", r"line 1 of .* holds '\\ud83d', half a character"),
        ("folder/a.md", b"words", "folder", r"holds no \.txt file"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, spec: str, reason: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_documents(str(tmp_path / spec))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "there is no text '': give a .txt, .jsonl, .csv or .parquet file"),
        (" ", "there is no text ' ': give a .txt"),
        ("wikitext", "there is no text 'wikitext': give a .txt"),
        ("hf:", "the data set 'hf:' cannot be found: write hf:DATASET[:CONFIG]:SPLIT"),
        ("hf:name", "the data set 'hf:name' cannot be found: write hf:"),
        ("hf:a:b:c:d", "the data set 'hf:a:b:c:d' cannot be found: write hf:"),
        ("hf::train", "the data set 'hf::train' cannot be found: write hf:"),
        ("hf:a:train:", "the data set 'hf:a:train:' cannot be found: write hf:"),
        ("demo:training", "the demo text 'training' is not known: use demo:calibration"),
        ("demo:", "the demo text '' is not known: use demo:calibration"),
    ],
)
def test_a_text_that_has_no_known_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, reason: str) -> None:
    """The form is refused, not a text that fails to load: nothing is asked for, and no folder is read in its place."""
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **options: pytest.fail(f"loaded {name}"))
    with pytest.raises(InputError, match=f"^{re.escape(reason)}"):
        read_documents(spec)


@pytest.mark.parametrize("spec", [":", ":text"])
def test_a_column_without_a_file_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no text ''"):
        read_documents(spec)


# -- tokens and windows


def test_documents_are_joined_and_tokenised_once() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenise(tokenizer, ["One document.", "And another."])
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == tokenizer("One document.\n\nAnd another.")["input_ids"]
    assert tokenizer.decode(tokens) == "One document.\n\nAnd another."


def test_evaluation_windows_are_consecutive_and_drop_the_rest() -> None:
    tokens = torch.arange(23)
    assert evaluation_windows(tokens, 5).tolist() == torch.arange(20).view(4, 5).tolist()
    assert evaluation_windows(tokens, 5, 2).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert evaluation_windows(tokens.int(), 5, 2).dtype == torch.long


@pytest.mark.parametrize(
    ("seq_length", "windows", "reason"),
    [
        (24, None, "has 23 tokens, room for 0 windows of 24, fewer than the 1 needed: lower --seq-length"),
        (5, 5, "room for 4 windows of 5, fewer than the 5 needed: lower --windows"),
        (1, None, "--seq-length cannot be 1"),
        (5, 0, "--windows cannot be 0"),
    ],
)
def test_evaluation_windows_that_do_not_fit(seq_length: int, windows: int | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        evaluation_windows(torch.arange(23), seq_length, windows)


def test_calibration_windows_are_distinct_whole_and_seeded() -> None:
    tokens = torch.arange(1003)
    batches = calibration_batches(tokens, samples=80, seq_length=10, seed=3, tokens_per_batch=64)
    assert [len(batch) for batch in batches] == [6] * 13 + [2]
    windows = torch.cat(batches)
    assert torch.equal(windows, torch.cat(calibration_batches(tokens.int(), 80, 10, seed=3)))
    assert windows.flatten().unique().numel() == 800  # none overlap
    assert torch.equal(windows, windows[:, :1] + torch.arange(10))  # each is a piece of the text
    again = torch.cat(calibration_batches(tokens, 80, 10, seed=3))
    other = torch.cat(calibration_batches(tokens, 80, 10, seed=4))
    assert torch.equal(windows, again)
    assert not torch.equal(windows, other)


def test_calibration_windows_begin_anywhere_in_what_is_left_over() -> None:
    """Of 43 tokens 3 are left over: the first window begins at 0, 1, 2 or 3, and every token has its chance."""
    begins, seen = set[int](), set[int]()
    for seed in range(40):
        [batch] = calibration_batches(torch.arange(43), samples=2, seq_length=10, seed=seed)
        assert len(set((batch[:, 0] % 10).tolist())) == 1
        begins.add(int(batch[0, 0]) % 10)
        seen.update(batch.flatten().tolist())
    assert begins == {0, 1, 2, 3}
    assert seen == set(range(43))


def test_all_windows_can_be_asked_for() -> None:
    [batch] = calibration_batches(torch.arange(40), samples=4, seq_length=10, seed=0)
    assert sorted(batch.flatten().tolist()) == list(range(40))


@pytest.mark.parametrize(
    ("samples", "seq_length", "reason"),
    [
        (5, 10, "has 49 tokens, room for 4 windows of 10, fewer than the 5 needed: lower --samples"),
        (1, 50, "room for 0 windows of 50, fewer than the 1 needed: lower --seq-length"),
        (0, 10, "--samples cannot be 0"),
        (1, 0, "--seq-length cannot be 0"),
    ],
)
def test_too_few_calibration_tokens(samples: int, seq_length: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        calibration_batches(torch.arange(49), samples, seq_length, seed=0)


def test_windows_longer_than_the_models_positions() -> None:
    config = tiny_llama().config
    check_seq_length(config, 512)
    with pytest.raises(InputError, match="513 tokens are longer than the 512 positions of the model"):
        check_seq_length(config, 513)


def test_a_tokenizer_of_another_model() -> None:
    config = tiny_llama().config
    check_vocabulary(config, torch.tensor([0, 511]))
    with pytest.raises(InputError, match="token 512, but the model has only 512 embeddings"):
        check_vocabulary(config, torch.tensor([512, 3]))


@pytest.mark.parametrize("documents", ["hello world", [{"text": "hello"}], [3]], ids=["text", "record", "number"])
def test_what_is_no_list_of_texts_is_refused(documents):
    with pytest.raises(InputError, match="give"):
        tokenise(tiny_tokenizer(), documents)
