"""Small random models of every architecture, for tests and for comparisons of weights bit by bit."""

from functools import partial
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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
"""the models on which everything is tried"""
NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
FOUR_NORMS = {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
WIDTHS_OF_EXPERTS = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 40}
DELTA_NET = {
    **{"head_dim": 24, "full_attention_interval": 2, "partial_rotary_factor": 0.5, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
MIXERS = ["linear_attention", "full_attention"] * 4
"""of as many blocks as a model has"""
SINGLE = {
    "nemotron_h": [
        *("linear_attention", "mlp", "full_attention", "moe", "linear_attention", "moe", "full_attention", "moe")
    ]
}
"""the sub-blocks of families whose blocks have one each: two such blocks stand for one of another family"""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
LATENT: dict[str, Any] = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "attention_bias": True},
    **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24},
    **{"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
}
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1},
    "exaone4": {"head_dim": 24, "sliding_window": 8, "sliding_window_pattern": 2},
    "falcon_h1": {
        **{"head_dim": 24, "mamba_d_ssm": 96, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 16},
        **{"mamba_chunk_size": 16, "mamba_rms_norm": True, "embedding_multiplier": 1.7, "lm_head_multiplier": 0.8},
        **{"mlp_multipliers": [0.7, 1.2], "ssm_multipliers": [0.8, 1.2, 0.9, 1.1, 0.7], "key_multiplier": 0.6},
        **{"attention_in_multiplier": 1.2, "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.1},
        **{"ssm_out_multiplier": 0.9},
    },
    "gemma2": {**FOUR_NORMS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**FOUR_NORMS, "sliding_window_pattern": 2},
    "gemma4_text": {
        **{"num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "use_double_wide_mlp": True},
        **{"final_logit_softcapping": 3.0},
    },
    "glm4_moe": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1},
        **{"head_dim": 24, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.5},
    },
    "glm4_moe_lite": LATENT,
    "gpt2": {"n_inner": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"attention_bias": True},
    "gpt_oss": {
        **{**EXPERTS, "num_local_experts": 4, "head_dim": 24, "sliding_window": 8},
        **{"swiglu_alpha": 1.4, "swiglu_limit": 0.6, "rope_parameters": {**YARN, "truncate": False}},
    },
    "granite": {
        **{"embedding_multiplier": 1.7, "logits_scaling": 1.3},
        **{"residual_multiplier": 0.6, "attention_multiplier": 0.4},
    },
    "granitemoehybrid": {
        **{"embedding_multiplier": 1.7, "logits_scaling": 1.3, "num_local_experts": 0, "shared_intermediate_size": 128},
        **{"residual_multiplier": 0.6, "attention_multiplier": 0.4, "layer_types": MIXERS, "mamba_n_heads": 4},
        **{"mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 16},
    },
    # Of the widths that it computes from 128 this is the nearest multiple of 128.
    "lfm2": {"full_attn_idxs": [1, 3, 5], "block_multiple_of": 128, "conv_bias": True},
    "ministral3": {
        **{"head_dim": 24, "sliding_window": 40},
        "rope_parameters": {**YARN, "max_position_embeddings": 128, "llama_4_scaling_beta": 0.1},
    },
    "mistral": {"sliding_window": 8},
    "mixtral": {**EXPERTS, "num_local_experts": 4, "sliding_window": 8},
    "nemotron_h": {
        **{"layer_types": SINGLE["nemotron_h"], "head_dim": 24, "mamba_num_heads": 4, "mamba_head_dim": 24},
        **{"n_groups": 2, "ssm_state_size": 16, "chunk_size": 16, "n_routed_experts": 4, "moe_intermediate_size": 48},
        **{"moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 1.5},
    },
    "olmo2": {},
    "olmoe": {**EXPERTS, "norm_topk_prob": False},
    "phi3": {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "qwen3": {
        **{"head_dim": 24, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        **{**EXPERTS, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40},
        **{"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    },
    "qwen3_moe": {
        **{**EXPERTS, "moe_intermediate_size": 48, "norm_topk_prob": True, "head_dim": 24},
        **{"sliding_window": 8, "use_sliding_window": True, "tie_word_embeddings": True},
    },
    "qwen3_5_moe_text": {**DELTA_NET, **EXPERTS, **WIDTHS_OF_EXPERTS},
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": {**DELTA_NET, **EXPERTS, **WIDTHS_OF_EXPERTS},
    "seed_oss": {"head_dim": 24, "attention_out_bias": True, "mlp_bias": True, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layer_interval": 2, "sliding_window": 8, "use_sliding_window": True},
}
"""what is said of every other family beside the shape, so that all that it has does something"""


def tiny(family: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model of a family by its config's name, with 2 KV heads; keywords replace fields of the config."""
    shape = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 128, **NO_TOKENS}
    fields = {**shape, **OTHER_FAMILIES[family], **config}
    if fields.get("layer_types"):
        each = 2 if family in SINGLE else 1
        fields["layer_types"] = fields["layer_types"][: each * fields["num_hidden_layers"]]
    if family == "gemma4_text":
        fields = with_shared_keys(fields["num_hidden_layers"]) | fields
    return randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)), seed)


def with_shared_keys(blocks: int) -> dict[str, Any]:
    """Fields of Gemma 4 by which the last of at least four blocks reads the keys and values of the one before it."""
    shared = int(blocks > 3)
    whole = 1 + shared
    return {
        "layer_types": ["sliding_attention"] * (blocks - whole) + ["full_attention"] * whole,
        "num_kv_shared_layers": shared,
    }


ALL_MODELS = TINY_MODELS | {family: partial(tiny, family) for family in OTHER_FAMILIES}
"""one of every family: what an architecture must do is tried on each"""


def randomise(model: Model, seed: int) -> Model:
    """Draw every parameter anew, norms and biases too, so that nothing is zero or one by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    endings = ("e_score_correction_bias", "layer_scalar")
    corrections = [one for one in model.named_buffers() if one[0].endswith(endings)]
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *corrections):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()
