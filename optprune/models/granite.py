"""Granite: Llama's layout, with multipliers of the embeddings, the scores, what sub-blocks add, and the logits."""

from dataclasses import replace

from transformers.models.granite import modeling_granite as stock

from optprune.models.architecture import Classes
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_granite as pruned

GRANITE = replace(
    LLAMA,
    model_type="granite",
    stock=Classes.called("Granite", stock),
    pruned=Classes.called("PrunedGranite", pruned),
    logits_divisor="logits_scaling",
)
