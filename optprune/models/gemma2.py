"""Gemma 2: Llama's layers between four norms, every other block with a sliding window, and soft caps of the logits."""

from dataclasses import replace

from transformers.models.gemma2 import modeling_gemma2 as stock

from optprune.models.architecture import Classes
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_gemma2 as pruned

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    attention_parts=("input_layernorm", "self_attn", "post_attention_layernorm"),
    mlp_parts=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    stock=Classes.called("Gemma2", stock),
    pruned=Classes.called("PrunedGemma2", pruned),
    off=("use_bidirectional_attention",),
    logits_cap="final_logit_softcapping",
)
