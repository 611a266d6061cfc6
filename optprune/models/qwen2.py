"""Qwen2 and Qwen2.5: Llama's layout with biases on Q, K and V and an optional sliding window."""

from dataclasses import replace
from functools import partial

from optprune.models.llama import LLAMA
from optprune.models.narrow_attention import NarrowQwen2Attention, narrow_to

QWEN2 = replace(LLAMA, model_type="qwen2", narrow_values=partial(narrow_to, NarrowQwen2Attention))
