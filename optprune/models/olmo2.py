"""OLMo 2: Llama's layers, with norms behind both sub-blocks in place of before, and of all queries and keys at once."""

from dataclasses import replace

from transformers.models.olmo2 import modeling_olmo2 as stock

from optprune.models.architecture import Classes
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_olmo2 as pruned

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    attention_parts=("self_attn", "post_attention_layernorm"),
    mlp_parts=("mlp", "post_feedforward_layernorm"),
    stock=Classes.called("Olmo2", stock),
    pruned=Classes.called("PrunedOlmo2", pruned),
    indivisible={"kv_heads": "one norm goes over the queries of all heads, so that without a head the rest are others"},
)
