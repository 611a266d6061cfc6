"""Qwen2 with experts: biases on Q, K and V, and one more expert that every token goes through."""

from dataclasses import replace

from transformers.models.qwen2_moe import modeling_qwen2_moe as stock

from optprune.models.architecture import Classes, Mixture
from optprune.models.pruned import modeling_pruned_qwen2_moe as pruned
from optprune.models.qwen3_moe import QWEN3_MOE

QWEN2_MOE = replace(
    QWEN3_MOE,
    model_type="qwen2_moe",
    mixture=Mixture(shared="mlp.shared_expert", shared_width="shared_expert_intermediate_size"),
    stock=Classes.called("Qwen2Moe", stock),
    pruned=Classes.called("PrunedQwen2Moe", pruned),
)
