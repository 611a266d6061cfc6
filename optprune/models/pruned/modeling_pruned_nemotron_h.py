"""Nemotron-H with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from transformers.models.nemotron_h import modeling_nemotron_h as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel
from .pruned_mixture import name_experts
from .pruned_recurrent import with_fewer_heads
from .pruned_single import PrunedSingleBlock


class PrunedNemotronHConfig(stock.NemotronHConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_nemotron_h"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedNemotronHAttention(PrunedAttention, stock.NemotronHAttention):
    """Attention with any number of heads and value dimensions."""

    stock = stock
    use_rope = False


class PrunedNemotronHBlock(PrunedSingleBlock, stock.NemotronHBlock):
    """Decoder block of one sub-block of any width."""

    attention_class = PrunedNemotronHAttention
    counted = ("n_groups", "mamba_num_heads")

    def shrink_mixer(self, shape, group):
        super().shrink_mixer(shape, group)
        if shape.get("recurrent"):
            self._modules["mixer"] = with_fewer_heads(self.mixer, self.config, self.counted, shape["recurrent"])


class PrunedNemotronHForCausalLM(PrunedModel, stock.NemotronHForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedNemotronHConfig
    block_class = PrunedNemotronHBlock
    _no_split_modules = ["PrunedNemotronHBlock"]

    def number_caches(self):
        for index, block in enumerate(self.model.layers):
            block.mixer.layer_idx = index


name_experts(PrunedNemotronHConfig.model_type, "nemotron_h")
# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedNemotronHConfig.register_for_auto_class()
PrunedNemotronHForCausalLM.register_for_auto_class("AutoModelForCausalLM")
