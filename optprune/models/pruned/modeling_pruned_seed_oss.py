"""Seed-OSS with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from torch.nn.functional import dropout
from transformers.models.seed_oss import modeling_seed_oss as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedBlock, PrunedModel


class PrunedSeedOssConfig(stock.SeedOssConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_seed_oss"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedSeedOssAttention(PrunedAttention, stock.SeedOssAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    by_pairs = True

    def forward(self, *args, **kwargs):
        mixed, weights = super().forward(*args, **kwargs)
        return dropout(mixed, p=self.residual_dropout, training=self.training), weights


class PrunedSeedOssDecoderLayer(PrunedBlock, stock.SeedOssDecoderLayer):
    """Decoder block of any width, with or without its sub-blocks."""

    attention_class = PrunedSeedOssAttention


class PrunedSeedOssForCausalLM(PrunedModel, stock.SeedOssForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedSeedOssConfig
    block_class = PrunedSeedOssDecoderLayer
    _no_split_modules = ["PrunedSeedOssDecoderLayer"]


# Saving such a model copies this file, and the one it imports, into the folder and names it in the config.
PrunedSeedOssConfig.register_for_auto_class()
PrunedSeedOssForCausalLM.register_for_auto_class("AutoModelForCausalLM")
