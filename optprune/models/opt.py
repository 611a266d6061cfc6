"""OPT: plain MLP (fc1, fc2), learned positions, biases everywhere, as many KV heads as query heads."""

from functools import partial

from transformers import PretrainedConfig

from optprune.models.architecture import Architecture, Heads
from optprune.models.narrow_attention import NarrowOPTAttention, narrow_to


def heads(config: PretrainedConfig) -> Heads:
    """The head layout."""
    return Heads(
        config.num_attention_heads, config.num_attention_heads, config.hidden_size // config.num_attention_heads
    )


OPT = Architecture(
    model_type="opt",
    blocks="model.decoder.layers",
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
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    heads=heads,
    narrow_values=partial(narrow_to, NarrowOPTAttention),
)
