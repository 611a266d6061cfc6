"""Qwen3: Llama's layout, with norms of the queries and keys of each head, and sliding windows in some blocks."""

from dataclasses import replace

from transformers.models.qwen3 import modeling_qwen3 as stock

from optprune.models.architecture import Classes
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_qwen3 as pruned

QWEN3 = replace(
    LLAMA, model_type="qwen3", stock=Classes.called("Qwen3", stock), pruned=Classes.called("PrunedQwen3", pruned)
)
