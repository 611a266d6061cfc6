"""Checkpoints with random weights in the shapes of the papers' models, written a block at a time."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from optprune.models.registry import architecture_of


@dataclass(frozen=True)
class Shape:
    """A model's shape: how many blocks it has, and its config with fewer of them, or with fewer tokens to know."""

    blocks: int
    vocabulary: int
    config: Callable[[int, int], PretrainedConfig]


def opt_125m(blocks: int, vocabulary: int) -> PretrainedConfig:
    return OPTConfig(
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        hidden_size=768,
        word_embed_proj_dim=768,
        ffn_dim=3072,
        num_attention_heads=12,
        max_position_embeddings=2048,
    )


def llama(hidden: int, width: int, heads: int, kv_heads: int) -> Callable[[int, int], PretrainedConfig]:
    def config(blocks: int, vocabulary: int) -> PretrainedConfig:
        return LlamaConfig(
            num_hidden_layers=blocks,
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=width,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=8192,
        )

    return config


SHAPES = {
    "opt-125m": Shape(12, 50272, opt_125m),
    "llama3-8b": Shape(32, 128256, llama(4096, 14336, 32, 8)),
    "llama-30b": Shape(60, 32000, llama(6656, 17920, 52, 52)),
    "llama3-70b": Shape(80, 128256, llama(8192, 28672, 64, 8)),
}


def write_checkpoint(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """A folder that `open_model` reads, with one file for each block and one for all else: one is in memory at a time.

    Matrices are normal with the config's initializer_range, vectors those of a norm that does nothing, or zero biases.
    """
    folder.mkdir(parents=True)
    config.dtype = dtype  # type: ignore[attr-defined]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks, tied = architecture_of(config).blocks, set(model._tied_weights_keys or ())
    tied = tied if config.tie_word_embeddings else set()
    files: dict[str, dict[str, Tensor]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            inside = name.startswith(f"{blocks}.")
            number = name.removeprefix(f"{blocks}.").partition(".")[0] if inside else "rest"
            files.setdefault(f"model-{number}.safetensors", {})[name] = weight
    generator, index, total = torch.Generator().manual_seed(0), dict[str, str](), 0
    for file, weights in files.items():
        values = {name: drawn(name, weight.shape, config, generator).to(dtype) for name, weight in weights.items()}
        save_file(values, folder / file, {"format": "pt"})
        index |= dict.fromkeys(values, file)
        total += sum(value.nbytes for value in values.values())
        del values
    told = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def drawn(name: str, shape: torch.Size, config: PretrainedConfig, generator: torch.Generator) -> Tensor:
    """A parameter's random values."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    deviation = getattr(config, "initializer_range", None) or getattr(config, "init_std", 0.02)
    return torch.randn(shape, generator=generator) * deviation
