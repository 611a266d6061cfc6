"""How much longer a tokenizer's rules can make a text: the library that obeys them can end the process for memory."""

import base64
import binascii
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError
from optprune.models.weights_files import own_or_cached
from optprune.system.files import read_json

MOST = 150
"""how many times as long a text may become: the rules of sentencepiece, NFKC and spaces as symbols, come to 132"""
FILE = "tokenizer.json"
PARTS = ("normalizer", "pre_tokenizer", "decoder")
SEQUENCES = ("normalizers", "pretokenizers", "decoders")


def check_file(where: str, source: str) -> None:
    """Raise InputError where the tokenizer.json of a model lets texts grow too much, before anything obeys it.

    What cannot be read is left to the library that reads it.
    """
    data: Any = None
    with suppress(OSError, ValueError):
        file = own_or_cached(where, FILE)
        data = None if file is None else read_json(Path(file).read_text(encoding="utf-8"), FILE)
    if isinstance(data, Mapping):
        _check([data.get(part) for part in PARTS], source)


def check_growth(tokenizer: Tokenizer | None, source: str) -> None:
    """Raise InputError where a tokenizer lets texts grow too much, wherever its rules came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(backend, part, None) for part in PARTS]
    rules = []
    for part in parts:
        with suppress(Exception):  # rules of one's own in Python have no text
            rules.append(read_json(part.__getstate__().decode(), FILE) if part is not None else None)
    _check(rules, source)


def _check(parts: list[Any], source: str) -> None:
    for rules in parts:
        found = growth(rules)
        if found > MOST:
            raise InputError(
                f"the tokenizer of {source} has rules by which a text can become {found:,.0f} times as long, and "
                f"{MOST} is the most here: fetch its files again, or save it without these rules"
            )


def growth(rule: Any) -> float:
    """Return how many times as many bytes a rule, or a sequence of rules, can make of a text."""
    if not isinstance(rule, Mapping):
        return 1.0
    inner = [rule[name] for name in SEQUENCES if isinstance(rule.get(name), list)]
    if inner:
        return math.prod(growth(each) for rules in inner for each in rules)
    if "pattern" in rule and "content" in rule:  # by these names, since older files do not say of what type it is
        pattern = rule["pattern"]
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else pattern
        return max(1.0, _bytes(rule["content"]) / max(1, _bytes(replaced)))
    if "precompiled_charsmap" in rule:
        return max(1.0, _longest(rule["precompiled_charsmap"]) / 3)  # hardly a sign of one byte is replaced
    return 1.0 + max(_bytes(rule.get(name)) for name in ("prepend", "replacement"))


def _bytes(text: Any) -> int:
    return len(text.encode("utf-8", "backslashreplace")) if isinstance(text, str) else 0


def _longest(packed: Any) -> int:
    """The most bytes of a text in sentencepiece's map, which is a trie and behind it texts that end with zero."""
    try:
        data = base64.b64decode(packed) if isinstance(packed, str) else bytes(packed or ())
    except (binascii.Error, TypeError, ValueError):
        return 0
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(map(len, texts.split(b"\0")))
