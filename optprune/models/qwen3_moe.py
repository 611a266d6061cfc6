"""Qwen3 with experts: Qwen3's attention, and a router that chooses some of many gated MLPs for each token."""

from dataclasses import replace

from transformers.models.qwen3_moe import modeling_qwen3_moe as stock

from optprune.models.architecture import Classes, Mixture
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_qwen3_moe as pruned

QWEN3_MOE = replace(
    LLAMA,
    model_type="qwen3_moe",
    stages=LLAMA.stages[:2],
    mlp_producers=(),
    mlp_consumer="",
    mlp_width="moe_intermediate_size",
    mixture=Mixture(),
    # What of a mixture is affine in the weights of an expert hangs on where tokens are routed.
    recoverable=LLAMA.recoverable[:1],
    off=("mlp_only_layers", "output_router_logits"),
    fixed={"decoder_sparse_step": 1},
    older_names={"num_local_experts": "num_experts"},
    stock=Classes.called("Qwen3Moe", stock),
    pruned=Classes.called("PrunedQwen3Moe", pruned),
)
