"""OPT: plain MLP (fc1, fc2), learned positions, biases everywhere, as many KV heads as query heads."""

from transformers import OPTConfig, PretrainedConfig
from transformers.models.opt import modeling_opt as stock

from optprune.models.architecture import Architecture, Classes, Heads
from optprune.models.pruned import modeling_pruned_opt as pruned


def heads(config: PretrainedConfig) -> Heads:
    """The head layout."""
    return Heads(
        config.num_attention_heads, config.num_attention_heads, config.hidden_size // config.num_attention_heads
    )


OPT = Architecture(
    model_type="opt",
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
    heads=heads,
    head_dim_is_free=False,
    attention_parts=("self_attn_layer_norm", "self_attn"),
    mlp_parts=("final_layer_norm", "fc1", "fc2"),
    # In fc1 the MLP is not affine, and fc2 is what restoration refits.
    recoverable=(("self_attn", ("self_attn.v_proj", "self_attn.out_proj")),),
    stock=Classes(OPTConfig, stock.OPTForCausalLM, stock.OPTDecoderLayer, stock.OPTAttention),
    ends_with_norm=lambda config: not config.do_layer_norm_before,
    pruned=Classes(
        pruned.PrunedOPTConfig, pruned.PrunedOPTForCausalLM, pruned.PrunedOPTDecoderLayer, pruned.PrunedOPTAttention
    ),
)
