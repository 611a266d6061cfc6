"""What optprune must know of an architecture: where its linear layers are and which of them go together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Self

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from optprune.errors import InputError

PARTS = ("attention", "mlp")
"""the sub-blocks of a block, which can be removed whole"""


@dataclass(frozen=True)
class Heads:
    """The head layout of an attention layer: query heads, key/value heads, and the dimension of a head."""

    query: int
    kv: int
    dim: int

    @property
    def group(self) -> int:
        """How many query heads read one KV head."""
        return self.query // self.kv


@dataclass(frozen=True)
class BlockShape:
    """What a decoder block holds; zeros say that it has no MLP, or no attention."""

    mlp_width: int
    kv_heads: int
    value_dim: int
    """the value dimensions of a head"""

    @property
    def parts(self) -> tuple[str, ...]:
        """The sub-blocks that it has."""
        return tuple(part for part, size in zip(PARTS, (self.kv_heads, self.mlp_width), strict=True) if size)

    def without(self, part: str) -> "BlockShape":
        """The shape without a sub-block, "attention" or "mlp"."""
        return replace(self, kv_heads=0, value_dim=0) if part == "attention" else replace(self, mlp_width=0)


@dataclass(frozen=True)
class BlockAllocation:
    """What one block keeps."""

    shape: BlockShape
    """a zero for mlp_width or kv_heads removes the MLP or the attention whole"""
    shares: Mapping[str, float] = field(default_factory=dict)
    """the share of single weights kept in a layer, by its path in the block; a layer that is not named keeps all"""

    def share(self, path: str) -> float:
        """The share of single weights that a layer keeps."""
        return self.shares.get(path, 1.0)


@dataclass(frozen=True)
class Classes:
    """The classes of a family that matter here. Stock and pruned ones have the same state: only forward differs."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    block: type[nn.Module]
    attention: type[nn.Module]

    @classmethod
    def called(cls, family: str, module: ModuleType) -> Self:
        """Those of a modelling file that are called as most families call theirs, after the family."""
        kinds = ("Config", "ForCausalLM", "DecoderLayer", "Attention")
        return cls(*(getattr(module, f"{family}{kind}") for kind in kinds))


@dataclass(frozen=True)
class Architecture:
    """One family of decoder models, as data; every path is relative to a decoder block unless it says otherwise."""

    model_type: str
    """config.model_type"""
    blocks: str
    """path from the model to the list of decoder blocks"""
    after_blocks: tuple[str, ...]
    """paths from the model to what the hidden states pass between the last block and the head, where a model has it"""
    stages: tuple[tuple[str, ...], ...]
    """the linear layers in the order of the forward pass; those of one stage read the same input"""
    mlp_producers: tuple[str, ...]
    """the layers whose rows are MLP units"""
    mlp_consumer: str
    """the layer whose columns are MLP units"""
    mlp_width: str
    """the config field (and MLP module attribute) that holds the number of MLP units"""
    attention: str
    """the attention module"""
    query: str
    """the layer whose rows are the query heads"""
    key: str
    """the layer whose rows are the keys of the KV heads"""
    value: str
    """the layer whose rows are value dimensions"""
    output: str
    """the layer that reads the value dimensions of all query heads, head by head"""
    heads: Callable[[PretrainedConfig], Heads]
    head_dim_is_free: bool
    """whether the stock class takes a head_dim from the config, so that it can have fewer heads"""
    attention_parts: tuple[str, ...]
    """the modules that make up the attention sub-block: they go when it goes"""
    mlp_parts: tuple[str, ...]
    """the modules that make up the MLP sub-block"""
    recoverable: tuple[tuple[str, tuple[str, ...]], ...]
    """sub-modules, with the layers in which their output is affine, one at a time, in the order of the forward pass"""
    stock: Classes | None
    """None where it is described by a draft, which names no classes"""
    pruned: Classes | None
    """the classes whose blocks may differ in shape, where there are any"""
    ends_with_norm: Callable[[PretrainedConfig], bool] = lambda config: False
    """whether a norm follows what a block adds last, whose output is not the block's then"""
    joined: str = ""
    """how queries, keys and values lie in the layer that makes them all, where one does: see `rows`"""
    rows_of_unit: int = 1
    """how many rows of each MLP producer a unit has, as far apart as there are units"""
    by_block: tuple[str, ...] = ("layer_types",)
    """the config fields that list something for each block"""
    indivisible: Mapping[str, str] = field(default_factory=dict)
    """the counts of a block's shape of which all stay, or none, and why"""
    off: tuple[str, ...] = ()
    """the config fields that must be off: with them a model computes something else"""
    transposed: tuple[str, ...] = ()
    """the linear layers whose weight a file holds as [in, out], as transformers' Conv1D does"""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """what checkpoints of the stock class call a tensor, where that is not its name in the model"""
    older_names: Mapping[str, str] = field(default_factory=dict)
    """what the config of transformers 4.x calls rope_theta and partial_rotary_factor, where it is not that"""
    logits_divisor: str = ""
    """the config field by which what the head gives is divided, where there is one"""
    logits_factor: str = ""
    """the config field by which what the head gives is multiplied, where there is one"""
    logits_cap: str = ""
    """the config field c, where logits x are c tanh(x / c) in the end"""

    @property
    def model_types(self) -> tuple[str, ...]:
        """What config.json calls its models, pruned or not."""
        return (self.model_type,) if self.pruned is None else (self.model_type, self.pruned.config.model_type)

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers of a block."""
        return tuple(path for stage in self.stages for path in stage)

    @property
    def taps(self) -> dict[str, str]:
        """For every linear layer of a block the first one that reads the same input."""
        return {path: stage[0] for stage in self.stages for path in stage}

    def is_turned(self, name: str) -> bool:
        """Whether a file holds the tensor of that full name transposed."""
        own = name.removeprefix(f"{self.blocks}.").partition(".")[2]
        return own.endswith(".weight") and own.removesuffix(".weight") in self.transposed

    def modules_of(self, part: str) -> tuple[str, ...]:
        """The modules that make up a sub-block, "attention" or "mlp"."""
        return self.attention_parts if part == "attention" else self.mlp_parts

    def answer(self, config: PretrainedConfig, logits: Tensor) -> Tensor:
        """The logits of a model whose head gives these; the operations are those of the stock class."""
        names = (self.logits_divisor, self.logits_factor, self.logits_cap)
        divisor, factor, cap = (getattr(config, name) if name else None for name in names)
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        return logits if cap is None else (logits / cap).tanh() * cap

    def check_divisible(self, count: str, what: str) -> None:
        """Raise InputError where some of a count of a block's shape cannot go; `what` asks for it, in words."""
        if count in self.indivisible:
            raise InputError(f"{what}, but of a {self.model_type} model all stay or none: {self.indivisible[count]}")

    def stage_of(self, path: str) -> int:
        """The position in the forward pass of a layer's input."""
        return next(index for index, stage in enumerate(self.stages) if path in stage)
