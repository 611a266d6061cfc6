"""Tokenizers whose rules make a text many times as long are refused; common ones are accepted."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from optprune.errors import InputError
from optprune.models import load_tokenizer
from optprune.models.tokenizer import growth
from tests.helpers.tiny_models import save_tiny, tiny_llama

DOUBLING = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
USED = {
    "spaces as symbols": [{"type": "Prepend", "prepend": "▁"}, SPACES],
    "runs of spaces": [
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ],
    "quotes": [
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
        {"type": "Replace", "pattern": {"String": "''"}, "content": '"'},
        {"type": "NFKD"},
    ],
}


def with_rules(folder: Path, rules: list[Any], added: str | None = None) -> Path:
    save_tiny(tiny_llama(), folder)
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["normalizer"] = {"type": "Sequence", "normalizers": rules}
    if added is not None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        data["added_tokens"].append({"id": 600, "content": added, **flags})
    file.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    "rules",
    [
        [DOUBLING] * 40,
        [{"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 10_000}],
        [{"type": "Prepend", "prepend": "x" * 10_000}],
        [{"pattern": {"String": "e"}, "content": "x" * 10_000}],
        [{"type": "Sequence", "normalizers": [DOUBLING] * 20}, {"type": "Sequence", "normalizers": [DOUBLING] * 20}],
    ],
    ids=["doubled forty times", "a long text for each letter", "a long text before", "no type", "nested"],
)
def test_rules_that_explode_are_refused(rules: list[Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has rules that can make a text [\d,]+ times as long \(the limit is 150"):
        load_tokenizer(with_rules(tmp_path / "model", rules))


def test_they_are_refused_before_a_token_of_the_file_is_rewritten_by_them(tmp_path: Path) -> None:
    """The library normalises added tokens when it reads the file: 2 ** 40 letters here."""
    with pytest.raises(InputError, match="1,099,511,627,776 times as long"):
        load_tokenizer(with_rules(tmp_path / "model", [DOUBLING] * 40, added="e"))


@pytest.mark.parametrize("name", USED)
def test_rules_that_are_in_use_are_read(name: str, tmp_path: Path) -> None:
    assert load_tokenizer(with_rules(tmp_path / "model", USED[name])) is not None


@pytest.mark.parametrize("rules", [[DOUBLING] * 3, USED["spaces as symbols"], USED["runs of spaces"]])
def test_no_text_grows_by_more(rules: list[Any]) -> None:
    sequence = {"type": "Sequence", "normalizers": rules}
    normalizer = normalizers.Sequence([])
    normalizer.__setstate__(json.dumps(sequence).encode())
    for text in ("e" * 50, " " * 50, "a b  e" * 9, "x"):
        assert len(normalizer.normalize_str(text).encode()) <= growth(sequence) * len(text.encode())
