"""Small random models of every architecture, and a small real tokenizer: what the tests of models stand on."""

import functools
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2ForCausalLM

from benchmarks.tiny_models import (
    ALL_MODELS,
    SHAPE,
    SINGLE,
    TINY_MODELS,
    VOCABULARY,
    tiny_llama,
    tiny_opt,
    tiny_qwen2,
)
from benchmarks.train_small import new_tokenizer
from optprune.models import ARCHITECTURES
from optprune.texts import demo_articles

__all__ = [
    "ALL_MODELS",
    "LLAMA3",
    "SINGLE",
    "SLIDING",
    "TINY_MODELS",
    "VOCABULARY",
    "by_variant",
    "save_tiny",
    "tiny_llama",
    "tiny_mixture",
    "tiny_opt",
    "tiny_qwen2",
    "tiny_sliding",
    "tiny_tokenizer",
]

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


def tiny_mixture(family: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny model of a family with experts, of which every block with an MLP has them."""
    architecture, blocks = ARCHITECTURES[family], config.get("num_hidden_layers", SHAPE["num_hidden_layers"])
    kinds = {"layer_types": ["full_attention", "moe"] * blocks} if family in SINGLE else {}
    return ALL_MODELS[family](seed, **architecture.first_dense(0, blocks), **kinds, **config)


def tiny_sliding(seed: int = 0) -> Qwen2ForCausalLM:
    """Qwen2 whose later blocks see four tokens back only, so that the blocks' masks differ."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return tiny_qwen2(seed, num_hidden_layers=3, layer_types=kinds, **window)


VARIANTS = {
    **TINY_MODELS,
    "qwen2, sliding window": tiny_sliding,
    "opt, norm after attention": lambda: tiny_opt(do_layer_norm_before=False),
}
by_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens, trained on a few articles."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>")


@functools.cache
def _trained() -> str:
    return new_tokenizer(demo_articles("calibration")[:20], VOCABULARY).backend_tokenizer.to_str()


def save_tiny(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model folder with the tiny tokenizer; returns the folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
