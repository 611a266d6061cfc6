"""SmolLM3: Llama's layout, where some blocks have no rotary embeddings, and those may have a sliding window."""

from dataclasses import replace

from transformers.models.smollm3 import modeling_smollm3 as stock

from optprune.models.architecture import Classes
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_smollm3 as pruned

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    stock=Classes.called("SmolLM3", stock),
    pruned=Classes.called("PrunedSmolLM3", pruned),
    by_block=("layer_types", "no_rope_layers"),
)
