"""Qwen2 and Qwen2.5: Llama's layout with biases on Q, K and V and an optional sliding window."""

from dataclasses import replace

from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as stock

from optprune.models.architecture import Classes
from optprune.models.llama import LLAMA
from optprune.models.pruned import modeling_pruned_qwen2 as pruned

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    stock=Classes(Qwen2Config, stock.Qwen2ForCausalLM, stock.Qwen2DecoderLayer, stock.Qwen2Attention),
    pruned=Classes(
        pruned.PrunedQwen2Config,
        pruned.PrunedQwen2ForCausalLM,
        pruned.PrunedQwen2DecoderLayer,
        pruned.PrunedQwen2Attention,
    ),
)
