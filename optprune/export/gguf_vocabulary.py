"""Vocabulary of a GGUF file, from a fast tokenizer: tokens with kinds and scores, and the pre-tokenizer's name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError

GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN2 = LLAMA3.replace("\\p{N}{1,3}", "\\p{N}")
QWEN35 = QWEN2.replace("]?\\p{L}+", "]?[\\p{L}\\p{M}]+").replace("\\s\\p{L}\\p{N}", "\\s\\p{L}\\p{M}\\p{N}")
UPPER, LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
BEFORE, SHORT = "[^\\r\\n\\p{L}\\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    f"{BEFORE}{UPPER}*{LOWER}+{SHORT}|{BEFORE}{UPPER}+{LOWER}*{SHORT}|"
    "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
DIGITS = "single digits"
SIGNS = "!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~"
DEEPSEEK3 = (
    "\\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    f"[{SIGNS}][A-Za-z]+|[^\\r\\n\\p{{L}}\\p{{P}}\\p{{S}}]?[\\p{{L}}\\p{{M}}]+| ?[\\p{{P}}\\p{{S}}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)
CUTS = {
    (GPT2,): "gpt-2",
    (DIGITS, GPT2): "smollm",
    (LLAMA3,): "llama-bpe",
    (QWEN2,): "qwen2",
    (QWEN35,): "qwen35",
    (O200K,): "gpt-4o",
    DEEPSEEK3: "deepseek-v3",
}
"""llama.cpp's names of pre-tokenizers, by the steps that split a text before bytes are merged"""
NEVER = -1000.0
"""score of a token that no merge produces"""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a model by id, as llama.cpp stores them."""

    model: str
    """tokenizer model: gpt2 (merged bytes) or llama (merged pieces with byte fallback)"""
    cut: str
    """name of the pre-tokenizer"""
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    space_first: bool
    """whether a text gets a space before its first word"""

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> "Vocabulary":
        """Return the vocabulary of a fast tokenizer, padded to `size` tokens.

        Raises InputError where llama.cpp would split text differently.
        """
        if not tokenizer.is_fast:
            raise InputError("the tokenizer has no tokenizer.json, which the export reads: save it as a fast one")
        # Every fast tokenizer has this attribute; the base class does not declare it.
        data: Mapping[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        model = data["model"]
        if model["type"] != "BPE":
            raise InputError(f"a {model['type']} tokenizer cannot be exported to GGUF, only a BPE one")
        added = {token["id"]: token for token in data["added_tokens"]}
        names = {index: text for text, index in model["vocab"].items()}
        pieces = bool(model.get("byte_fallback"))
        # llama.cpp merges pieces by score: the earlier a merge, the higher the score of its result.
        ranks = {"".join(_pair(merge)): -float(rank) for rank, merge in enumerate(model["merges"])} if pieces else {}
        tokens, scores, kinds = list[str](), list[float](), list[int]()
        for index in range(size):
            text, kind = names.get(index, f"[PAD{index}]"), TokenType.UNUSED
            if index in added:
                text = added[index]["content"]
                kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
            elif index in names:
                kind = TokenType.BYTE if pieces and _is_byte(text) else TokenType.NORMAL
            if pieces and text == model.get("unk_token"):
                kind = TokenType.UNKNOWN
            tokens.append(text)
            scores.append(ranks.get(text, NEVER if pieces else 0.0))
            kinds.append(int(kind))
        space_first = pieces and "Prepend" in json.dumps([data["normalizer"], data["pre_tokenizer"]])
        cut = "default" if pieces else _cut(data["pre_tokenizer"])
        return cls("llama" if pieces else "gpt2", cut, tuple(tokens), tuple(scores), tuple(kinds), space_first)

    def write(self, writer: GGUFWriter, tokenizer: Tokenizer, folder: Path) -> None:
        """Write the vocabulary, the special tokens and the chat template of a folder."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(list(self.tokens))
        writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.kinds))
        writer.add_add_space_prefix(self.space_first)
        special = SpecialVocab(folder, load_merges=self.model == "gpt2", n_vocab=len(self.tokens))
        # The tokenizer's behaviour decides, not the files beside it.
        first = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        special.add_special_token = {"bos": first, "eos": False}
        names = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        special.special_token_ids = {
            name: index for name, index in names.items() if isinstance(index, int) and index < len(self.tokens)
        }
        template = tokenizer.chat_template
        special.chat_template = template if isinstance(template, str) else None
        special.add_to_gguf(writer, quiet=True)


def _pair(merge: "str | list[str]") -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _cut(pre: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name of a pre-tokenizer. Raises InputError where none is known to split text the same way."""
    steps = list[str]()
    for step in (pre or {}).get("pretokenizers", [pre]):
        if step is None:
            continue
        if step["type"] == "Digits" and step["individual_digits"]:
            steps.append(DIGITS)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = str(step["pattern"].get("Regex", step["pattern"]))
            steps.append(pattern.replace("\r", "\\r").replace("\n", "\\n"))
        elif step["type"] == "ByteLevel":
            if step["add_prefix_space"]:
                steps.append("a space before the text")
            if step["use_regex"]:
                steps.append(GPT2)
        else:
            steps.append(step["type"])
    name = CUTS.get(tuple(steps))
    if name is None:
        raise InputError(
            f"the tokenizer splits text by {' and '.join(steps) or 'no rule'}, and none of llama.cpp's pre-tokenizers "
            f"is known to do the same ({', '.join(CUTS.values())}): the model cannot be exported to GGUF"
        )
    return name
