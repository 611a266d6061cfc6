"""Chat data: read from files, and written by the chat template of the tokenizer."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from optprune.errors import InputError
from optprune.texts import Conversation, read_documents, tokenise
from tests.helpers.begun_tokenizer import begun_tokenizer
from tests.helpers.numbers_tokenizer import TEMPLATE
from tests.helpers.tiny_models import tiny_tokenizer

CHATS = [
    [{"role": "user", "content": "What is new?"}, {"role": "assistant", "content": "Prices rose."}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "And?"}],
]


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def messages(spec: str) -> list[list[dict[str, Any]]]:
    documents = read_documents(spec)
    assert all(isinstance(document, Conversation) for document in documents)
    return [[dict(message) for message in document.messages] for document in documents]  # type: ignore[union-attr]


def test_messages_in_jsonl_are_one_document_a_conversation(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    empty: list[Any] = [None, [], [{"role": "user", "content": " "}]]
    file.write_text(lines([{"messages": chat, "id": 3} for chat in [*CHATS, *empty]]))
    assert messages(str(file)) == messages(f"{file}:messages") == CHATS


def test_a_text_column_comes_before_messages(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines([{"messages": chat, "text": "plain", "talk": chat} for chat in CHATS]))
    assert read_documents(str(file)) == ["plain", "plain"]
    assert messages(f"{file}:talk") == CHATS


@pytest.mark.parametrize("column", ["", ":messages"])
def test_messages_in_parquet(tmp_path: Path, column: str) -> None:
    file = tmp_path / "a.parquet"
    # A key that one message has is a null in all others.
    chats = [[*CHATS[0][:1], {**CHATS[0][1], "name": "Ann"}], CHATS[1]]
    parquet.write_table(pyarrow.table({"id": [1, 2], "messages": chats}), file, row_group_size=1)
    assert messages(f"{file}{column}") == chats


def test_texts_in_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), file, row_group_size=2)
    assert read_documents(str(file)) == ["one", "two"]


def test_messages_of_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"messages": CHATS})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    assert messages("hf:some/chats:train") == CHATS


def test_tokens_are_those_of_the_template_one_conversation_after_the_other() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chats = [Conversation(tuple(chat)) for chat in CHATS * 40]
    every = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in CHATS]
    whole = tokenise(tokenizer, chats)
    assert whole.tolist() == (every[0] + every[1]) * 40
    assert tokenizer.decode(every[1]) == "system: Be short.</s>user: And?</s>"
    some = tokenise(tokenizer, iter(chats), 100)
    assert 100 <= len(some) < 100 + max(map(len, every))
    assert some.tolist() == whole[: len(some)].tolist()


def test_no_token_is_added_to_those_of_the_template() -> None:
    """A tokenizer that puts a token before every text does not do so to what the template wrote."""
    tokenizer = begun_tokenizer()
    begin = tokenizer.bos_token_id
    tokenizer.chat_template = "<s>" + TEMPLATE
    assert tokenise(tokenizer, ["words"])[0] == begin
    assert tokenise(tokenizer, [Conversation(tuple(CHATS[0]))]).tolist().count(begin) == 1


def test_a_tokenizer_without_a_template_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"has no chat template.*put a chat_template\.jinja into the model's folder"):
        tokenise(tiny_tokenizer(), [Conversation(tuple(CHATS[0]))])


def test_what_a_template_refuses_is_told_with_its_place() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"cannot write line 7 of a\.jsonl \(roles must alternate\): repair or remove"):
        tokenise(tokenizer, [Conversation(tuple(CHATS[0]), "line 7 of a.jsonl")])


def test_texts_and_conversations_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines([{"messages": CHATS[0]}, {"messages": "a text"}]))
    with pytest.raises(InputError, match="mixes texts and messages: give two texts"):
        read_documents(str(file))
    with pytest.raises(InputError, match="cannot be joined"):
        tokenise(tiny_tokenizer(), ["a text", Conversation(tuple(CHATS[0]))])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([["user", "hello"]], r"message 1 of .* in line 1 of .* is \['user', 'hello'\], without a role"),
        ([CHATS[0][0], {"from": "human", "value": "hello"}], "message 2 .* without a role and content: write"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "the content of message 1 .* is not a text"),
        ([{"role": "user", "content": "half a \ud83d"}], "half a character"),
        ([1, 2], "message 1 .* is 1, without a role"),
        ([[]], "is empty|without a role"),
    ],
)  # fmt: skip
def test_messages_that_are_none(value: list[Any], reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines([{"messages": value}]))
    with pytest.raises(InputError, match=reason) as caught:
        read_documents(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "cannot be read as Parquet"), (b"PAR1 and no more", "cannot be read as Parquet")],
)
def test_a_parquet_file_that_is_none(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_documents(str(file))


def test_a_text_in_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    file, good = tmp_path / "a.parquet", pyarrow.array(["one", "two"])
    ends = pyarrow.array([0, 2, 6], pyarrow.int32()).buffers()[1]
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, ends, pyarrow.py_buffer(b"okcaf\xe9")])
    table = pyarrow.table({"text": pyarrow.chunked_array([good, bad])})
    parquet.write_table(table, file, row_group_size=2)
    with pytest.raises(InputError, match=r"^a text behind row \d of .*a.parquet is not UTF-8: convert it first$"):
        read_documents(str(file))


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one"]}), file)
    with pytest.raises(InputError, match=r"no column 'text' \(it has body\)"):
        read_documents(str(file))
    with pytest.raises(InputError, match=r"no column 'title' \(it has body\)"):
        read_documents(f"{file}:title")
