"""GPT-NeoX (Pythia): a plain MLP beside the attention, and one layer for queries, keys and values, head by head."""

from transformers import GPTNeoXConfig
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from optprune.models.architecture import Architecture, Classes
from optprune.models.opt import heads
from optprune.models.pruned import modeling_pruned_gpt_neox as pruned

GPT_NEOX = Architecture(
    model_type="gpt_neox",
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
    heads=heads,
    head_dim_is_free=False,
    attention_parts=("input_layernorm", "attention"),
    mlp_parts=("post_attention_layernorm", "mlp"),
    recoverable=(),
    stored_names={"lm_head.weight": "embed_out.weight"},
    older_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    stock=Classes(GPTNeoXConfig, stock.GPTNeoXForCausalLM, stock.GPTNeoXLayer, stock.GPTNeoXAttention),
    pruned=Classes(
        pruned.PrunedGPTNeoXConfig,
        pruned.PrunedGPTNeoXForCausalLM,
        pruned.PrunedGPTNeoXLayer,
        pruned.PrunedGPTNeoXAttention,
    ),
)
