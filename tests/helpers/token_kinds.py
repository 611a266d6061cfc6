"""Tiny tokenizers of every kind whose vocabulary can be pruned, trained on news."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.train_small import new_tokenizer
from optprune.texts import demo_articles

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
KINDS = ("merged bytes", "merged pieces", "scored pieces", "scored pieces and bytes")


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of about 700 tokens, which puts <s> before a text and has an added token that is not special."""
    backend = Tokenizer.from_str(_trained(kind))
    names = {"unk_token": "<unk>"} if "pieces" in kind else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE, **names
    )


@functools.cache
def _trained(kind: str) -> str:
    articles = [text.replace("_", " ") for text in demo_articles("calibration")[:20]]
    backend = {
        "merged bytes": _merged_bytes,
        "merged pieces": _merged_pieces,
        "scored pieces": functools.partial(_scored_pieces, with_bytes=False),
        "scored pieces and bytes": functools.partial(_scored_pieces, with_bytes=True),
    }[kind](articles)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    first = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", first)])
    return backend.to_str()


def _merged_bytes(articles: list[str]) -> Tokenizer:
    return new_tokenizer(articles, 700).backend_tokenizer


def _merged_pieces(articles: list[str]) -> Tokenizer:
    """As Llama 2 and Gemma: spaces as symbols, merges of pieces, bytes for unknown characters."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    backend.train_from_iterator(articles, trainer)
    data = json.loads(backend.to_str())
    data["pre_tokenizer"] = None
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in BYTES]
    backend = Tokenizer.from_str(json.dumps(data))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _scored_pieces(articles: list[str], *, with_bytes: bool) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(articles, trainer)
    data = json.loads(backend.to_str())
    if with_bytes:
        data["model"]["vocab"] += [[byte, -30.0] for byte in BYTES]
        data["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(data))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
