"""Gemma 3, the models of text alone: Gemma 2's blocks, with norms of queries and keys, and two rotary embeddings."""

from dataclasses import replace

from transformers import Gemma3TextConfig
from transformers.models.gemma3 import modeling_gemma3 as stock

from optprune.models.architecture import Classes
from optprune.models.gemma2 import GEMMA2
from optprune.models.pruned import modeling_pruned_gemma3_text as pruned

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    stock=Classes(Gemma3TextConfig, stock.Gemma3ForCausalLM, stock.Gemma3DecoderLayer, stock.Gemma3Attention),
    pruned=Classes.called("PrunedGemma3", pruned),
)
