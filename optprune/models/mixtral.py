"""Mixtral: Mistral's attention, and a router that chooses two of eight gated MLPs for each token."""

from dataclasses import replace

from transformers.models.mixtral import modeling_mixtral as stock

from optprune.models.architecture import Classes, Mixture
from optprune.models.pruned import modeling_pruned_mixtral as pruned
from optprune.models.qwen3_moe import QWEN3_MOE

MIXTRAL = replace(
    QWEN3_MOE,
    model_type="mixtral",
    mlp_width="intermediate_size",
    mixture=Mixture(
        normalised=lambda config: True,
        stored={
            "mlp.": "block_sparse_moe.",
            **{".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."},
        },
    ),
    off=("output_router_logits",),
    fixed={},
    older_names={},
    stock=Classes.called("Mixtral", stock),
    pruned=Classes.called("PrunedMixtral", pruned),
)
