"""Model families of llama.cpp: their names, the metadata of each, and the settings that llama.cpp does not support.

Facts about llama.cpp are from its sources (src/llama-model.cpp, conversion/), whose graphs hard-code some numbers that
a config may set; tests compare every family with transformers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, ExpertGatingFuncType, GGUFWriter, RopeScalingType

from optprune.errors import InputError
from optprune.models import BlockShape, Decoder
from optprune.models.architecture import DENSE
from optprune.models.families import DELTA_NET, value_heads_of_delta_net, values_of_delta_net
from optprune.models.recurrent import Count, Runs
from optprune.models.uneven import Uneven, uneven
from optprune.program import RUNTIMES

TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""names of GELU with the tanh approximation"""
ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
"""the config fields that name the activation of an MLP"""
SLIDING = "sliding_attention"
LARGEST = {"gemma2": 46, "gemma3": 62}
"""number of blocks of the 27B model, for which llama.cpp scales scores by hidden size over heads"""

OTHER_ORDER = "sliding windows in another order of blocks, as it is when whole blocks are removed"
CLAMPED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
"""the numbers of GPT-OSS's activation"""
YARN_BETAS = (32.0, 1.0)
"""the values that llama.cpp gives to beta_fast and beta_slow; it reads them from the files of few families"""
LATENT_EPS = 1e-6
"""the epsilon of the norms of low-rank vectors in transformers"""
KEYS_EPS = 1e-6
"""what transformers adds to the squares of the keys of a delta network; llama.cpp adds the epsilon of the norms"""
LITE_BLOCKS = (26, 27)
"""numbers of blocks by which llama.cpp knows models whose queries have no low rank"""
KANANA = (48, 128256)
"""blocks and vocabulary of another such model"""
RECURRENT = "{arch}.attention.recurrent_layers"
"""the metadata that list which blocks have a recurrent mixer"""
EXAONE4_BLOCKS = 64
"""number of blocks of the 32B model, for which alone llama.cpp has sliding windows"""


@dataclass(frozen=True)
class Family:
    """Family of models, as llama.cpp reads it."""

    known_as: MODEL_ARCH
    variant: Callable[[Sequence[BlockShape]], Mapping[str, Any]] = lambda shapes: {}
    """function that returns the fields that are others for models with such blocks"""
    spelled: Callable[[str], str] = lambda name: name
    """function that returns the name of a tensor in gguf's table of names"""
    fused: bool = False
    """whether the gate and the other factor of an expert are one layer, in that order"""
    dense: bool = False
    """whether the width of MLPs is that of those beside experts"""
    single: bool = False
    """whether a block has one sub-block"""
    lists: bool = False
    """whether the widths of MLPs are a list, and may differ"""
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """layers that are two in llama.cpp, each with half of the rows, by path; with the paths of both halves"""
    parted: Mapping[str, Mapping[str, Runs]] = field(default_factory=dict)
    """layers of a recurrent mixer, head by head, that are several in llama.cpp, by path; with the paths of these and
    their runs of rows, in the order in which those of a head lie"""
    tiled: Mapping[Count, Count] = field(default_factory=dict)
    """runs of rows of a recurrent mixer in which, there, the first value head of each key head comes before the second
    ones; with the rows of a value head"""
    zeros: bool = True
    """whether a block without attention is one with zero KV heads; the number is one for all blocks otherwise"""
    neighbours: bool = False
    """whether rotary embeddings rotate neighbouring dimensions of a head; transformers rotates halves"""
    activation: tuple[str, ...] = ("silu",)
    """supported activations of the MLP, by their names in configs"""
    biases: bool = False
    """whether linear layers may have biases"""
    tied: bool = True
    """whether the embeddings serve as the head where the file has none"""
    shift: float = 0.0
    """constant that is added to the weights of norms, but for that of a recurrent mixer"""
    factors: Callable[[Any], Mapping[str, Sequence[float]]] = lambda config: {}
    """function that returns numbers by which weights are multiplied in the file, by the path of a layer in a block or
    the name of a tensor outside: one for all rows, or one for each run of rows of a recurrent mixer"""
    describe: Callable[[Any, GGUFWriter], None] = lambda config, writer: None
    """function that writes further metadata from a config"""
    unsupported: Callable[[Any], Iterator[str]] = lambda config: iter(())
    """function that yields the settings of a config that are not supported"""
    windows: bool = False
    """whether sliding windows are supported"""
    scaled: bool | None = None
    """whether a mixture scales the weights of the chosen experts to sum to one; None where the metadata say it"""
    rounded: Callable[[Any], Iterator[str]] = lambda config: iter(())
    """function that yields notes on the settings of a config that llama.cpp follows roughly only, or since late"""

    @property
    def name(self) -> str:
        """Its general.architecture."""
        return MODEL_ARCH_NAMES[self.known_as]

    @property
    def named_as(self) -> MODEL_ARCH:
        """The family that has the same names of tensors."""
        return MODEL_ARCH.LLAMA if self.known_as == MODEL_ARCH.DECI else self.known_as

    def refusal(self, decoder: Decoder) -> str | None:
        """Return the first property of a model that is not supported, or None."""
        config = decoder.model.config
        # A config without such a field is of a class that computes silu alone.
        activation = next((getattr(config, name) for name in ACTIVATION if hasattr(config, name)), "silu")
        if activation not in self.activation:
            return f"an MLP with the activation {activation}"
        mixture = decoder.architecture.mixture
        experts = _experts_in(decoder.shapes())
        if mixture is not None and experts and self.scaled not in (None, mixture.normalised(config)):
            return f"routers with norm_topk_prob {not self.scaled}"
        biased = [name for name, _ in decoder.model.named_parameters() if name.endswith("proj.bias")]
        if biased and not self.biases:
            return f"biases of linear layers, as {biased[0]}"
        return next(self.unsupported(config), None)


def _experts_in(shapes: Sequence[BlockShape]) -> bool:
    """Return whether some block has experts."""
    return any(shape.experts for shape in shapes)


def _layer_norms(config: Any, writer: GGUFWriter) -> None:
    eps = getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon
    writer.add_layer_norm_eps(float(eps))


def _parallel(config: Any, writer: GGUFWriter) -> None:
    _layer_norms(config, writer)
    writer.add_parallel_residual(bool(config.use_parallel_residual))


def _multipliers(config: Any, writer: GGUFWriter) -> None:
    writer.add_attention_scale(float(config.attention_multiplier))
    writer.add_embedding_scale(float(config.embedding_multiplier))
    writer.add_residual_scale(float(config.residual_multiplier))
    writer.add_logit_scale(float(config.logits_scaling))


def _caps(config: Any, writer: GGUFWriter) -> None:
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(float(config.attn_logit_softcapping))
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(float(config.final_logit_softcapping))


def _gemma2(config: Any, writer: GGUFWriter) -> None:
    _caps(config, writer)
    writer.add_sliding_window(int(config.sliding_window))


def _gemma3(config: Any, writer: GGUFWriter) -> None:
    _caps(config, writer)
    period = _period(config)
    if period > 1:
        writer.add_sliding_window(int(config.sliding_window))
        writer.add_sliding_window_pattern(period)
    writer.add_rope_freq_base_swa(float(config.rope_parameters[SLIDING]["rope_theta"]))


def _period(config: Any) -> int:
    """Return n where every n-th block sees all tokens and the others a window; 0 where the order is another."""
    return _every([kind == SLIDING for kind in config.layer_types])


def _every(others: Sequence[bool]) -> int:
    """Return n where every n-th block is not one of the others; 0 where the order is another."""
    every = range(1, len(others) + 2)
    return next((n for n in every if list(others) == [(index + 1) % n > 0 for index in range(len(others))]), 0)


def _gemma_unsupported(name: str) -> Callable[[Any], Iterator[str]]:
    def unsupported(config: Any) -> Iterator[str]:
        largest = config.num_hidden_layers == LARGEST[name]
        size = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        if config.query_pre_attn_scalar != size:
            yield f"scores scaled by a query_pre_attn_scalar of {config.query_pre_attn_scalar:g} in place of {size}"
        caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
        if name == "gemma3" and any(caps):
            yield "soft caps"
        if name == "gemma2" and not all(caps):
            yield "a Gemma 2 without soft caps of the scores and of the logits"
        if _period(config) == 0 or (name == "gemma2" and _period(config) != 2):
            yield OTHER_ORDER

    return unsupported


def _gemma4(config: Any, writer: GGUFWriter) -> None:
    windows = [kind == SLIDING for kind in config.layer_types]
    dims = {window: config.per_layer_config[index].head_dim for index, window in enumerate(windows)}
    whole, near = dims[False], dims[True]
    writer.add_key_length(whole)
    writer.add_value_length(whole)
    writer.add_key_length_swa(near)
    writer.add_value_length_swa(near)
    # Divisors of the frequencies say which dimensions are not rotated.
    writer.add_rope_dimension_count(whole)
    writer.add_rope_dimension_count_swa(near)
    writer.add_rope_freq_base_swa(float(config.rope_parameters[SLIDING]["rope_theta"]))
    writer.add_sliding_window(int(config.sliding_window))
    writer.add_sliding_window_pattern(windows)
    writer.add_shared_kv_layers(int(config.num_kv_shared_layers))
    writer.add_embedding_length_per_layer_input(int(config.hidden_size_per_layer_input or 0))
    # It caps at 30 where the file says nothing, and at none where that is zero.
    writer.add_final_logit_softcapping(float(config.final_logit_softcapping or 0))


def _gemma4_names(name: str) -> str:
    """Return the tensor's name in gguf's table, where factors are those of a layer."""
    name = name.replace(".router.per_expert_scale", ".experts.down_proj.scale")
    return name.replace(".router.scale", ".router.proj.scale")


def _gemma4_unsupported(config: Any) -> Iterator[str]:
    kinds, own = config.layer_types, config.num_hidden_layers - config.num_kv_shared_layers
    for kind in dict.fromkeys(kinds[own:]):
        last = max(index for index in range(own) if kinds[index] == kind)
        if last != own - (2 if kind == SLIDING else 1):
            yield (
                "a Gemma 4 in which the two blocks before those that read keys and values of others are not one with a "
                "window and one without"
            )
    if SLIDING not in kinds:
        yield "a Gemma 4 without blocks with a window"
    elif config.rope_parameters[SLIDING]["rope_type"] != "default":
        yield "scaled rotary embeddings in blocks of a Gemma 4 with a window"
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size:
        yield f"a vocab_size_per_layer_input of {config.vocab_size_per_layer_input} in place of {config.vocab_size}"


def _lfm2(config: Any, writer: GGUFWriter) -> None:
    writer.add_layer_norm_rms_eps(float(config.norm_eps))
    writer.add_shortconv_l_cache(int(config.conv_L_cache))


def _lfm2_unsupported(config: Any) -> Iterator[str]:
    if "conv" not in config.layer_types:
        yield "an LFM2 without short convolutions"


def _granite_hybrid(config: Any, writer: GGUFWriter) -> None:
    _multipliers(config, writer)
    # By this llama.cpp knows whether there are any rotary embeddings.
    writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")
    if "linear_attention" in config.layer_types:
        _mamba2(config, writer, int(config.mamba_expand * config.hidden_size))


def _granite_hybrid_names(name: str) -> str:
    """Return the name that gguf's table has: the MLP is that of a Granite, in place of an expert for every token."""
    return _granite_expert_names(name.replace(".shared_mlp.output_linear.", ".mlp.down_proj."))


def _granite_expert_names(name: str) -> str:
    """Return the tensor's name in gguf's table, which lists the experts under the names of another class."""
    name = name.replace(".block_sparse_moe.router.", ".mlp.gate.").replace(".block_sparse_moe.", ".mlp.")
    return name.replace(".dt_bias", ".dt_proj.bias")


def _granite_hybrid_variant(shapes: Sequence[BlockShape]) -> dict[str, Any]:
    if not _experts_in(shapes):
        return {} if any(shape.recurrent for shape in shapes) else {"known_as": MODEL_ARCH.GRANITE}
    shared = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    return {
        "spelled": _granite_expert_names,
        "halves": {"shared_mlp.input_linear": shared},
        "scaled": True,
    }


def _granite_hybrid_unsupported(config: Any) -> Iterator[str]:
    if "linear_attention" not in config.layer_types:
        if config.num_local_experts:
            yield "a Granite 4 with experts and without Mamba 2"
        return
    if config.mamba_expand != 2:
        yield f"a mamba_expand of {config.mamba_expand} in a Granite 4"
    yield from _mamba2_unsupported(config)


def _mamba2_unsupported(config: Any) -> Iterator[str]:
    if not config.mamba_conv_bias:
        yield "a Mamba 2 whose convolution has no bias"
    yield from _limits_unsupported(config)


def _limits_unsupported(config: Any) -> Iterator[str]:
    low, high = config.time_step_limit or (0.0, math.inf)
    if low > 0 or high < math.inf:
        yield f"a Mamba 2 whose steps are limited to {low:g} to {high:g}"


def _mamba2(config: Any, writer: GGUFWriter, width: int) -> None:
    states = {"state": config.mamba_d_state, "heads": config.mamba_n_heads, "groups": config.mamba_n_groups}
    _recurrent(writer, kernel=config.mamba_d_conv, width=width, **states)


def _recurrent(writer: GGUFWriter, *, kernel: int, width: int, state: int, heads: int, groups: int) -> None:
    """Write the sizes of a recurrent mixer: of its convolution, its channels, the state of each, heads and groups."""
    writer.add_ssm_conv_kernel(int(kernel))
    writer.add_ssm_inner_size(int(width))
    writer.add_ssm_state_size(int(state))
    writer.add_ssm_time_step_rank(int(heads))
    writer.add_ssm_group_count(int(groups))


def _falcon_h1(config: Any, writer: GGUFWriter) -> None:
    _mamba2(config, writer, int(config.mamba_n_heads * config.mamba_d_head))


def _falcon_h1_unsupported(config: Any) -> Iterator[str]:
    yield from _mamba2_unsupported(config)
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        yield "a Mamba 2 with a norm before the gate (mamba_norm_before_gate)"


def _falcon_h1_factors(config: Any) -> dict[str, Sequence[float]]:
    attention, (gate, down) = config.attention_in_multiplier, config.mlp_multipliers
    return {
        "model.embed_tokens.weight": (config.embedding_multiplier,),
        "self_attn.q_proj": (attention,),
        "self_attn.k_proj": (attention * config.key_multiplier,),
        "self_attn.v_proj": (attention,),
        "self_attn.o_proj": (config.attention_out_multiplier,),
        "mamba.in_proj": tuple(config.ssm_in_multiplier * each for each in config.ssm_multipliers),
        "mamba.out_proj": (config.ssm_out_multiplier,),
        "feed_forward.gate_proj": (gate,),
        "feed_forward.down_proj": (down,),
        "lm_head.weight": (config.lm_head_multiplier,),
    }


def _nemotron_h(config: Any, writer: GGUFWriter) -> None:
    _layer_norms(config, writer)  # which it asks for
    writer.add_layer_norm_rms_eps(float(config.layer_norm_epsilon))
    heads = config.mamba_num_heads
    sizes = {"width": heads * config.mamba_head_dim, "state": config.ssm_state_size, "groups": config.n_groups}
    _recurrent(writer, kernel=config.conv_kernel, heads=heads, **sizes)
    if "moe" in config.layer_types:
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_norm(bool(config.norm_topk_prob))
        writer.add_expert_weights_scale(float(config.routed_scaling_factor))


def _nemotron_h_names(name: str) -> str:
    """Return the tensor's name in gguf's table, which lists the experts under the names of another class."""
    if ".experts." in name:
        return name.replace(".mixer.", ".mlp.")
    return name.replace("model.", "backbone.", 1).replace(".dt_bias", ".dt.bias")


def _nemotron_h_unsupported(config: Any) -> Iterator[str]:
    kinds = set(config.layer_types)
    if "linear_attention" not in kinds:
        yield "a Nemotron-H without Mamba 2"
    if {"moe", "mlp"} <= kinds:
        yield "a Nemotron-H with experts in some blocks and an MLP in others"
    if not config.use_conv_bias:
        yield "a Mamba 2 whose convolution has no bias"
    yield from _limits_unsupported(config)
    if config.mamba_hidden_act != "silu":
        yield f"a Mamba 2 with the activation {config.mamba_hidden_act}"
    if config.n_group > 1 and "moe" in kinds:
        yield f"{config.n_group} groups of experts in a Nemotron-H"


def _delta_net(config: Any, writer: GGUFWriter) -> None:
    recurrent = [kind == "linear_attention" for kind in config.layer_types]
    writer.add_array(RECURRENT.format(arch=writer.arch), recurrent)
    interval = _every(recurrent)
    if interval:  # which is all that older builds read
        writer.add_full_attention_interval(interval)
    heads = config.linear_num_value_heads
    sizes = {"width": heads * config.linear_value_head_dim, "state": config.linear_key_head_dim}
    _recurrent(writer, kernel=config.linear_conv_kernel_dim, heads=heads, groups=config.linear_num_key_heads, **sizes)
    _yarn_with_length(config.rope_parameters, writer)


def _delta_net_turned(config: Any, writer: GGUFWriter) -> None:
    _delta_net(config, writer)
    # Thirds of the rotated pairs go by three positions, which are the same for text.
    pairs = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    writer.add_rope_dimension_sections([*((pairs + missing) // 3 for missing in (2, 1, 0)), 0])


def _names_of_steps(name: str) -> str:
    """Return the tensor's name in gguf's table, in which a layer makes the steps."""
    return name.replace(".dt_bias", ".dt_proj.bias")


def _delta_net_unsupported(config: Any) -> Iterator[str]:
    keys, values, rotary = config.linear_key_head_dim, config.linear_value_head_dim, config.rope_parameters
    if "linear_attention" not in config.layer_types:
        yield f"a {config.model_type} model without delta networks"
    if config.rms_norm_eps != KEYS_EPS:
        yield f"a delta network with an rms_norm_eps of {config.rms_norm_eps:g} in place of {KEYS_EPS:g}"
    if keys != values:
        yield f"a delta network whose heads have {keys} key dimensions and {values} value dimensions"
    if rotary["rope_type"] == "yarn":
        other = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rotary.get(name)]
        if other or not rotary.get("truncate", True):
            yield f"a yarn scaling beside delta networks with {other[0] if other else 'truncate false'}"
    yield from _other_betas(rotary, "beside delta networks")


def _delta_net_rounded(config: Any) -> Iterator[str]:
    if not _every([kind == "linear_attention" for kind in config.layer_types]):
        yield (
            "the blocks with attention are not every n-th: a llama.cpp that does not read attention.recurrent_layers "
            "does not load the file"
        )


def _smollm3_unsupported(config: Any) -> Iterator[str]:
    rotated = [bool(flag) for flag in config.no_rope_layers]
    if rotated != [(index + 1) % 4 > 0 for index in range(len(rotated))]:
        yield "blocks without rotary embeddings that are not every fourth, as it is when whole blocks are removed"


def _olmoe_unsupported(config: Any) -> Iterator[str]:
    if config.num_key_value_heads != config.num_attention_heads:
        yield "grouped-query attention in an OLMoE"


def _exaone4(config: Any, writer: GGUFWriter) -> None:
    if config.sliding_window is not None:
        writer.add_sliding_window(int(config.sliding_window))


def _exaone4_unsupported(config: Any) -> Iterator[str]:
    """Yield blocks in another order than that of the 32B model, which llama.cpp knows by its number of blocks."""
    windows, known = config.sliding_window is not None, config.num_hidden_layers == EXAONE4_BLOCKS
    if known and not (windows and _period(config) == 4):
        yield f"an EXAONE 4 of {EXAONE4_BLOCKS} blocks of which not every fourth sees all tokens"
    if windows and not known:
        yield f"sliding windows in an EXAONE 4 of another number of blocks than {EXAONE4_BLOCKS}"


def _glm4_moe(config: Any, writer: GGUFWriter) -> None:
    writer.add_leading_dense_block_count(min(int(config.first_k_dense_replace), int(config.num_hidden_layers)))
    writer.add_expert_shared_count(int(config.n_shared_experts))
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(bool(config.norm_topk_prob))
    writer.add_expert_weights_scale(float(config.routed_scaling_factor))


def _glm4_moe_unsupported(config: Any) -> Iterator[str]:
    if config.n_group > 1:
        yield f"{config.n_group} groups of experts in a GLM 4.5"
    if config.n_shared_experts != 1:
        yield f"n_shared_experts {config.n_shared_experts} in a GLM 4.5"
    if config.first_k_dense_replace >= config.num_hidden_layers:
        yield "a GLM 4.5 without experts"


def _yarn(rotary: dict[str, Any], writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rotary["factor"]))
    fast, slow = _betas(rotary)
    writer.add_rope_scaling_yarn_beta_fast(fast)
    writer.add_rope_scaling_yarn_beta_slow(slow)


def _betas(rotary: dict[str, Any]) -> tuple[float, float]:
    """Return beta_fast and beta_slow of a yarn scaling, as transformers reads them."""
    return float(rotary.get("beta_fast") or YARN_BETAS[0]), float(rotary.get("beta_slow") or YARN_BETAS[1])


def _yarn_with_length(rotary: dict[str, Any], writer: GGUFWriter) -> None:
    """Write the yarn scaling of rotary embeddings, if they have one, with the original context length."""
    if rotary["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rotary["original_max_position_embeddings"]))
        _yarn(rotary, writer)


def _other_betas(rotary: dict[str, Any], where: str) -> Iterator[str]:
    """Yield what llama.cpp does not read of a yarn scaling."""
    if rotary["rope_type"] == "yarn" and _betas(rotary) != YARN_BETAS:
        yield f"a yarn scaling {where} with another beta_fast than 32, or another beta_slow than 1"


def _gpt_oss(config: Any, writer: GGUFWriter) -> None:
    writer.add_sliding_window(int(config.sliding_window))
    writer.add_sliding_window_pattern(_period(config))
    _yarn_with_length(config.rope_parameters, writer)


def _gpt_oss_unsupported(config: Any) -> Iterator[str]:
    for name, known in CLAMPED.items():
        if getattr(config, name) != known:
            yield f"{name} {getattr(config, name):g} in place of {known:g}"
    if not config.attention_bias:
        yield "a GPT-OSS without biases in its attention"
    if not has_windows(config):
        yield "a GPT-OSS of which no block has a sliding window"
    if _period(config) == 0:
        yield OTHER_ORDER
    rotary = config.rope_parameters
    if rotary["rope_type"] == "yarn" and (rotary.get("mscale") or rotary.get("attention_factor")):
        yield "a yarn scaling of a GPT-OSS with mscale or an attention_factor"
    yield from _other_betas(rotary, "of a GPT-OSS")


def _gpt_oss_rounded(config: Any) -> Iterator[str]:
    rotary = config.rope_parameters
    if rotary["rope_type"] == "yarn" and not rotary.get("truncate", True):
        yield (
            "llama.cpp rounds the bounds of the yarn scaling to whole dimensions, as truncate does in transformers: "
            "its answers differ a little"
        )


def _ministral3(config: Any, writer: GGUFWriter) -> None:
    rotary = config.rope_parameters
    writer.add_attn_temperature_scale(float(rotary["llama_4_scaling_beta"]))
    writer.add_rope_scaling_orig_ctx_len(int(rotary["original_max_position_embeddings"]))
    if rotary["rope_type"] == "yarn":
        _yarn(rotary, writer)
        writer.add_rope_scaling_yarn_log_mul(float(rotary["mscale_all_dim"]))


def _ministral3_unsupported(config: Any) -> Iterator[str]:
    rotary = config.rope_parameters
    if rotary["rope_type"] not in ("default", "yarn"):
        yield f"rotary embeddings of a Ministral 3 scaled by {rotary['rope_type']}"
    plain = rotary.get("mscale") == rotary.get("mscale_all_dim") == 1 and not rotary.get("attention_factor")
    if rotary["rope_type"] == "yarn" and not (plain and rotary.get("truncate", True)):
        yield "a yarn scaling without mscale 1 and mscale_all_dim 1, or with an attention_factor, or not truncated"


def _deepseek2(gating: ExpertGatingFuncType) -> Callable[[Any, GGUFWriter], None]:
    """Return the function that describes a model with latent attention, by how its router makes weights of scores."""

    def describe(config: Any, writer: GGUFWriter) -> None:
        dense = _without_experts(config)
        writer.add_leading_dense_block_count(sum(dense))
        if all(dense):  # it asks for it still
            writer.add_expert_feed_forward_length(int(config.moe_intermediate_size))
        writer.add_q_lora_rank(int(config.q_lora_rank or 0))
        writer.add_kv_lora_rank(int(config.kv_lora_rank))
        writer.add_expert_shared_count(int(config.n_shared_experts))
        writer.add_expert_gating_func(gating)
        writer.add_expert_weights_scale(float(config.routed_scaling_factor))
        if gating == ExpertGatingFuncType.SIGMOID:
            writer.add_expert_weights_norm(bool(config.norm_topk_prob))
            if _in_groups(config):
                writer.add_expert_group_count(int(config.n_group))
                writer.add_expert_group_used_count(int(config.topk_group))
        rotary = config.rope_parameters
        if rotary["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(rotary["original_max_position_embeddings"]))
            _yarn(rotary, writer)
            # A tenth of it is what llama.cpp reads of this family.
            writer.add_rope_scaling_yarn_log_mul(0.1 * float(rotary["mscale_all_dim"]))

    return describe


def _without_experts(config: Any) -> list[bool]:
    """Return for each block of a model with latent attention whether its MLP is dense."""
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None:
        return [kind == DENSE for kind in kinds]
    return [index < config.first_k_dense_replace for index in range(config.num_hidden_layers)]


def _in_groups(config: Any) -> bool:
    """Return whether the router first chooses some groups of experts."""
    return bool(config.n_group) and config.n_group > config.topk_group


def _deepseek2_unsupported(config: Any) -> Iterator[str]:
    dense, rotary = _without_experts(config), config.rope_parameters
    if sorted(dense, reverse=True) != dense:
        yield "a dense MLP behind a block with experts"
    if getattr(config, "topk_method", "greedy") != "greedy" and _in_groups(config):
        yield "groups of experts that are chosen by the largest score in each"
    if not getattr(config, "rope_interleave", True):
        yield "latent attention whose rotary embeddings rotate the halves of a head"
    blocks, vocabulary = len(dense), config.vocab_size
    if config.q_lora_rank and (blocks in LITE_BLOCKS or (blocks, vocabulary) == KANANA):
        yield f"queries of low rank in a model with latent attention of {blocks} blocks, which it takes for a small one"
    if rotary["rope_type"] not in ("default", "yarn"):
        yield f"rotary embeddings of latent attention scaled by {rotary['rope_type']}"
    if rotary["rope_type"] == "yarn":
        same = rotary.get("mscale") and rotary["mscale"] == rotary.get("mscale_all_dim")
        if not same or rotary.get("attention_factor") or not rotary.get("truncate", True):
            yield "a yarn scaling without mscale equal to mscale_all_dim, or with an attention_factor, or not truncated"
    yield from _other_betas(rotary, "of latent attention")


def _deepseek2_rounded(config: Any) -> Iterator[str]:
    if config.rms_norm_eps != LATENT_EPS:
        yield (
            f"llama.cpp adds the rms_norm_eps of {config.rms_norm_eps:g} in the norms of low-rank vectors too, where "
            f"transformers adds {LATENT_EPS:g}: its answers differ a little"
        )


def _seed_oss_unsupported(config: Any) -> Iterator[str]:
    for name in ("attention_out_bias", "mlp_bias"):
        if getattr(config, name):
            yield f"{name} in a Seed-OSS"


def has_windows(config: Any) -> bool:
    """Return whether some block has a sliding window."""
    if getattr(config, "sliding_window", None) is None:
        return False
    kinds = getattr(config, "layer_types", None)
    return kinds is None or SLIDING in kinds


GEMMA: dict[str, Any] = {"activation": TANH, "shift": 1.0, "windows": True}
LATENT: dict[str, Any] = {"unsupported": _deepseek2_unsupported, "rounded": _deepseek2_rounded}
PARTS_OF_DELTA_NET = {path: runs for path, runs in DELTA_NET.reads.items() if path.endswith(("_qkv", "_z"))}
DELTA: dict[str, Any] = {
    "spelled": _names_of_steps,
    "zeros": False,
    "shift": 1.0,
    "describe": _delta_net,
    "unsupported": _delta_net_unsupported,
    "rounded": _delta_net_rounded,
}
TILED: dict[str, Any] = {
    **DELTA,
    "describe": _delta_net_turned,
    "tiled": {
        values_of_delta_net: lambda config: int(config.linear_value_head_dim),
        value_heads_of_delta_net: lambda config: 1,
    },
}
BY_SIGMOIDS: dict[str, Any] = {**LATENT, "describe": _deepseek2(ExpertGatingFuncType.SIGMOID)}
FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(MODEL_ARCH.DEEPSEEK2, **LATENT, describe=_deepseek2(ExpertGatingFuncType.SOFTMAX)),
    "deepseek_v3": Family(MODEL_ARCH.DEEPSEEK2, **BY_SIGMOIDS),
    "exaone4": Family(MODEL_ARCH.EXAONE4, windows=True, describe=_exaone4, unsupported=_exaone4_unsupported),
    "falcon_h1": Family(
        MODEL_ARCH.FALCON_H1,
        spelled=_names_of_steps,
        tied=False,
        factors=_falcon_h1_factors,
        describe=_falcon_h1,
        unsupported=_falcon_h1_unsupported,
    ),
    "gemma2": Family(MODEL_ARCH.GEMMA2, **GEMMA, describe=_gemma2, unsupported=_gemma_unsupported("gemma2")),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, **GEMMA, describe=_gemma3, unsupported=_gemma_unsupported("gemma3")),
    "gemma4_text": Family(
        MODEL_ARCH.GEMMA4,
        spelled=_gemma4_names,
        fused=True,
        dense=True,
        lists=True,
        activation=TANH,
        windows=True,
        describe=_gemma4,
        unsupported=_gemma4_unsupported,
        scaled=True,
    ),
    "glm4_moe": Family(
        MODEL_ARCH.GLM4_MOE, biases=True, describe=_glm4_moe, unsupported=_glm4_moe_unsupported, scaled=True
    ),
    "glm4_moe_lite": Family(MODEL_ARCH.DEEPSEEK2, **BY_SIGMOIDS),
    "gpt2": Family(MODEL_ARCH.GPT2, activation=TANH, biases=True, describe=_layer_norms),
    "gpt_neox": Family(MODEL_ARCH.GPTNEOX, activation=("gelu",), biases=True, describe=_parallel, tied=False),
    "gpt_oss": Family(
        MODEL_ARCH.GPT_OSS,
        biases=True,
        tied=False,
        windows=True,
        scaled=True,
        describe=_gpt_oss,
        unsupported=_gpt_oss_unsupported,
        rounded=_gpt_oss_rounded,
    ),
    "granite": Family(MODEL_ARCH.GRANITE, neighbours=True, describe=_multipliers),
    "granitemoehybrid": Family(
        MODEL_ARCH.GRANITE_HYBRID,
        variant=_granite_hybrid_variant,
        spelled=_granite_hybrid_names,
        halves={"shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj")},
        neighbours=True,
        describe=_granite_hybrid,
        unsupported=_granite_hybrid_unsupported,
    ),
    "lfm2": Family(MODEL_ARCH.LFM2, describe=_lfm2, unsupported=_lfm2_unsupported),
    "llama": Family(MODEL_ARCH.LLAMA, neighbours=True, biases=True),
    "ministral3": Family(
        MODEL_ARCH.MISTRAL3, neighbours=True, describe=_ministral3, unsupported=_ministral3_unsupported
    ),
    "mistral": Family(MODEL_ARCH.LLAMA, neighbours=True),
    "mixtral": Family(MODEL_ARCH.LLAMA, neighbours=True, scaled=True),
    "nemotron_h": Family(
        MODEL_ARCH.NEMOTRON_H,
        variant=lambda shapes: {"known_as": MODEL_ARCH.NEMOTRON_H_MOE} if _experts_in(shapes) else {},
        spelled=_nemotron_h_names,
        single=True,
        lists=True,
        activation=("relu2",),
        describe=_nemotron_h,
        unsupported=_nemotron_h_unsupported,
        scaled=True,
    ),
    "olmo2": Family(MODEL_ARCH.OLMO2, tied=False),
    "olmoe": Family(MODEL_ARCH.OLMOE, tied=False, unsupported=_olmoe_unsupported, scaled=False),
    "phi3": Family(MODEL_ARCH.PHI3),
    "qwen2": Family(MODEL_ARCH.QWEN2, biases=True),
    "qwen2_moe": Family(MODEL_ARCH.QWEN2MOE, tied=False, biases=True, scaled=False),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "qwen3_5_moe_text": Family(MODEL_ARCH.QWEN35MOE, **TILED),
    "qwen3_5_text": Family(MODEL_ARCH.QWEN35, **TILED),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE, scaled=True),
    "qwen3_next": Family(
        MODEL_ARCH.QWEN3NEXT, **DELTA, parted={"linear_attn.in_proj_qkvz": PARTS_OF_DELTA_NET}, scaled=True
    ),
    "seed_oss": Family(MODEL_ARCH.SEED_OSS, biases=True, unsupported=_seed_oss_unsupported),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, neighbours=True, unsupported=_smollm3_unsupported),
}
UNEVEN = Family(MODEL_ARCH.DECI, lists=True, neighbours=True, biases=True)
"""Llama's blocks with arrays of head counts and MLP widths, so that they may differ"""
LLAMA_CPP = RUNTIMES["gguf"]


def family_of(decoder: Decoder) -> Family:
    """Return the family of a model. Raises InputError where llama.cpp does not support the model."""
    model_type = decoder.architecture.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise InputError(f"{model_type} models cannot be exported to GGUF: export one of {', '.join(FAMILIES)}")
    family = replace(family, **family.variant(decoder.shapes()))
    wrong = _refused_shapes(decoder, family) or family.refusal(decoder)
    if wrong is not None and model_type in LLAMA_CPP.uneven and not family.lists:
        family, wrong = UNEVEN, UNEVEN.refusal(decoder)
    if wrong is not None:
        raise InputError(f"llama.cpp does not support {wrong}: the model cannot be exported to GGUF")
    return family


def _refused_shapes(decoder: Decoder, family: Family) -> str | None:
    """Return the first property of a model's shapes that a family with equal blocks does not support, or None."""
    shapes, heads, hidden = decoder.shapes(), decoder.heads, decoder.model.config.hidden_size
    if heads.by_block:
        if any(not shape.kv_heads for shape in shapes):
            return f"blocks of a {family.name} model without attention"
        differ = len({(shape.mlp_width, shape.experts) for shape in shapes if shape.experts}) > 1
        return f"blocks of a {family.name} model whose experts differ" if differ else None
    kinds = {(shape.mlp_width, shape.experts) for shape in shapes if shape.mlp_width or not family.single}
    # Blocks of several kinds are alike where those of each kind are.
    heads_left = {shape.kv_heads for shape in shapes if shape.kv_heads}
    alike = len(heads_left) == 1 and len({experts > 0 for _, experts in kinds}) == len(kinds)
    if family.single:  # which has no lists of numbers and widths of experts
        alike = len(heads_left) == 1 and len({each for each in kinds if each[1]}) < 2
    alike = alike and len({shape.recurrent for shape in shapes if shape.recurrent}) < 2
    reasons = uneven(decoder.architecture, decoder.model.config, shapes)
    if not alike or (not family.single and Uneven.PARTS in reasons):
        return f"blocks of a {family.name} model that differ in shape"
    if Uneven.EXPERTS in reasons:
        return f"{Uneven.EXPERTS.value} in a {family.name} model"
    if max(heads_left) * heads.group * heads.dim == hidden:
        return None
    free = decoder.architecture.model_type in LLAMA_CPP.fewer_heads
    return None if free else f"heads of a {family.name} model that do not make up its hidden size of {hidden}"
