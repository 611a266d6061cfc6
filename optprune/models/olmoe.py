"""OLMoE: Llama's layers with norms of all queries and of all keys at once, and experts."""

from dataclasses import replace

from transformers.models.olmoe import modeling_olmoe as stock

from optprune.models.architecture import Classes
from optprune.models.olmo2 import OLMO2
from optprune.models.pruned import modeling_pruned_olmoe as pruned
from optprune.models.qwen3_moe import QWEN3_MOE

OLMOE = replace(
    QWEN3_MOE,
    model_type="olmoe",
    mlp_width="intermediate_size",
    indivisible=OLMO2.indivisible,
    off=("output_router_logits", "clip_qkv"),
    fixed={},
    stock=Classes.called("Olmoe", stock),
    pruned=Classes.called("PrunedOlmoe", pruned),
)
