"""Phi-3 and 4: Llama's layout, with one layer for queries, keys and values and one for both halves of the MLP."""

from dataclasses import replace

from transformers.models.phi3 import modeling_phi3 as stock

from optprune.models.architecture import Classes
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_phi3 as pruned

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    stages=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    mlp_producers=("mlp.gate_up_proj",),
    rows_of_unit=2,
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    joined="parts",
    # With the long rotary scaling the config insists on heads that make up the hidden size.
    head_dim_is_free=False,
    # In a layer that also makes what multiplies its output a sub-module is not affine.
    recoverable=(),
    stock=Classes.called("Phi3", stock),
    pruned=Classes.called("PrunedPhi3", pruned),
)
