"""GPT-OSS with decoder blocks of different shapes, pruned by optprune; see pruned_decoder.py."""

from torch import nn
from transformers.models.gpt_oss import modeling_gpt_oss as stock

from .pruned_cache import remembered  # noqa: F401  # transformers 4 copies only the files that this one names
from .pruned_decoder import PrunedAttention, PrunedModel
from .pruned_mixture import PrunedMixtureBlock


class PrunedGptOssConfig(stock.GptOssConfig):
    """The stock config with a shape for each block."""

    model_type = "pruned_gpt_oss"
    optprune_shapes: list[dict[str, int]] | None = None


class PrunedGptOssAttention(PrunedAttention, stock.GptOssAttention):
    """Attention with any number of heads, each with its sink, and of value dimensions."""

    stock = stock

    def options(self):
        return {"sliding_window": self.sliding_window, "s_aux": self.sinks}

    def shrink(self, queries, keys, values, mixed):
        super().shrink(queries, keys, values, mixed)
        self.sinks = nn.Parameter(self.sinks.new_empty(queries // self.head_dim))


class PrunedGptOssDecoderLayer(PrunedMixtureBlock, stock.GptOssDecoderLayer):
    """Decoder block with any number of experts, with or without its sub-blocks."""

    attention_class = PrunedGptOssAttention
    router_name = "router"
    width = "intermediate_size"

    def added(self, hidden_states, mixed):
        output = mixed[0] if isinstance(mixed, tuple) else mixed  # the MLP gives the weights of the experts too
        return super().added(hidden_states, output)

    def expert_sizes(self, width, hidden):
        return {
            **{"gate_up_proj": (hidden, 2 * width), "gate_up_proj_bias": (2 * width,)},
            **{"down_proj": (width, hidden), "down_proj_bias": (hidden,)},
        }


class PrunedGptOssForCausalLM(PrunedModel, stock.GptOssForCausalLM):
    """Language model whose blocks may differ in shape."""

    config_class = PrunedGptOssConfig
    block_class = PrunedGptOssDecoderLayer
    _no_split_modules = ["PrunedGptOssDecoderLayer"]


# Saving such a model copies this file, and those it imports, into the folder and names it in the config.
PrunedGptOssConfig.register_for_auto_class()
PrunedGptOssForCausalLM.register_for_auto_class("AutoModelForCausalLM")
