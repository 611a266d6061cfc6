"""Small random models of every architecture, for tests and for comparisons of weights bit by bit."""

from typing import Any, TypeVar

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Model = TypeVar("Model", bound=PreTrainedModel)
VOCABULARY = 512
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Grouped-query attention with 2 KV heads; keywords replace fields of the config."""
    shape = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 128, **config}
    return randomise(LlamaForCausalLM(LlamaConfig(**shape)), seed)


def tiny_opt(seed: int = 0, **config: Any) -> OPTForCausalLM:
    """Biases everywhere and tied embeddings; keywords replace fields of the config."""
    shape = {**SHAPE, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0, **config}
    return randomise(OPTForCausalLM(OPTConfig(**shape)), seed)


def tiny_qwen2(seed: int = 0, **config: Any) -> Qwen2ForCausalLM:
    """Biases on q, k and v, tied embeddings, 2 KV heads; keywords replace fields of the config."""
    shape = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 128, "tie_word_embeddings": True, **config}
    return randomise(Qwen2ForCausalLM(Qwen2Config(**shape)), seed)


TINY_MODELS = {"llama": tiny_llama, "opt": tiny_opt, "qwen2": tiny_qwen2}


def randomise(model: Model, seed: int) -> Model:
    """Draw every parameter anew, norms and biases too, so that nothing is zero or one by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()
