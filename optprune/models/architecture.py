"""What optprune must know of an architecture: where its linear layers are and which of them go together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any, Self

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
    """the units of the MLP, or of each expert"""
    kv_heads: int
    value_dim: int
    """the value dimensions of a head"""
    experts: int = 0
    """the experts that a router chooses from; none where the block has one MLP"""

    @property
    def parts(self) -> tuple[str, ...]:
        """The sub-blocks that it has."""
        return tuple(part for part, size in zip(PARTS, (self.kv_heads, self.mlp_width), strict=True) if size)

    def without(self, part: str) -> "BlockShape":
        """The shape without a sub-block, "attention" or "mlp"."""
        if part == "attention":
            return replace(self, kv_heads=0, value_dim=0)
        return replace(self, mlp_width=0, experts=0)

    def counts(self) -> dict[str, int]:
        """The numbers by name, as files hold them: of a block without a router nothing is said of experts."""
        counts: dict[str, Any] = asdict(self)
        return counts if self.experts else {name: count for name, count in counts.items() if name != "experts"}


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


GATED = ("gate_proj", "up_proj", "down_proj")
"""the layers of a gated MLP"""


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts, gated MLPs that are alike, of which a router chooses some for each token.

    While a decoder has the model each expert is a module of its own, called by its number, as checkpoints name it.
    """

    module: str = "mlp"
    """the sub-module that routes and adds up"""
    experts: str = "mlp.experts"
    """the module that holds the experts"""
    router: str = "mlp.gate"
    """the module whose weight has a row for each expert"""
    count: str = "num_experts"
    """the config field that holds the number of experts"""
    chosen: str = "num_experts_per_tok"
    """the config field that holds how many of them a token goes to"""
    shared: str = ""
    """the gated MLP that every token goes through besides, where there is one"""
    shared_width: str = ""
    """the config field that holds its width"""
    multiple: int = 8
    """what experts' widths are multiples of: kernels that multiply all experts of a block read 16 bytes at a time"""
    normalised: Callable[[PretrainedConfig], bool] = lambda config: bool(config.norm_topk_prob)
    """whether the weights of the chosen experts are scaled to add up to one"""
    stored: Mapping[str, str] = field(default_factory=dict)
    """what checkpoints call parts of the names in a block, where that is not as they are here"""

    def stages(self, count: int) -> tuple[tuple[str, ...], ...]:
        """The linear layers of so many experts, those that run together."""
        every = tuple(f"{self.experts}.{number}" for number in range(count))
        stages = []
        for places in ((self.shared,), every) if self.shared else (every,):
            stages.append(tuple(f"{place}.{layer}" for place in places for layer in GATED[:2]))
            stages.append(tuple(f"{place}.{GATED[2]}" for place in places))
        return tuple(stages)

    def mlps(self, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Of the layers of a block those whose columns are units of an expert, each with those whose rows they are."""
        places = [path.removesuffix(f".{GATED[2]}") for path in layers if path.endswith(f".{GATED[2]}")]
        return {f"{place}.{GATED[2]}": tuple(f"{place}.{layer}" for layer in GATED[:2]) for place in places}


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
    """the linear layers in the order of the forward pass; those of one stage and one module read the same input"""
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
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """the config fields of which one value is understood"""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """what checkpoints of the stock class call a tensor, where that is not its name in the model"""
    older_names: Mapping[str, str] = field(default_factory=dict)
    """what the config of transformers 4.x calls a field, rope_theta among them, where it is not that"""
    logits_divisor: str = ""
    """the config field by which what the head gives is divided, where there is one"""
    logits_factor: str = ""
    """the config field by which what the head gives is multiplied, where there is one"""
    logits_cap: str = ""
    """the config field c, where logits x are c tanh(x / c) in the end"""
    mixture: Mixture | None = None
    """the experts in place of one MLP, where there are any"""

    def of(self, config: PretrainedConfig) -> "Architecture":
        """The same with the linear layers of as many experts as a config says."""
        if self.mixture is None:
            return self
        return replace(self, stages=self.stages + self.mixture.stages(getattr(config, self.mixture.count)))

    def stored(self, name: str) -> str:
        """What checkpoints of the stock class call a tensor of the model."""
        return self.stored_names.get(name) or self._renamed(name, self._stored_parts)

    def given(self, name: str) -> str:
        """What the model calls a tensor of a checkpoint of the stock class; one without a place stays as it is."""
        names = {stored: own for own, stored in self.stored_names.items()}
        return names.get(name) or self._renamed(name, {there: here for here, there in self._stored_parts.items()})

    @property
    def _stored_parts(self) -> Mapping[str, str]:
        return {} if self.mixture is None else self.mixture.stored

    def _renamed(self, name: str, parts: Mapping[str, str]) -> str:
        if name.startswith(f"{self.blocks}."):
            for before, after in parts.items():
                name = name.replace(before, after)
        return name

    @property
    def model_types(self) -> tuple[str, ...]:
        """What config.json calls its models, pruned or not."""
        return (self.model_type,) if self.pruned is None else (self.model_type, self.pruned.config.model_type)

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers of a block."""
        return tuple(path for stage in self.stages for path in stage)

    @cached_property
    def mlps(self) -> Mapping[str, tuple[str, ...]]:
        """The layers whose columns are MLP units, one or one of every expert, with those whose rows these units are."""
        if self.mixture is None:
            return {self.mlp_consumer: self.mlp_producers}
        return self.mixture.mlps(self.layers)

    @property
    def mlp_consumers(self) -> tuple[str, ...]:
        """Those whose columns a block's `mlp_width` counts: of all MLPs but a shared expert."""
        shared = "" if self.mixture is None else f"{self.mixture.shared}.{GATED[2]}"
        return tuple(path for path in self.mlps if path != shared)

    @property
    def taps(self) -> dict[str, str]:
        """For every linear layer of a block the first one that reads the same input."""
        first: dict[tuple[int, str], str] = {}
        places = [(number, path) for number, stage in enumerate(self.stages) for path in stage]
        return {path: first.setdefault((number, path.rpartition(".")[0]), path) for number, path in places}

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

    def check_kept(self, count: str, kept: int, what: str) -> None:
        """Raise InputError where a block cannot have so many, but some, of a count of its shape."""
        self.check_divisible(count, what)
        multiple = 1 if self.mixture is None else self.mixture.multiple
        if count == "mlp_width" and kept % multiple:
            raise InputError(
                f"{what}, but experts' widths are multiples of {multiple}: transformers' kernels for all experts of a "
                f"block run no others (--width-multiple {multiple})"
            )

    def stage_of(self, path: str) -> int:
        """The position in the forward pass of a layer's input."""
        return next(index for index, stage in enumerate(self.stages) if path in stage)
