"""Mistral: Llama's layout, with a sliding window over every block where the config has one."""

from dataclasses import replace

from transformers.models.mistral import modeling_mistral as stock

from optprune.models.architecture import Classes
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_mistral as pruned

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    stock=Classes.called("Mistral", stock),
    pruned=Classes.called("PrunedMistral", pruned),
)
