"""Small models of architectures that nobody described, and what is known of them from reading their code."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.tiny_models import DELTA_NET, NO_TOKENS, SHAPE, randomise

PLAIN_MLP: dict[str, Any] = {"mlp_consumer": "mlp.down_proj", "mlp_producers": ("mlp.up_proj",), "rows_of_unit": 1}
GATED: dict[str, Any] = {**PLAIN_MLP, "mlp_producers": ("mlp.gate_proj", "mlp.up_proj")}
UNKNOWN: dict[str, dict[str, Any]] = {
    "starcoder2": {"mlp_consumer": "mlp.c_proj", "mlp_producers": ("mlp.c_fc",), "head_dim_is_free": True},
    "cohere": {**GATED, "logits_factor": "logit_scale"},
    "stablelm": {**GATED, "head_dim_is_free": False},
    "glm4": {
        **{**GATED, "mlp_producers": ("mlp.gate_up_proj",), "rows_of_unit": 2},
        "attention_parts": ("input_layernorm", "self_attn", "post_self_attn_layernorm"),
        "mlp_parts": ("post_attention_layernorm", "mlp", "post_mlp_layernorm"),
    },
    "nemotron": PLAIN_MLP,
    "olmo": {**GATED, "after_blocks": ("model.norm",)},
    "persimmon": {"joined": "heads", "query": "self_attn.query_key_value", "after_blocks": ("model.final_layernorm",)},
}
"""by model type, some of what a draft must say"""
OWN: dict[str, dict[str, Any]] = {"glm4": {"head_dim": 16}, "qwen3_5_text": DELTA_NET}
"""the fields of a model type whose defaults are those of a large one"""


def config_of(name: str, **fields: Any) -> PretrainedConfig:
    """A config of the shape that the tiny models have; keywords replace fields."""
    shape = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 128, **NO_TOKENS, **OWN.get(name, {}), **fields}
    return AutoConfig.for_model(name, **shape)


def unknown(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A model of it whose parameters are random."""
    return randomise(AutoModelForCausalLM.from_config(config_of(name, **fields)), seed)
