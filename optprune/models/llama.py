"""Llama 1 to 3.2 (and models of its class, such as SmolLM2): gated MLP, rotary embeddings, grouped-query attention."""

from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama import modeling_llama as stock

from optprune.models.architecture import Architecture, Classes, Heads
from optprune.models.pruned import modeling_pruned_llama as pruned


def heads(config: PretrainedConfig) -> Heads:
    """The head layout; head_dim may differ from hidden_size / heads (Llama 3.2 and later configs name it)."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_key_value_heads, dim)


LLAMA = Architecture(
    model_type="llama",
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
    heads=heads,
    head_dim_is_free=True,
    attention_parts=("input_layernorm", "self_attn"),
    mlp_parts=("post_attention_layernorm", "mlp"),
    recoverable=(
        ("self_attn", ("self_attn.v_proj", "self_attn.o_proj")),
        ("mlp", ("mlp.up_proj", "mlp.down_proj")),
    ),
    stock=Classes(LlamaConfig, stock.LlamaForCausalLM, stock.LlamaDecoderLayer, stock.LlamaAttention),
    pruned=Classes(
        pruned.PrunedLlamaConfig,
        pruned.PrunedLlamaForCausalLM,
        pruned.PrunedLlamaDecoderLayer,
        pruned.PrunedLlamaAttention,
    ),
)
