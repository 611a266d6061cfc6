"""A transformers model seen as a row of decoder blocks with linear layers that can be read, written and narrowed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from optprune.errors import InputError
from optprune.models.architecture import Architecture
from optprune.models.llama import LLAMA
from optprune.models.opt import OPT
from optprune.models.qwen2 import QWEN2
from optprune.problems import Link

ARCHITECTURES = {architecture.model_type: architecture for architecture in (LLAMA, OPT, QWEN2)}
VALUE_DIM_FIELD = "optprune_value_dim"
"""the config field that records the value dimensions of a head where they are fewer than the stock class has"""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a config, or an InputError that lists those known."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise InputError(
            f"the architecture {config.model_type!r} is not known: optprune prunes {', '.join(sorted(ARCHITECTURES))} "
            "(an architecture is one file of data in optprune/models)"
        )
    return architecture


@dataclass(frozen=True, eq=False)
class LinkedLayers:
    """The layers of one block that share a choice of units, with the Link that says how."""

    consumer: str
    producers: tuple[str, ...]
    link: Link


class Decoder:
    """Access to the parts of a model that pruning reads and writes. Nothing is copied; writing changes the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.architecture = architecture_of(model.config)
        self.heads = self.architecture.heads(model.config)
        self.blocks: nn.ModuleList = model.get_submodule(self.architecture.blocks)  # type: ignore[assignment]
        for block in self.blocks:
            for path in self.architecture.layers:
                layer = block.get_submodule(path)
                if type(layer) is not nn.Linear:
                    raise InputError(
                        f"{path} is a {type(layer).__name__}, not a plain linear layer: load the model without "
                        "quantisation or adapters"
                    )

    def name(self, block: int, path: str) -> str:
        """The full name of a layer, as in the checkpoint."""
        return f"{self.architecture.blocks}.{block}.{path}"

    def layer(self, block: int, path: str) -> nn.Linear:
        """One linear layer; its weight is [out, in]."""
        return self.blocks[block].get_submodule(path)  # type: ignore[return-value]

    def linear_weights(self) -> int:
        """The number of weights in the decoder blocks' linear layers, which sparsity is counted over."""
        return sum(
            self.layer(block, path).weight.numel()
            for block in range(len(self.blocks))
            for path in self.architecture.layers
        )

    def value_dim(self, block: int) -> int:
        """The value dimensions of a head."""
        return self.layer(block, self.architecture.value).out_features // self.heads.kv

    # -- units

    def mlp_units(self, block: int) -> LinkedLayers:
        """The hidden neurons of a block's MLP: one slot."""
        architecture = self.architecture
        layer = self.layer(block, architecture.mlp_consumer)
        every = torch.arange(layer.in_features, device=layer.weight.device)
        rows = tuple(every[:, None] for _ in architecture.mlp_producers)
        link = Link(every[:, None], torch.zeros_like(every), rows)
        return LinkedLayers(architecture.mlp_consumer, architecture.mlp_producers, link)

    def value_units(self, block: int) -> LinkedLayers:
        """The value dimensions of a block's attention: a slot for each KV head, tied over its query heads."""
        heads, dim = self.heads, self.value_dim(block)
        device = self.layer(block, self.architecture.output).weight.device
        unit = torch.arange(heads.kv * dim, device=device)
        slot = unit // dim
        query_head = slot[:, None] * heads.group + torch.arange(heads.group, device=device)
        link = Link(query_head * dim + (unit % dim)[:, None], slot, (unit[:, None],))
        return LinkedLayers(self.architecture.output, (self.architecture.value,), link)

    def keep_units(self, block: int, layers: LinkedLayers, choice: Tensor) -> None:
        """Delete the columns and rows of all other units; `choice` is a bool mask over the link's units."""
        link = layers.link
        consumer = self.layer(block, layers.consumer)
        keep_inputs(consumer, link.column_mask(choice, consumer.in_features)[0])
        for path, rows in zip(layers.producers, link.rows, strict=True):
            producer = self.layer(block, path)
            mask = torch.ones(producer.out_features, dtype=torch.bool, device=rows.device)
            mask[rows[~choice].reshape(-1)] = False
            keep_outputs(producer, mask)
        if layers.consumer == self.architecture.output and self.value_dim(block) < self.heads.dim:
            self._narrow_attention(block, self.value_dim(block))

    def narrow_values(self, value_dim: int) -> None:
        """Make every attention module of a freshly built model hold `value_dim` value dimensions a head.

        Only shapes change: the weights are still to be loaded (the model may be on the meta device).
        """
        for block in range(len(self.blocks)):
            value = self.layer(block, self.architecture.value)
            output = self.layer(block, self.architecture.output)
            reshape(value, self.heads.kv * value_dim, value.in_features)
            reshape(output, output.out_features, self.heads.query * value_dim)
            self._narrow_attention(block, value_dim)

    def _narrow_attention(self, block: int, value_dim: int) -> None:
        attention = self.blocks[block].get_submodule(self.architecture.attention)
        self.architecture.narrow_values(attention, value_dim)

    # -- what the config must say

    def record_shapes(self) -> None:
        """Write the widths into the config, so that a saved folder says what it holds.

        Raises InputError when blocks differ: one config field cannot say so.
        """
        architecture, blocks = self.architecture, range(len(self.blocks))
        width = _same((self.layer(block, architecture.mlp_consumer).in_features for block in blocks), "MLP units")
        setattr(self.model.config, architecture.mlp_width, width)
        parent = architecture.mlp_consumer.rpartition(".")[0]
        for block in self.blocks:
            mlp = block.get_submodule(parent)
            if architecture.mlp_width in vars(mlp):
                setattr(mlp, architecture.mlp_width, width)
        value_dim = _same((self.value_dim(block) for block in blocks), "value dimensions")
        if value_dim < self.heads.dim:
            setattr(self.model.config, VALUE_DIM_FIELD, value_dim)


def is_stock(config: PretrainedConfig) -> bool:
    """Whether plain transformers can hold a model of this config."""
    return getattr(config, VALUE_DIM_FIELD, None) is None


def keep_inputs(layer: nn.Linear, mask: Tensor) -> None:
    """Delete the columns of a linear layer outside the mask, in place."""
    layer.weight = nn.Parameter(layer.weight.detach()[:, mask].contiguous(), layer.weight.requires_grad)
    layer.in_features = layer.weight.shape[1]


def keep_outputs(layer: nn.Linear, mask: Tensor) -> None:
    """Delete the rows of a linear layer, and their biases, outside the mask, in place."""
    layer.weight = nn.Parameter(layer.weight.detach()[mask].contiguous(), layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[mask].contiguous(), layer.bias.requires_grad)
    layer.out_features = layer.weight.shape[0]


def reshape(layer: nn.Linear, outputs: int, inputs: int) -> None:
    """Give a linear layer another shape, with weights that are still to be filled in."""
    layer.weight = nn.Parameter(layer.weight.new_empty(outputs, inputs))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(outputs))
    layer.out_features, layer.in_features = outputs, inputs


def write(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Replace the values of a linear layer, in its own dtype."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)


def _same(widths, what: str) -> int:
    different = sorted(set(widths))
    if len(different) > 1:
        raise InputError(f"the blocks have different numbers of {what} ({different}), which one config cannot say")
    return different[0]
