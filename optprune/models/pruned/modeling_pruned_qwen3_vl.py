"""Qwen3-VL whose language part has decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedQwen3VLConfig(stock.Qwen3VLConfig):
    """The stock config, with a shape for each block in its text_config."""

    model_type = "pruned_qwen3_vl"


class PrunedQwen3VLTextAttention(PrunedAttention, stock.Qwen3VLTextAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    norms = "head"


class PrunedQwen3VLTextDecoderLayer(PrunedBlock, stock.Qwen3VLTextDecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedQwen3VLTextAttention


class PrunedQwen3VLForConditionalGeneration(PrunedModel, stock.Qwen3VLForConditionalGeneration):
    """Vision-language model whose decoder blocks may differ in shape."""

    config_class = PrunedQwen3VLConfig
    block_class = PrunedQwen3VLTextDecoderLayer
    blocks = "model.language_model.layers"
    _no_split_modules = ["PrunedQwen3VLTextDecoderLayer"]


PrunedQwen3VLConfig.register_for_auto_class()
PrunedQwen3VLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
