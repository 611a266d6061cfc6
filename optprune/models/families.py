"""The architectures that optprune knows, as one table of data; each takes over what it shares with an earlier one.

A new architecture is one entry here, and a modelling file in `pruned/` whose blocks may differ in shape. Classes are
named here only: their modules are imported when a model of the family is used.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from optprune.models.architecture import (
    GATED,
    KEPT_PAIRS,
    Architecture,
    Classes,
    ExpertTensors,
    Heads,
    Latent,
    Mixture,
    Shared,
    pruned_module,
)
from optprune.models.recurrent import Recurrent


def grouped_heads(config: PretrainedConfig) -> Heads:
    """Return the head layout of grouped-query attention; configs since Llama 3.2 name a head_dim of their own."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_key_value_heads, dim)


def gated_heads(config: PretrainedConfig) -> Heads:
    """Return the head layout of grouped-query attention with a factor for each value dimension."""
    return replace(grouped_heads(config), gated=True)


def latent_heads(config: PretrainedConfig) -> Heads:
    """Return the head layout of latent attention; the rotated dimensions of the keys are one vector for all heads."""
    count, plain = config.num_attention_heads, config.qk_nope_head_dim
    return Heads(count, count, plain + config.qk_rope_head_dim, plain, config.v_head_dim)


def heads_of_first_block(config: PretrainedConfig) -> Heads:
    """Return the head layout of the first block, where blocks have heads of other sizes."""
    first = config.per_layer_config[0]
    return Heads(config.num_attention_heads, first.num_key_value_heads, first.head_dim, by_block=True)


def double_widths(config: PretrainedConfig) -> list[int]:
    """Return 2 for blocks whose MLP is twice as wide, because they read keys and values of earlier ones, and else 1."""
    return [1 + (config.use_double_wide_mlp and mode == "reuse") for mode in config.kv_sharing_modes]


def fields_of_gemma4(config: PretrainedConfig) -> dict[str, Any]:
    """Return what a config of Gemma 4 leaves out of its blocks, and which of its fields must be off."""
    experts = config.enable_moe_block
    mlps, beside = ((),) if experts else LLAMA.stages[2:], GEMMA4.stages[4:]
    stages = (*LLAMA.stages[:2], *mlps, *(beside if config.hidden_size_per_layer_input else ()))
    # Among tokens of text alone, "vision" says nothing.
    off = ("use_bidirectional_attention",) if config.use_bidirectional_attention == "all" else ()
    # The MLP beside the experts has one width in all blocks.
    off += ("use_double_wide_mlp",) if experts and max(double_widths(config)) > 1 else ()
    found = {**(GEMMA4_EXPERTS if experts else {}), "stages": stages, "off": off}
    if config.num_kv_shared_layers:
        return found
    heads = "blocks without a window have heads of another size, or another number of them"
    return {**found, "indivisible": {**GEMMA4.indivisible, "kv_heads": heads}}


def equal_heads(config: PretrainedConfig) -> Heads:
    """Return the head layout of attention in which every query head has a KV head of its own."""
    count = config.num_attention_heads
    return Heads(count, count, config.hidden_size // count)


def keys_of_delta_net(config: PretrainedConfig) -> int:
    """Return the key dimensions of all heads of a gated delta network."""
    return config.linear_num_key_heads * config.linear_key_head_dim


def values_of_delta_net(config: PretrainedConfig) -> int:
    """Return the value dimensions of all heads of a gated delta network."""
    return config.linear_num_value_heads * config.linear_value_head_dim


def value_heads_of_delta_net(config: PretrainedConfig) -> int:
    """Return the value heads of a gated delta network."""
    return int(config.linear_num_value_heads)


def width_of_falcon_mamba(config: PretrainedConfig) -> int:
    """Return the width of all heads of Falcon-H1's Mamba 2: `mamba_d_ssm`, or else the expanded hidden size."""
    named = config.mamba_d_ssm
    return int(config.mamba_expand * config.hidden_size if named is None else named)


def channels(config: PretrainedConfig) -> int:
    """Return the channels of a short convolution."""
    return int(config.hidden_size)


def clamped_swiglu(experts: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Return the hidden units of GPT-OSS's experts, in the order of operations of the stock class."""
    gate, up = gate.clamp(max=experts.limit), up.clamp(min=-experts.limit, max=experts.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * experts.alpha))


def stages_of(mixer: Recurrent) -> tuple[tuple[str, ...], ...]:
    """Return the linear layers of a mixer in the order of the forward pass, those that read the same input together."""
    return (tuple(mixer.reads), (mixer.output,))


def mamba2(
    norm: str,
    module: str,
    *,
    width: Callable[[PretrainedConfig], int],
    sizes: tuple[str, str, str],
    counted: tuple[str, ...] = (),
) -> Recurrent:
    """Return a Mamba 2 behind a norm, from the config fields of its heads, its groups and the size of a state.

    `width` returns the dimensions of all heads, and `counted` names the fields by which groups of heads can go.
    """
    heads, groups, state = sizes

    def steps(config: PretrainedConfig) -> int:
        return int(getattr(config, heads))

    def states(config: PretrainedConfig) -> int:
        return int(getattr(config, groups) * getattr(config, state))

    # A value for each dimension, and what each group writes and reads by; before them a factor for each dimension.
    convolved = (width, states, states)
    return Recurrent(
        module=module,
        heads=lambda config: int(getattr(config, groups)),
        reads={f"{module}.in_proj": (width, *convolved, steps)},
        output=f"{module}.out_proj",
        width=width,
        parts=(norm, module),
        vectors={
            **dict.fromkeys((f"{module}.conv1d.weight", f"{module}.conv1d.bias"), convolved),
            **dict.fromkeys((f"{module}.A_log", f"{module}.D", f"{module}.dt_bias"), (steps,)),
            f"{module}.norm.weight": (width,),
        },
        counted=counted,
    )


WHOLE_MIXER = "the block's recurrent mixer keeps all its heads"


def named(
    model_type: str,
    family: str,
    *,
    stock: str = "",
    model: str = "ForCausalLM",
    block: str = "DecoderLayer",
    attention: str = "Attention",
    config: str = "Config",
) -> dict[str, Any]:
    """Return the model_type, the stock and the pruned classes of a family; a class name is the family and an ending.

    The stock modelling module is named after `stock` where that is not the model_type.
    """
    stock, endings = stock or model_type, (model, block, attention)
    return {
        "model_type": model_type,
        "stock": Classes(
            f"transformers.models.{stock}.modeling_{stock}", *(f"{family}{ending}" for ending in (config, *endings))
        ),
        "pruned": Classes(pruned_module(model_type), *(f"Pruned{family}{ending}" for ending in ("Config", *endings))),
    }


# Llama 1 to 3.2, and models of its class such as SmolLM2.
LLAMA = Architecture(
    blocks="model.layers",
    after_blocks=("model.norm",),
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    mlp_producers=("mlp.gate_proj", "mlp.up_proj"),
    mlp_consumer="mlp.down_proj",
    mlp_width="intermediate_size",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    heads=grouped_heads,
    head_dim_is_free=True,
    attention_parts=("input_layernorm", "self_attn"),
    mlp_parts=("post_attention_layernorm", "mlp"),
    recoverable=(
        ("self_attn", ("self_attn.v_proj", "self_attn.o_proj")),
        ("mlp", ("mlp.up_proj", "mlp.down_proj")),
    ),
    buffers=(f"self_attn.{KEPT_PAIRS}",),
    **named("llama", "Llama"),
)
# A sliding window over every block where the config has one.
MISTRAL = replace(LLAMA, **named("mistral", "Mistral"))
# Queries that are scaled by the positions of their tokens.
MINISTRAL3 = replace(
    LLAMA,
    in_transformers_4=False,
    **named("ministral3", "Ministral3"),
)
# Biases on queries, keys and values, on other layers by option.
SEED_OSS = replace(LLAMA, **named("seed_oss", "SeedOss"))
# Qwen2 and Qwen2.5: biases on queries, keys and values, and an optional sliding window.
QWEN2 = replace(LLAMA, **named("qwen2", "Qwen2"))
# Norms of the queries and keys of each head, and sliding windows in some blocks.
QWEN3 = replace(LLAMA, **named("qwen3", "Qwen3"))
# Four norms in a block, a sliding window in every other block, and soft caps of the logits.
GEMMA2 = replace(
    LLAMA,
    attention_parts=("input_layernorm", "self_attn", "post_attention_layernorm"),
    mlp_parts=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    off=("use_bidirectional_attention",),
    logits_cap="final_logit_softcapping",
    **named("gemma2", "Gemma2"),
)
# Text-only Gemma 3: Gemma 2's blocks, with norms of queries and keys, and two rotary embeddings.
GEMMA3 = replace(
    GEMMA2,
    **named("gemma3_text", "Gemma3", stock="gemma3", config="TextConfig"),
)
# Text-only Gemma 4: Gemma 3's blocks with a norm of values, an input of their own for each token, and a scalar; blocks
# without a window have heads of another size and perhaps no values; the last ones may read those of earlier ones.
GEMMA4 = replace(
    GEMMA3,
    stages=(*LLAMA.stages, ("per_layer_input_gate",), ("per_layer_projection",)),
    heads=heads_of_first_block,
    head_dim_is_free=False,
    indivisible={
        "value_dim": "a norm goes over the values of each head, so removing one changes the others",
        "kv_heads": "blocks have heads of other sizes, and may share their keys and values",
    },
    beside={
        "per_layer_input_gate": ("hidden_size_per_layer_input", "hidden_size"),
        "per_layer_projection": ("hidden_size", "hidden_size_per_layer_input"),
    },
    shared=Shared(
        argument="shared_kv_states",
        kind=lambda attention: attention.layer_type,
        reads=lambda attention: attention.is_kv_shared_layer,
        writes=lambda attention: attention.store_full_length_kv,
        numbers="per_layer_input",
        width="hidden_size_per_layer_input",
    ),
    per_block={"model.embed_tokens_per_layer": 1, "model.per_layer_model_projection": 0},
    buffers=("layer_scalar",),
    stays=True,
    wide=double_widths,
    alone={"num_kv_shared_layers": 0},
    recoverable=LLAMA.recoverable[1:],
    off=(),
    by_config=fields_of_gemma4,
    in_transformers_4=False,
    **named(
        *("gemma4_text", "Gemma4"),
        **{"stock": "gemma4", "config": "TextConfig", "block": "TextDecoderLayer", "attention": "TextAttention"},
    ),
)
# Experts beside the MLP, behind a norm of their own, and a router with one without weights.
GEMMA4_EXPERTS: dict[str, Any] = {
    **{"mlp_producers": (), "mlp_consumer": "", "mlp_width": "moe_intermediate_size"},
    "mlp_parts": (
        *("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm_1", "router", "pre_feedforward_layernorm_2"),
        *("experts", "post_feedforward_layernorm_2", "post_feedforward_layernorm"),
    ),
    "mixture": Mixture(
        module="",
        experts="experts",
        router="router",
        chosen="top_k_experts",
        shared="mlp",
        shared_width="intermediate_size",
        normalised=lambda config: True,
        layout=ExpertTensors(in_files=True),
        rows=("proj.weight", "per_expert_scale"),
        scored="router.proj",
        factors="per_expert_scale",
        normed="pre_feedforward_layernorm_2",
    ),
    **{"wide": lambda config: (), "recoverable": ()},
}
# Multipliers of the embeddings, the attention scores, the residual branches and the logits.
GRANITE = replace(
    LLAMA,
    logits_divisor="logits_scaling",
    **named("granite", "Granite"),
)
# Norms behind both sub-blocks and none before them, and one norm over the queries (and keys) of all heads.
OLMO2 = replace(
    LLAMA,
    attention_parts=("self_attn", "post_attention_layernorm"),
    mlp_parts=("mlp", "post_feedforward_layernorm"),
    indivisible={"kv_heads": "one norm goes over the queries of all heads, so removing a head changes the others"},
    **named("olmo2", "Olmo2"),
)
# Norms behind both sub-blocks, as in OLMo 2, and of each head, as in Qwen3; beside blocks with a sliding window those
# without one have no rotary embeddings.
EXAONE4 = replace(
    OLMO2,
    indivisible={},
    **named("exaone4", "Exaone4"),
)
# Phi-3 and 4: one layer for queries, keys and values, and one for both halves of the gated MLP.
PHI3 = replace(
    LLAMA,
    stages=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    mlp_producers=("mlp.gate_up_proj",),
    rows_of_unit=2,
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    joined="parts",
    # With the long rotary scaling the config insists on heads that make up the hidden size.
    head_dim_is_free=False,
    # A sub-module is not affine in a layer that also makes the factors of its output.
    recoverable=(),
    **named("phi3", "Phi3"),
)
# Some blocks have no rotary embeddings, and those may have a sliding window.
SMOLLM3 = replace(
    LLAMA,
    by_block=("layer_types", "no_rope_layers"),
    **named("smollm3", "SmolLM3"),
)

# Gated delta networks: keys and values pass through a short convolution, and each value head has a state.
KEYS_AND_VALUES = (keys_of_delta_net, keys_of_delta_net, values_of_delta_net)
DELTA_NET = Recurrent(
    module="linear_attn",
    heads=lambda config: int(config.linear_num_key_heads),
    reads={
        "linear_attn.in_proj_qkv": KEYS_AND_VALUES,
        "linear_attn.in_proj_z": (values_of_delta_net,),
        "linear_attn.in_proj_b": (value_heads_of_delta_net,),
        "linear_attn.in_proj_a": (value_heads_of_delta_net,),
    },
    output="linear_attn.out_proj",
    width=values_of_delta_net,
    parts=("input_layernorm", "linear_attn"),
    vectors={
        "linear_attn.conv1d.weight": KEYS_AND_VALUES,
        **dict.fromkeys(("linear_attn.A_log", "linear_attn.dt_bias"), (value_heads_of_delta_net,)),
    },
    counted=("linear_num_key_heads", "linear_num_value_heads"),
)
# Text-only Qwen3.5: a gated delta network in most blocks, and gated attention in the others.
QWEN3_5 = replace(
    LLAMA,
    stages=(*stages_of(DELTA_NET), *LLAMA.stages),
    heads=gated_heads,
    recurrent=DELTA_NET,
    in_transformers_4=False,
    **named("qwen3_5_text", "Qwen3_5", stock="qwen3_5", config="TextConfig"),
)

# LFM2: short convolutions of gated channels in most blocks, and attention in the others.
SHORT_CONVOLUTION = Recurrent(
    module="conv",
    heads=channels,
    reads={"conv.in_proj": (channels,) * 3},
    output="conv.out_proj",
    width=channels,
    parts=("operator_norm", "conv"),
    vectors=dict.fromkeys(("conv.conv.weight", "conv.conv.bias"), (channels,)),
)
LFM2 = replace(
    LLAMA,
    after_blocks=("model.embedding_norm",),
    stages=(
        *(*stages_of(SHORT_CONVOLUTION), LLAMA.stages[0], ("self_attn.out_proj",)),
        *(("feed_forward.w1", "feed_forward.w3"), ("feed_forward.w2",)),
    ),
    mlp_producers=("feed_forward.w1", "feed_forward.w3"),
    mlp_consumer="feed_forward.w2",
    mlp_width_adjusted="block_auto_adjust_ff_dim",
    output="self_attn.out_proj",
    attention_parts=("operator_norm", "self_attn"),
    mlp_parts=("ffn_norm", "feed_forward"),
    recurrent=SHORT_CONVOLUTION,
    indivisible={"recurrent": "the block's recurrent mixer keeps all its channels, which are as many as inputs"},
    recoverable=(
        ("self_attn", ("self_attn.v_proj", "self_attn.out_proj")),
        ("feed_forward", ("feed_forward.w3", "feed_forward.w2")),
    ),
    numbers=("full_attn_idxs",),
    in_transformers_4=False,
    **named("lfm2", "Lfm2"),
)

# Granite 4: Mamba 2 in most blocks, and attention in the others, which may have no rotary embeddings.
MAMBA2 = mamba2(
    *("input_layernorm", "mamba"),
    width=lambda config: int(config.mamba_expand * config.hidden_size),
    sizes=("mamba_n_heads", "mamba_n_groups", "mamba_d_state"),
)
GRANITE_HYBRID = replace(
    GRANITE,
    stages=(*stages_of(MAMBA2), *LLAMA.stages[:2], ("shared_mlp.input_linear",), ("shared_mlp.output_linear",)),
    mlp_producers=("shared_mlp.input_linear",),
    mlp_consumer="shared_mlp.output_linear",
    mlp_width="shared_intermediate_size",
    rows_of_unit=2,
    mlp_parts=("post_attention_layernorm", "shared_mlp"),
    recurrent=MAMBA2,
    indivisible={"recurrent": f"{WHOLE_MIXER}, whose width goes by the hidden size"},
    recoverable=LLAMA.recoverable[:1],
    off=("output_router_logits",),
    by_config=lambda config: GRANITE_EXPERTS if config.num_local_experts else {},
    in_transformers_4=False,
    **named("granitemoehybrid", "GraniteMoeHybrid"),
)
# Experts beside that MLP, which is then one that every token goes through; a softmax over the chosen ones.
GRANITE_EXPERTS: dict[str, Any] = {
    "stages": (*stages_of(MAMBA2), *LLAMA.stages[:2]),
    **{"mlp_producers": (), "mlp_consumer": "", "mlp_width": "intermediate_size", "rows_of_unit": 1},
    "mlp_parts": ("post_attention_layernorm", "block_sparse_moe", "shared_mlp"),
    "mixture": Mixture(
        module="block_sparse_moe",
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.router",
        count="num_local_experts",
        shared="shared_mlp",
        shared_width="shared_intermediate_size",
        shared_last=True,
        shared_layers=("input_linear", "output_linear"),
        shared_rows=2,
        width="intermediate_size",
        normalised=lambda config: True,
        stored={
            "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
            "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
            "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
        },
        layout=ExpertTensors(in_files=True),
    ),
}
# Falcon-H1: Mamba 2 and attention side by side in every block, and multipliers of their inputs and outputs.
FALCON_MAMBA2 = mamba2(
    *("input_layernorm", "mamba"),
    width=width_of_falcon_mamba,
    sizes=("mamba_n_heads", "mamba_n_groups", "mamba_d_state"),
)
FALCON_H1 = replace(
    LLAMA,
    after_blocks=("model.final_layernorm",),
    stages=(
        *(*stages_of(FALCON_MAMBA2), *LLAMA.stages[:2]),
        *(("feed_forward.gate_proj", "feed_forward.up_proj"), ("feed_forward.down_proj",)),
    ),
    mlp_producers=("feed_forward.gate_proj", "feed_forward.up_proj"),
    mlp_consumer="feed_forward.down_proj",
    mlp_parts=("pre_ff_layernorm", "feed_forward"),
    recurrent=FALCON_MAMBA2,
    whole=(("attention", "recurrent", "mlp"),),
    indivisible={"recurrent": f"{WHOLE_MIXER}, because a vector of multipliers lies over all of them"},
    recoverable=(LLAMA.recoverable[0], ("feed_forward", ("feed_forward.up_proj", "feed_forward.down_proj"))),
    by_block=(),
    logits_factor="lm_head_multiplier",
    in_transformers_4=False,
    **named("falcon_h1", "FalconH1"),
)

# Qwen3's attention, and a router that chooses some of many gated MLPs for each token.
QWEN3_MOE = replace(
    LLAMA,
    stages=LLAMA.stages[:2],
    mlp_producers=(),
    mlp_consumer="",
    mlp_width="moe_intermediate_size",
    mixture=Mixture(),
    # Routing decides which outputs are affine in the weights of an expert.
    recoverable=LLAMA.recoverable[:1],
    off=("mlp_only_layers", "output_router_logits"),
    fixed={"decoder_sparse_step": 1},
    older_names={"num_local_experts": "num_experts"},
    **named("qwen3_moe", "Qwen3Moe"),
)
# Biases on queries, keys and values, and a shared expert that every token goes through.
QWEN2_MOE_MIXTURE = Mixture(shared="mlp.shared_expert", shared_width="shared_expert_intermediate_size")
QWEN2_MOE = replace(
    QWEN3_MOE,
    mixture=QWEN2_MOE_MIXTURE,
    **named("qwen2_moe", "Qwen2Moe"),
)
# Text-only Qwen3.5 with experts, and a shared one.
QWEN3_5_MOE = replace(
    QWEN2_MOE,
    stages=(*stages_of(DELTA_NET), *LLAMA.stages[:2]),
    heads=gated_heads,
    recurrent=DELTA_NET,
    mixture=replace(QWEN2_MOE_MIXTURE, normalised=lambda config: True),
    in_transformers_4=False,
    off=("output_router_logits",),
    fixed={},
    **named("qwen3_5_moe_text", "Qwen3_5Moe", stock="qwen3_5_moe", config="TextConfig"),
)
# Blocks as those of Qwen3.5 with experts, in which one layer makes what two do there, key head by key head.
JOINED_DELTA_NET = replace(
    DELTA_NET,
    reads={
        "linear_attn.in_proj_qkvz": (lambda config: 2 * (keys_of_delta_net(config) + values_of_delta_net(config)),),
        "linear_attn.in_proj_ba": (lambda config: 2 * config.linear_num_value_heads,),
    },
)
QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    stages=(*stages_of(JOINED_DELTA_NET), *LLAMA.stages[:2]),
    recurrent=JOINED_DELTA_NET,
    mixture=QWEN2_MOE_MIXTURE,
    off=QWEN2_MOE.off,
    fixed=QWEN2_MOE.fixed,
    **named("qwen3_next", "Qwen3Next"),
)
# Mistral's attention and eight experts, under names of their own in checkpoints.
MIXTRAL = replace(
    QWEN3_MOE,
    mlp_width="intermediate_size",
    mixture=Mixture(
        width="intermediate_size",
        normalised=lambda config: True,
        stored={
            "mlp.": "block_sparse_moe.",
            **{".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."},
        },
    ),
    off=("output_router_logits",),
    fixed={},
    older_names={},
    **named("mixtral", "Mixtral"),
)
# One norm over the queries (and keys) of all heads, as in OLMo 2, and experts.
OLMOE = replace(
    QWEN3_MOE,
    mlp_width="intermediate_size",
    mixture=Mixture(width="intermediate_size"),
    indivisible=OLMO2.indivisible,
    # Generation with a static cache is an error there.
    in_transformers_4=False,
    off=("output_router_logits", "clip_qkv"),
    fixed={},
    **named("olmoe", "Olmoe"),
)
# A dense MLP in the first blocks, and experts in the others: a router by sigmoids, which first chooses groups of
# experts where there are several, and an expert that every token goes through, with a width in those of the others.
GLM4_MIXTURE = Mixture(
    count="n_routed_experts",
    shared="mlp.shared_experts",
    shared_last=True,
    shared_count="n_shared_experts",
    correction="e_score_correction_bias",
    factor="routed_scaling_factor",
    groups="n_group",
    fewest=2,
)
GLM4_MOE = replace(
    LLAMA,
    mixture=GLM4_MIXTURE,
    leading=("first_k_dense_replace",),
    float32=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    recoverable=LLAMA.recoverable[:1],
    off=("output_router_logits",),
    **named("glm4_moe", "Glm4Moe"),
)
# Latent attention, in blocks as those of GLM 4.5. Small models make the queries from the hidden states.
DEEPSEEK_V3 = replace(
    GLM4_MOE,
    stages=(
        *(("self_attn.q_a_proj",), ("self_attn.q_b_proj",)),
        *(("self_attn.kv_a_proj_with_mqa",), ("self_attn.kv_b_proj",), ("self_attn.o_proj",)),
        *LLAMA.stages[2:],
    ),
    query="self_attn.q_b_proj",
    key="self_attn.kv_b_proj",
    value="self_attn.kv_b_proj",
    joined="kv",
    heads=latent_heads,
    head_dim_is_free=False,
    latent=Latent(
        makes={
            "self_attn.q_a_proj": ("q_lora_rank",),
            "self_attn.kv_a_proj_with_mqa": ("kv_lora_rank", "qk_rope_head_dim"),
        },
        reads={"self_attn.q_b_proj": "q_lora_rank", "self_attn.kv_b_proj": "kv_lora_rank"},
    ),
    by_config=lambda config: {} if config.q_lora_rank else {"query": "self_attn.q_proj", "stages": WHOLE_QUERIES},
    recoverable=(),
    # Generation with a static cache is an error there.
    in_transformers_4=False,
    **named("deepseek_v3", "DeepseekV3"),
)
WHOLE_QUERIES = (("self_attn.q_proj",), *DEEPSEEK_V3.stages[2:])
# A router by a softmax, whose weights never add up to one.
DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    mixture=replace(GLM4_MIXTURE, correction="", fewest=1, normalised=lambda config: False),
    float32=("mlp.gate.weight",),
    **named("deepseek_v2", "DeepseekV2"),
)
# GLM 4.7 Flash: DeepSeek V3's blocks, of which a list says the kind of MLP.
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    leading=(),
    listed="mlp_layer_types",
    by_block=("layer_types", "mlp_layer_types"),
    **named("glm4_moe_lite", "Glm4MoeLite"),
)
# Biases everywhere, a sink for each query head, windows in every other block, and a softmax over the chosen experts.
GPT_OSS = replace(
    QWEN3_MOE,
    mlp_width="intermediate_size",
    per_head=("self_attn.sinks",),
    mixture=Mixture(
        router="mlp.router",
        count="num_local_experts",
        width="intermediate_size",
        normalised=lambda config: True,
        layout=ExpertTensors(transposed=True, interleaved=True, biased=True, in_files=True, width="intermediate_size"),
        gated=clamped_swiglu,
        rows=("weight", "bias"),
        quantised=("mxfp4",),
    ),
    off=("output_router_logits",),
    fixed={},
    older_names={},
    **named("gpt_oss", "GptOss"),
)
# Nemotron-H: a block is Mamba 2, or attention without positions, or a plain MLP, or a mixture of plain MLPs as its
# experts, behind one norm; checkpoints hold the model under another name.
NEMOTRON_MAMBA2 = mamba2(
    *("norm", "mixer"),
    width=lambda config: config.mamba_num_heads * config.mamba_head_dim,
    sizes=("mamba_num_heads", "n_groups", "ssm_state_size"),
    counted=("n_groups", "mamba_num_heads"),
)
NEMOTRON_H = replace(
    LLAMA,
    after_blocks=("model.norm_f",),
    stages=(
        *(*stages_of(NEMOTRON_MAMBA2), ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), ("mixer.o_proj",)),
        *(("mixer.up_proj",), ("mixer.down_proj",)),
    ),
    mlp_producers=("mixer.up_proj",),
    mlp_consumer="mixer.down_proj",
    attention="mixer",
    query="mixer.q_proj",
    key="mixer.k_proj",
    value="mixer.v_proj",
    output="mixer.o_proj",
    attention_parts=("norm", "mixer"),
    mlp_parts=("norm", "mixer"),
    recurrent=NEMOTRON_MAMBA2,
    whole=(("attention",), ("recurrent",), ("mlp",)),
    mixture=replace(
        GLM4_MIXTURE,
        module="mixer",
        experts="mixer.experts",
        router="mixer.gate",
        shared="mixer.shared_experts",
        shared_count="",
        shared_width="moe_shared_expert_intermediate_size",
        layout=ExpertTensors(layers=GATED[1:]),
        gated=lambda experts, up: experts.act_fn(up),
    ),
    float32=("mixer.gate.weight", "mixer.gate.e_score_correction_bias"),
    recoverable=(("mixer", ("mixer.v_proj", "mixer.o_proj")),),
    off=("output_router_logits", "moe_latent_size"),
    stored_root="backbone",
    in_transformers_4=False,
    **named("nemotron_h", "NemotronH", block="Block"),
)

# A plain MLP, learned positions, biases everywhere.
OPT = Architecture(
    blocks="model.decoder.layers",
    after_blocks=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    mlp_producers=("fc1",),
    mlp_consumer="fc2",
    mlp_width="ffn_dim",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    heads=equal_heads,
    head_dim_is_free=False,
    attention_parts=("self_attn_layer_norm", "self_attn"),
    mlp_parts=("final_layer_norm", "fc1", "fc2"),
    # The MLP is not affine in fc1, and restoration refits fc2.
    recoverable=(("self_attn", ("self_attn.v_proj", "self_attn.out_proj")),),
    ends_with_norm=lambda config: not config.do_layer_norm_before,
    **named("opt", "OPT"),
)
# Matrices stored transposed, one layer for queries, keys and values, learned positions, a plain MLP.
GPT2 = Architecture(
    blocks="transformer.h",
    after_blocks=("transformer.ln_f",),
    stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    mlp_producers=("mlp.c_fc",),
    mlp_consumer="mlp.c_proj",
    mlp_width="n_inner",
    attention="attn",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    joined="parts",
    output="attn.c_proj",
    heads=equal_heads,
    head_dim_is_free=False,
    attention_parts=("ln_1", "attn"),
    mlp_parts=("ln_2", "mlp"),
    recoverable=(),
    # Scores that depend on the number of the block would change when a block before it is removed.
    off=("add_cross_attention", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx"),
    **named("gpt2", "GPT2", model="LMHeadModel", block="Block"),
)
# GPT-NeoX (Pythia): a plain MLP beside the attention, and one layer for queries, keys and values, head by head.
GPT_NEOX = Architecture(
    blocks="gpt_neox.layers",
    after_blocks=("gpt_neox.final_layer_norm",),
    stages=(("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
    mlp_producers=("mlp.dense_h_to_4h",),
    mlp_consumer="mlp.dense_4h_to_h",
    mlp_width="intermediate_size",
    attention="attention",
    query="attention.query_key_value",
    key="attention.query_key_value",
    value="attention.query_key_value",
    joined="heads",
    output="attention.dense",
    heads=equal_heads,
    head_dim_is_free=False,
    attention_parts=("input_layernorm", "attention"),
    mlp_parts=("post_attention_layernorm", "mlp"),
    recoverable=(),
    stored_names={"lm_head.weight": "embed_out.weight"},
    older_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    **named("gpt_neox", "GPTNeoX", block="Layer"),
)

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        *(DEEPSEEK_V2, DEEPSEEK_V3, EXAONE4, FALCON_H1, GEMMA2, GEMMA3, GEMMA4, GLM4_MOE, GLM4_MOE_LITE, GPT2),
        *(GPT_NEOX, GPT_OSS, GRANITE, GRANITE_HYBRID, LFM2, LLAMA, MINISTRAL3, MISTRAL, MIXTRAL, NEMOTRON_H, OLMO2),
        *(OLMOE, OPT, PHI3, QWEN2, QWEN2_MOE, QWEN3),
        *(QWEN3_5, QWEN3_5_MOE, QWEN3_MOE, QWEN3_NEXT, SEED_OSS, SMOLLM3),
    )
}
"""every architecture, by the model_type of its config"""
