"""Tokenizers of model sources, refused where their rules could make a text too long.

The library that applies the rules can end the process for lack of memory, so they are checked before it runs.
"""

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError
from optprune.models.checkpoint import own_or_cached
from optprune.models.gguf import gguf_tokenizer
from optprune.models.sources import NO_CODE, locate, reading
from optprune.system.files import read_json
from optprune.system.optional import check_installed

MOST_GROWTH = 150
"""the most times as long a text may become: the rules of sentencepiece, NFKC and spaces as symbols, come to 132"""
FILE = "tokenizer.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""the names of tokenizers that are a sentencepiece model alone"""
PARTS = ("normalizer", "pre_tokenizer", "decoder")
SEQUENCES = ("normalizers", "pretokenizers", "decoders")


def load_tokenizer(source: str | Path) -> Tokenizer | None:
    """Return the tokenizer of a model source, or None where it has none."""
    source = str(source)
    where, options = locate(source)
    if not options and Path(where).is_dir() and not any(Path(where).glob("*token*")):
        return None
    with reading("tokenizer", source, where, options):
        try:
            if options:
                return gguf_tokenizer(where, **options)
            _check_file(where, source)
            tokenizer = AutoTokenizer.from_pretrained(where, **NO_CODE)
            _check_loaded(tokenizer, source)
            return tokenizer
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"the tokenizer of {source} is code in its folder, which is not run: save it as tokenizer.json"
                ) from error
            raise


@contextmanager
def using_tokenizer(source: str) -> Iterator[None]:
    """Turn errors that a tokenizer raises only in use into those of `load_tokenizer`."""
    with reading("tokenizer", source, source, {}):
        yield


def need_tokenizer(tokenizer: Tokenizer | None, source: str) -> Tokenizer:
    """Return the tokenizer of a model source; InputError where it has none."""
    if tokenizer is None:
        raise InputError(f"the model {source} has no tokenizer to read text: save one in its folder")
    return tokenizer


def _check_file(where: str, source: str) -> None:
    """Raise InputError where the rules in a model's tokenizer.json let texts grow too much, before they are loaded.

    A file that cannot be read is left to the library that reads it.
    """
    data: Any = None
    file = None
    with suppress(OSError, ValueError):
        file = own_or_cached(where, FILE)
        data = None if file is None else read_json(Path(file).read_text(encoding="utf-8"), FILE)
    if file is None:
        _check_sentencepiece(where, source)
    if isinstance(data, Mapping):
        _check([data.get(part) for part in PARTS], source)


def _check_sentencepiece(where: str, source: str) -> None:
    """Raise InputError where a tokenizer is a sentencepiece model alone, and what converts it is not installed."""
    found = (own_or_cached(where, name) for name in SENTENCEPIECE)
    # Such a model begins with the tag of its first piece; others of the name are lists of ranks.
    if any(file is not None and Path(file).read_bytes()[:1] == b"\n" for file in found):
        for package in ("sentencepiece", "google.protobuf"):
            check_installed(package, "sentencepiece", f"the tokenizer of {source}, a sentencepiece model,")


def _check_loaded(tokenizer: Tokenizer | None, source: str) -> None:
    """Raise InputError where a loaded tokenizer's rules, wherever they came from, let texts grow too much."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(backend, part, None) for part in PARTS]
    rules = []
    for part in parts:
        with suppress(Exception):  # custom rules in Python cannot be serialised
            rules.append(read_json(part.__getstate__().decode(), FILE) if part is not None else None)
    _check(rules, source)


def _check(parts: list[Any], source: str) -> None:
    for rules in parts:
        found = growth(rules)
        if found > MOST_GROWTH:
            raise InputError(
                f"the tokenizer of {source} has rules that can make a text {found:,.0f} times as long (the limit is "
                f"{MOST_GROWTH}): fetch its files again, or save it without these rules"
            )


def growth(rule: Any) -> float:
    """Return how many times as many bytes a rule, or a sequence of rules, can make of a text."""
    if not isinstance(rule, Mapping):
        return 1.0
    inner = [rule[name] for name in SEQUENCES if isinstance(rule.get(name), list)]
    if inner:
        return math.prod(growth(each) for rules in inner for each in rules)
    if "pattern" in rule and "content" in rule:  # recognised by these names, since older files have no type field
        pattern = rule["pattern"]
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else pattern
        return max(1.0, _bytes(rule["content"]) / max(1, _bytes(replaced)))
    if "precompiled_charsmap" in rule:
        return max(1.0, _longest(rule["precompiled_charsmap"]) / 3)  # hardly any character of one byte is replaced
    return 1.0 + max(_bytes(rule.get(name)) for name in ("prepend", "replacement"))


def _bytes(text: Any) -> int:
    return len(text.encode("utf-8", "backslashreplace")) if isinstance(text, str) else 0


def _longest(packed: Any) -> int:
    """Return the most bytes of a text in sentencepiece's map: a trie, followed by texts that end with zero."""
    try:
        data = base64.b64decode(packed) if isinstance(packed, str) else bytes(packed or ())
    except (binascii.Error, TypeError, ValueError):
        return 0
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(map(len, texts.split(b"\0")))
