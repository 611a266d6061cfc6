"""Data that describes an architecture: where its linear layers are, and which of them go together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from optprune.errors import InputError
from optprune.models.recurrent import Recurrent

PARTS = {"attention": "kv_heads", "recurrent": "recurrent", "mlp": "mlp_width"}
"""the sub-blocks of a block, which can be removed whole, each with the field of a shape that is zero without it"""
GATED = ("gate_proj", "up_proj", "down_proj")
"""the layers of a gated MLP"""
KEPT_PAIRS = "kept_pairs"
"""the tensor of an attention module whose heads lack some rotary pairs: the pairs that each KV head keeps"""
PART_FIELD = "optprune_part_of"
"""the config field, in memory only, that names the vision-language model that a text model is the language part of"""
DENSE, SPARSE = "dense", "sparse"
"""the kinds of MLP in configs that list one for each block: for every token, or experts behind a router"""


def pruned_type(model_type: str) -> str:
    """Return the model_type of pruned models of a family whose blocks differ in shape."""
    return f"pruned_{model_type}"


def pruned_module(model_type: str) -> str:
    """Return the name of the module with the pruned classes of a family."""
    return f"optprune.models.pruned.modeling_{pruned_type(model_type)}"


@dataclass(frozen=True)
class Heads:
    """The head layout of an attention layer: query heads, key/value heads, and the dimension of a head."""

    query: int
    kv: int
    dim: int
    """the dimension of a query head"""
    keys: int = 0
    """the dimensions of a key that the key layer makes for each KV head; zero for all of them"""
    values: int = 0
    """the value dimensions of a head in the stock class; zero for those of a query head"""
    gated: bool = False
    """whether the query layer makes a factor for each value dimension of a query head, behind that head's queries"""
    by_block: bool = False
    """whether blocks have heads of other sizes, which all stay: then these are the first block's"""

    def of(self, shape: "BlockShape") -> "Heads":
        """Return the head layout of a block of a shape."""
        if self.by_block:
            return replace(self, kv=shape.kv_heads or self.kv, dim=shape.value_dim)
        return replace(self, dim=2 * shape.pairs, values=self.value_dim) if shape.pairs else self

    def query_rows(self, value_dim: int) -> int:
        """Return the rows of the query layer for a KV head with so many value dimensions."""
        return self.group * (self.dim + value_dim * self.gated)

    @property
    def key_rows(self) -> int:
        """The rows of the key layer that make the keys of a KV head."""
        return self.keys or self.dim

    @property
    def value_dim(self) -> int:
        """The value dimensions of a head in the stock class."""
        return self.values or self.dim

    @property
    def group(self) -> int:
        """The number of query heads that read one KV head."""
        return self.query // self.kv


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a decoder block; zeros stand for an MLP or an attention that is removed."""

    mlp_width: int
    """the units of the MLP, or of each expert"""
    kv_heads: int
    value_dim: int
    """the value dimensions of a head"""
    experts: int = 0
    """the experts that a router chooses from; zero where the block has one MLP"""
    recurrent: int = 0
    """the key heads of a delta network, or groups of heads of a Mamba 2, or channels of a convolution, in place of
    attention or beside it; zero where the block has none"""
    lacking: int = 0
    """the layers that its attention lacks: 1 where keys are values too, 2 where it reads those of an earlier block"""
    pairs: int = 0
    """the rotary pairs (two dimensions each) that each head of queries and keys has left; zero means all"""

    @property
    def parts(self) -> tuple[str, ...]:
        """The sub-blocks that are left."""
        return tuple(part for part, count in PARTS.items() if getattr(self, count))

    def without(self, part: str) -> "BlockShape":
        """Return the shape without a sub-block, "attention", "recurrent" or "mlp"."""
        further = {"attention": {"value_dim": 0, "lacking": 0, "pairs": 0}, "mlp": {"experts": 0}}.get(part, {})
        return replace(self, **{PARTS[part]: 0}, **further)

    def counts(self, always: Collection[str] = ()) -> dict[str, int]:
        """Return the numbers by name, as files hold them: those of experts and a recurrent mixer where there are some.

        A name in `always` has an entry in any case.
        """
        counts: dict[str, Any] = asdict(self)
        needed = {each.name for each in fields(self) if each.default is MISSING} | set(always)
        return {name: count for name, count in counts.items() if count or name in needed}


@dataclass(frozen=True)
class BlockAllocation:
    """The sizes and shares that one block keeps."""

    shape: BlockShape
    """a zero for mlp_width or kv_heads removes the MLP or the attention whole"""
    shares: Mapping[str, float] = field(default_factory=dict)
    """the share of single weights kept in a layer, by its path in the block; a layer that is not named keeps all"""

    def share(self, path: str) -> float:
        """Return the share of single weights that a layer keeps."""
        return self.shares.get(path, 1.0)


@dataclass(frozen=True)
class Classes:
    """The classes of a family that pruning exchanges. Stock and pruned ones have the same state; forward differs.

    They are named here, and their module is imported when one of them is first used.
    """

    module: str
    config_name: str
    model_name: str
    block_name: str = ""
    attention_name: str = ""

    @property
    def config(self) -> type[PretrainedConfig]:
        """The class of configs."""
        return self._class(self.config_name)

    @property
    def model(self) -> type[PreTrainedModel]:
        """The class of models with a head."""
        return self._class(self.model_name)

    @property
    def block(self) -> type[nn.Module]:
        """The class of decoder blocks."""
        return self._class(self.block_name)

    @property
    def attention(self) -> type[nn.Module]:
        """The class of attention in a block."""
        return self._class(self.attention_name)

    def _class(self, name: str) -> Any:
        return getattr(import_module(self.module), name)


@cache
def register(classes: Classes, auto: Any) -> None:
    """Register pruned classes with AutoConfig and with `auto`, another Auto class of transformers, for this process."""
    AutoConfig.register(classes.config.model_type, classes.config, exist_ok=True)  # a second import may have done it
    auto.register(classes.config, classes.model, exist_ok=True)


class MlpKind(ABC):
    """One kind of MLP that blocks of a family may have.

    A family whose blocks differ in kind has several. A block has one of them, or none: its modules and its shape say
    which.
    """

    width: str
    """the config field that holds the width that a block's `mlp_width` counts"""

    @abstractmethod
    def describes(self, shape: BlockShape) -> bool:
        """Return whether a block of a shape has an MLP of this kind."""

    @abstractmethod
    def stages_by(self, config: PretrainedConfig) -> tuple[tuple[str, ...], ...]:
        """Return the linear layers by a config, grouped by those that run together."""

    @abstractmethod
    def links(self, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the layers whose columns are hidden units, among these, each with those whose rows are the units."""

    @abstractmethod
    def widths(self, config: PretrainedConfig, shape: BlockShape) -> dict[str, int]:
        """Return the hidden units of every layer that has them as columns, in a block of a shape."""

    rows_of_unit: int = 1
    """the rows of each producer that a unit has"""

    def rows_of(self, consumer: str) -> int:
        """Return the rows of each producer that a unit of the MLP with this last layer has."""
        return self.rows_of_unit

    def record_widths(self, config: PretrainedConfig, widths: Sequence[int]) -> None:
        """Write the widths of the blocks of this kind into a config, which holds the largest."""
        setattr(config, self.width, max(widths, default=0) or 1)

    def stock_holds(self, config: PretrainedConfig, shape: BlockShape) -> bool:
        """Return whether a stock model of a config can have this kind of MLP in a shape."""
        return True


@dataclass(frozen=True)
class DenseMlp(MlpKind):
    """An MLP that every token goes through."""

    producers: tuple[str, ...]
    consumer: str
    width: str
    rows_of_unit: int
    adjusted: str = ""
    """the config field that lets the class compute another width from that of the config; off once one is recorded"""

    def describes(self, shape: BlockShape) -> bool:
        return shape.mlp_width > 0 and not shape.experts

    def stages_by(self, config: PretrainedConfig) -> tuple[tuple[str, ...], ...]:
        return ()  # a description lists them itself

    def links(self, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
        return {self.consumer: self.producers}

    def widths(self, config: PretrainedConfig, shape: BlockShape) -> dict[str, int]:
        return {self.consumer: shape.mlp_width}

    def record_widths(self, config: PretrainedConfig, widths: Sequence[int]) -> None:
        super().record_widths(config, widths)
        if self.adjusted:
            setattr(config, self.adjusted, False)


@dataclass(frozen=True)
class ExpertTensors:
    """The layout of the tensors in which a stock class holds all experts of a block."""

    transposed: bool = False
    """whether they hold each matrix as [in, out]"""
    interleaved: bool = False
    """whether the rows of both layers before the last alternate; otherwise those of the gate come first"""
    biased: bool = False
    """whether each of them has one of biases beside it"""
    in_files: bool = False
    """whether checkpoints hold these tensors too, and not matrices of each expert"""
    width: str = "intermediate_dim"
    """the attribute of the stock module that holds the width of an expert"""
    layers: tuple[str, ...] = GATED
    """the layers of an expert; the last one makes its output, and those before it stand in one tensor"""

    def rows(self, count: int) -> tuple[range, range]:
        """Return the rows of the gate and of the layer beside it, among those of both."""
        if self.interleaved:
            return range(0, count, 2), range(1, count, 2)
        return range(count // 2), range(count // 2, count)


@dataclass(frozen=True)
class Mixture(MlpKind):
    """A mixture of experts: MLPs of one shape, of which a router chooses some for each token.

    While a `Decoder` holds the model each expert is a module of its own, named by its number as in checkpoints.
    """

    module: str = "mlp"
    """the sub-module that routes and adds up; empty where the block does it itself"""
    experts: str = "mlp.experts"
    """the module that holds the experts"""
    router: str = "mlp.gate"
    """the module that chooses the experts of each token"""
    count: str = "num_experts"
    """the config field that holds the number of experts"""
    chosen: str = "num_experts_per_tok"
    """the config field that holds the number of experts that each token goes to"""
    shared: str = ""
    """the shared expert, an MLP of their layers that every token goes through; empty where there is none"""
    shared_width: str = ""
    """the config field that holds its width"""
    shared_last: bool = False
    """whether it runs after the others"""
    shared_layers: tuple[str, ...] = ()
    """its layers, where they are not called as those of the others; the last one makes its output"""
    shared_rows: int = 1
    """the rows of each of the layers before that one that a unit of it has"""
    shared_count: str = ""
    """the config field that holds its width as a multiple of an expert's, where no field holds the width itself"""
    width: str = "moe_intermediate_size"
    """the config field that holds the width of an expert"""
    correction: str = ""
    """the router's tensor with a number for each expert that is added to its sigmoid for the choice, where there is
    one; the weights of such a router are sigmoids, and a softmax otherwise"""
    factor: str = ""
    """the config field by which the weights of the chosen experts are multiplied"""
    groups: str = ""
    """the config field that holds the number of groups of equal size of which the router first chooses some"""
    fewest: int = 1
    """the fewest experts with which the stock router works"""
    multiple: int = 8
    """the number of which an expert's width must be a multiple, because kernels read 16 bytes at a time"""
    normalised: Callable[[PretrainedConfig], bool] = lambda config: bool(config.norm_topk_prob)
    """whether the weights of the chosen experts are scaled to add up to one"""
    stored: Mapping[str, str] = field(default_factory=dict)
    """parts of tensor names in a block, each with its spelling in checkpoints where that differs"""
    layout: ExpertTensors = ExpertTensors()
    """how the stock class holds the experts of a block"""
    gated: Callable[..., Tensor] = lambda experts, gate, up: experts.act_fn(gate) * up
    """function of the stock module and of the outputs of an expert's layers before the last that returns the hidden
    units"""
    rows: tuple[str, ...] = ("weight",)
    """the router's parameters that have a row for each expert, without the correction; its weight first"""
    scored: str = ""
    """the module whose output the logits are; empty for the router, whose first output they are"""
    factors: str = ""
    """the router's parameter with a factor of each expert's answers, beside the weights; one of `rows`"""
    normed: str = ""
    """the norm between the states that the router reads and those that the experts read, where there is one"""
    quantised: tuple[str, ...] = ()
    """the methods by which checkpoints may store the experts in few bits, which are read into floats"""

    @property
    def entry(self) -> str:
        """The module whose input is the hidden states of the tokens to route."""
        return self.module or self.router

    @property
    def weight(self) -> str:
        """The router's matrix with a row for each expert."""
        return f"{self.router}.{self.rows[0]}"

    def stages(self, count: int) -> tuple[tuple[str, ...], ...]:
        """Return the linear layers of so many experts, grouped by those that run together."""
        every = tuple(f"{self.experts}.{number}" for number in range(count))
        stages = []
        order = (every, (self.shared,)) if self.shared_last else ((self.shared,), every)
        for places in order if self.shared else (every,):
            stages.append(tuple(f"{place}.{layer}" for place in places for layer in self.layers_of(place)[:-1]))
            stages.append(tuple(self.last_of(place) for place in places))
        return tuple(stages)

    def describes(self, shape: BlockShape) -> bool:
        return shape.mlp_width > 0 and shape.experts > 0

    def stages_by(self, config: PretrainedConfig) -> tuple[tuple[str, ...], ...]:
        return self.stages(getattr(config, self.count))

    def links(self, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
        roots = tuple(f"{place}." for place in (self.experts, self.shared) if place)
        return self.mlps([path for path in layers if path.startswith(roots)])

    def scale(self, config: PretrainedConfig) -> float:
        """Return the number by which the weights of the chosen experts are multiplied."""
        return float(getattr(config, self.factor)) if self.factor else 1.0

    def widths(self, config: PretrainedConfig, shape: BlockShape) -> dict[str, int]:
        found = {self.last_of(f"{self.experts}.{number}"): shape.mlp_width for number in range(shape.experts)}
        return found | ({self.last_of(self.shared): self.width_of_shared(config)} if self.shared else {})

    def layers_of(self, expert: str) -> tuple[str, ...]:
        """Return the layers of an expert."""
        return self.shared_layers if self.shared_layers and expert == self.shared else self.layout.layers

    def last_of(self, expert: str) -> str:
        """Return the last layer of an expert."""
        return f"{expert}.{self.layers_of(expert)[-1]}"

    def rows_of(self, consumer: str) -> int:
        return self.shared_rows if consumer == self.last_of(self.shared) else self.rows_of_unit

    def width_of_shared(self, config: PretrainedConfig) -> int:
        """Return the width of the shared expert."""
        if self.shared_count:
            return int(getattr(config, self.shared_count)) * int(getattr(config, self.width))
        return int(getattr(config, self.shared_width))

    def record_widths(self, config: PretrainedConfig, widths: Sequence[int]) -> None:
        if not self.shared_count:  # the shared expert, which stays, has its width by the same field
            super().record_widths(config, widths)

    def stock_holds(self, config: PretrainedConfig, shape: BlockShape) -> bool:
        return not self.shared_count or shape.mlp_width == getattr(config, self.width)

    def mlps(self, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the last layer of every expert among these, each with the layers whose rows are its units."""
        places = [path.rpartition(".")[0] for path in layers]
        return {
            path: tuple(f"{place}.{layer}" for layer in self.layers_of(place)[:-1])
            for place, path in zip(places, layers, strict=True)
            if path == self.last_of(place)
        }


@dataclass(frozen=True)
class Latent:
    """The low-rank layers of latent attention: some make a vector that is narrower than the hidden states.

    Queries, keys and values are made from these vectors, so that removing heads or value dimensions leaves them whole.
    """

    makes: Mapping[str, tuple[str, ...]]
    """the layers that make such a vector, each with the config fields whose sum is its number of outputs"""
    reads: Mapping[str, str]
    """the layers that read one, each with the config field that holds its number of inputs"""

    def sizes(self, config: PretrainedConfig, outputs: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return the outputs and inputs of these layers; `outputs` holds those of the layers that read."""
        made = {path: sum(int(getattr(config, name) or 0) for name in names) for path, names in self.makes.items()}
        found = {path: (count, int(config.hidden_size)) for path, count in made.items()}
        reads = {path: name for path, name in self.reads.items() if path in outputs}
        return found | {path: (outputs[path], int(getattr(config, name))) for path, name in reads.items()}


@dataclass(frozen=True)
class Shared:
    """The keys and values that blocks of some models hand on to later blocks, beside the hidden states."""

    argument: str
    """the argument of a block with a mapping from kinds of attention to keys and values, which it reads and writes"""
    kind: Callable[[Any], str]
    """function that returns the kind of an attention module"""
    reads: Callable[[Any], bool]
    """whether an attention module reads those of its kind, in place of its own"""
    writes: Callable[[Any], bool]
    """whether an attention module hands on its own; the attention of such a block cannot be removed"""
    numbers: str = ""
    """the argument of a block with numbers of its own for each token, if there is one"""
    width: str = ""
    """the config field with how many these are"""

    def numbers_of_token(self, config: PretrainedConfig) -> int:
        """Return how many numbers of its own each token has in each block."""
        return int(getattr(config, self.width) or 0) if self.width else 0


@dataclass(frozen=True)
class Architecture:
    """One family of decoder models, as data; every path is relative to a decoder block unless it says otherwise."""

    model_type: str
    """config.model_type"""
    blocks: str
    """path from the model to the list of decoder blocks"""
    after_blocks: tuple[str, ...]
    """paths from the model to the modules between the last block and the head, where a model has them"""
    stages: tuple[tuple[str, ...], ...]
    """the linear layers in the order of the forward pass; those of one stage and one module read the same input

    Those of experts come last, or in place of an empty stage."""
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
    """the modules that make up the attention sub-block: they are removed with it"""
    mlp_parts: tuple[str, ...]
    """the modules that make up the MLP sub-block"""
    recoverable: tuple[tuple[str, tuple[str, ...]], ...]
    """sub-modules, with the layers in which their output is affine, one at a time, in the order of the forward pass"""
    stock: Classes | None
    """the classes of transformers; None for a draft, which names no classes"""
    pruned: Classes | None
    """the classes whose blocks may differ in shape, if there are any"""
    ends_with_norm: Callable[[PretrainedConfig], bool] = lambda config: False
    """whether a norm follows the last addition in a block, so that the block's output is that norm's"""
    joined: str = ""
    """the order of queries, keys and values in one layer that makes all of them: see `rows_of_heads`"""
    rows_of_unit: int = 1
    """the rows of each MLP producer that a unit has; they are as far apart as there are units"""
    mlp_width_adjusted: str = ""
    """the config field that lets the stock class compute another width of the MLP from the one in the config"""
    by_block: tuple[str, ...] = ("layer_types",)
    """the config fields that list something for each block"""
    numbers: tuple[str, ...] = ()
    """the config fields that list the numbers of some blocks"""
    indivisible: Mapping[str, str] = field(default_factory=dict)
    """the counts of a block's shape that can only stay whole or become zero, each with the reason"""
    leading: tuple[str, ...] = ()
    """the config fields that count the first blocks, of another kind than the rest"""
    listed: str = ""
    """the config field that lists the kind of each block's MLP in words, where there is one"""
    float32: tuple[str, ...] = ()
    """the parameters of a block that are float32 whatever the model's dtype, by their names in it"""
    per_head: tuple[str, ...] = ()
    """the parameters of a block that have a number for each query head, by their names in it"""
    off: tuple[str, ...] = ()
    """the config fields that must be off, because they change the computation"""
    transposed: tuple[str, ...] = ()
    """the linear layers whose weight a file holds as [in, out], as transformers' Conv1D does"""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """the config fields that must have one value"""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """tensor names in the model, each with its name in checkpoints of the stock class where that differs"""
    stored_root: str = ""
    """the first word of the names of the base model's tensors in such checkpoints, where that differs"""
    older_names: Mapping[str, str] = field(default_factory=dict)
    """config fields (rope_theta among them), each with its name in transformers 4.x where that differs"""
    in_transformers_4: bool = True
    """whether transformers 4.57 has the class too; with experts it reads folders of the stock class only"""
    logits_divisor: str = ""
    """the config field by which the head's output is divided, where there is one"""
    logits_factor: str = ""
    """the config field by which the head's output is multiplied, where there is one"""
    logits_cap: str = ""
    """the config field c, where the final logits are c tanh(x / c)"""
    mixture: Mixture | None = None
    """the experts in place of one MLP, if there are any"""
    latent: Latent | None = None
    """the low-rank layers of its attention, if there are any"""
    recurrent: Recurrent | None = None
    """the mixer that some blocks have in place of attention, or all beside it, if there is one"""
    whole: tuple[tuple[str, ...], ...] = (("attention", "mlp"), ("recurrent", "mlp"))
    """the sub-blocks that a block of the stock class has: all of one of these"""
    by_config: Callable[[PretrainedConfig], Mapping[str, Any]] = lambda config: {}
    """function that returns the fields of this description that a config sets otherwise"""
    part_of: str = ""
    """the model_type of the vision-language model that the model is the language part of, if it is one"""
    part_alike: bool = False
    """whether there are no classes for such a vision-language model whose blocks differ in shape"""
    ordered: str = ""
    """why no block can be removed whole, where that is so"""
    shared: Shared | None = None
    """the keys and values that blocks hand on to later ones, if they do"""
    per_block: Mapping[str, int] = field(default_factory=dict)
    """the modules outside the blocks whose weights hold as many rows (0) or columns (1) for each block"""
    beside: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """the linear layers of a block beside its sub-blocks, each with the config fields of its outputs and inputs"""
    buffers: tuple[str, ...] = ()
    """the buffers of a block that checkpoints hold, by their names in it"""
    stays: bool = False
    """whether a block without any sub-block stays, because it changes the hidden states still"""
    wide: Callable[[PretrainedConfig], Sequence[int]] = lambda config: ()
    """function that returns the multiple of the config's width that each block's MLP has; empty for ones"""
    alone: Mapping[str, Any] = field(default_factory=dict)
    """the config fields of a model of one block that have another value there"""

    def for_config(self, config: PretrainedConfig) -> "Architecture":
        """Return the same with the linear layers that a config says, of as many experts among them."""
        own = self.by_config(config)
        found = replace(self, **own) if own else self
        further = tuple(stage for kind in found.mlp_kinds for stage in kind.stages_by(config))
        place = found.stages.index(()) if () in found.stages else len(found.stages)
        behind = found.stages[place + 1 :]
        return replace(found, stages=found.stages[:place] + further + behind) if further else found

    @property
    def alike(self) -> str:
        """The reason why all blocks keep one shape; empty where they may differ."""
        if self.part_of and self.part_alike:
            return f"in the language part of a {self.part_of} model, whose class is that of transformers"
        return "" if self.pruned is not None else "under a draft, which has no classes for that"

    @property
    def auto_class(self) -> str:
        """The name of transformers' class that loads a folder of the model, or of the whole that it is a part of."""
        return "AutoModelForImageTextToText" if self.part_of else "AutoModelForCausalLM"

    def read_by_older(self, stock: bool) -> bool:
        """Return whether transformers 4.57 reads folders of the stock class, or else of optprune's."""
        return self.in_transformers_4 and (stock or self.mixture is None)

    @cached_property
    def mlp_kinds(self) -> tuple[MlpKind, ...]:
        """The kinds of MLP that blocks may have."""
        dense = DenseMlp(
            self.mlp_producers, self.mlp_consumer, self.mlp_width, self.rows_of_unit, self.mlp_width_adjusted
        )
        return (*((dense,) if self.mlp_consumer else ()), *((self.mixture,) if self.mixture else ()))

    def first_dense(self, count: int, blocks: int) -> dict[str, Any]:
        """Return the config fields by which the first `count` of so many blocks have no experts, and the others do."""
        counts: dict[str, Any] = dict.fromkeys(self.leading, count)
        return counts | ({self.listed: [DENSE] * count + [SPARSE] * (blocks - count)} if self.listed else {})

    @property
    def stored_as_it_is(self) -> bool:
        """Whether files of the stock class hold a block's tensors by the model's names, and in their layout there."""
        mixture = self.mixture
        renamed = self.stored_root or (mixture is not None and mixture.stored)
        return not (self.transposed or renamed or (mixture is not None and mixture.layout.in_files))

    def checkpoint_name(self, name: str) -> str:
        """Return the name of a tensor of the model in checkpoints of the stock class."""
        found = self.stored_names.get(name) or self._renamed(name, self._stored_parts)
        return _with_root(found, self._root, self.stored_root)

    def model_name(self, name: str) -> str:
        """Return the name in the model of a tensor of a checkpoint; a tensor that has no place there keeps its name."""
        names = {stored: own for own, stored in self.stored_names.items()}
        name = _with_root(name, self.stored_root, self._root)
        return names.get(name) or self._renamed(name, {there: here for here, there in self._stored_parts.items()})

    @property
    def _root(self) -> str:
        return self.blocks.partition(".")[0]

    @property
    def _stored_parts(self) -> Mapping[str, str]:
        return {} if self.mixture is None else self.mixture.stored

    def _renamed(self, name: str, parts: Mapping[str, str]) -> str:
        if name.startswith(f"{self.blocks}."):
            for before, after in parts.items():
                name = name.replace(before, after)
        return name

    @property
    def kept_pairs(self) -> str:
        """The name in a block of the tensor that lists the rotary pairs of heads that lack some."""
        return f"{self.attention}.{KEPT_PAIRS}"

    @property
    def pairs_kept_by_head(self) -> bool:
        """Whether the heads of queries and keys may keep some rotary pairs, each KV head its own."""
        return self.pruned is not None and getattr(self.pruned.attention, "by_pairs", False) and not self.alike

    @property
    def model_types(self) -> tuple[str, ...]:
        """The model_type that config.json has, of models as they are and of pruned ones."""
        return (self.model_type,) if self.pruned is None else (self.model_type, pruned_type(self.model_type))

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers of a block."""
        return tuple(path for stage in self.stages for path in stage)

    @cached_property
    def mlps(self) -> Mapping[str, tuple[str, ...]]:
        """The layers whose columns are MLP units, each with the layers whose rows are the units."""
        found: dict[str, tuple[str, ...]] = {}
        for kind in self.mlp_kinds:
            found |= kind.links(self.layers)
        return found

    def rows_of(self, consumer: str) -> int:
        """Return the rows of each producer that a unit of the MLP with this last layer has."""
        return next(kind.rows_of(consumer) for kind in self.mlp_kinds if consumer in kind.links(self.layers))

    @property
    def mlp_consumers(self) -> tuple[str, ...]:
        """The layers whose columns a block's `mlp_width` counts: those of all MLPs but a shared expert."""
        shared = "" if self.mixture is None else self.mixture.last_of(self.mixture.shared)
        return tuple(path for path in self.mlps if path != shared)

    @property
    def taps(self) -> dict[str, str]:
        """The first layer that reads the same input, for every linear layer of a block."""
        first: dict[tuple[int, str], str] = {}
        places = [(number, path) for number, stage in enumerate(self.stages) for path in stage]
        return {path: first.setdefault((number, path.rpartition(".")[0]), path) for number, path in places}

    def is_transposed(self, name: str) -> bool:
        """Return whether a file holds the tensor of that full name transposed."""
        own = name.removeprefix(f"{self.blocks}.").partition(".")[2]
        return own.endswith(".weight") and own.removesuffix(".weight") in self.transposed

    def modules_of(self, part: str) -> tuple[str, ...]:
        """Return the modules that make up a sub-block, "attention", "recurrent" or "mlp"; none that there is not."""
        recurrent = () if self.recurrent is None else self.recurrent.parts
        return {"attention": self.attention_parts, "recurrent": recurrent, "mlp": self.mlp_parts}[part]

    def marks_of(self, part: str) -> tuple[str, ...]:
        """Return modules of which a block has one where it has a sub-block: other parts may have the same modules."""
        recurrent = () if self.recurrent is None else (self.recurrent.output,)
        mlp = (self.mlp_consumer, "" if self.mixture is None else self.mixture.experts)
        return {"attention": (self.output,), "recurrent": recurrent, "mlp": tuple(filter(None, mlp))}[part]

    def multiples(self, config: PretrainedConfig, blocks: int) -> Sequence[int]:
        """Return the multiple of the config's width that the MLP of each block has in the stock class."""
        return self.wide(config) or (1,) * blocks

    def alike_beside_attention(self, config: PretrainedConfig, shapes: Sequence[BlockShape]) -> bool:
        """Return whether blocks of these shapes have one size of recurrent mixers, and of the MLPs of each kind."""
        if len({shape.recurrent for shape in shapes if shape.recurrent}) > 1:
            return False
        times = self.multiples(config, len(shapes))
        if any(shape.mlp_width % time for shape, time in zip(shapes, times, strict=True)):
            return False
        shapes = [replace(one, mlp_width=one.mlp_width // time) for one, time in zip(shapes, times, strict=True)]
        own = ([shape for shape in shapes if kind.describes(shape)] for kind in self.mlp_kinds)
        return all(len({(shape.mlp_width, shape.experts) for shape in same}) < 2 for same in own)

    def mixers_of(self, shape: BlockShape) -> tuple[str, ...]:
        """Return the modules that mix tokens in a block of a shape."""
        recurrent = (self.recurrent.module,) if self.recurrent is not None and shape.recurrent else ()
        return ((self.attention,) if shape.kv_heads else ()) + recurrent

    def scale_logits(self, config: PretrainedConfig, logits: Tensor) -> Tensor:
        """Return a model's logits from its head's output, by the same operations as the stock class."""
        names = (self.logits_divisor, self.logits_factor, self.logits_cap)
        divisor, factor, cap = (getattr(config, name) if name else None for name in names)
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        return logits if cap is None else (logits / cap).tanh() * cap

    def check_divisible(self, count: str, request: str, instead: str = "") -> None:
        """Raise InputError where a count of a block's shape cannot be lowered.

        `request` describes the request, and `instead` says what may be requested in its place.
        """
        if count in self.indivisible:
            raise InputError(
                f"{request}, but {self.model_type} models must keep all or none of them: {self.indivisible[count]}"
                f"{'; ' * bool(instead)}{instead}"
            )

    def check_kept(self, count: str, kept: int, request: str) -> None:
        """Raise InputError where a block cannot keep so many, more than zero, of a count of its shape."""
        self.check_divisible(count, request)
        multiple = 1 if self.mixture is None else self.mixture.multiple
        if count == "mlp_width" and kept % multiple:
            raise InputError(
                f"{request}, but the width of an expert must be a multiple of {multiple} for transformers' kernels: "
                f"set --width-multiple {multiple}"
            )

    def stage_of(self, path: str) -> int:
        """Return the position in the forward pass of a layer's input."""
        return next(index for index, stage in enumerate(self.stages) if path in stage)

    def layer_sizes(self, config: PretrainedConfig, heads: Heads, shape: BlockShape) -> dict[str, tuple[int, int]]:
        """Return the outputs and inputs of every linear layer in a block of a shape, zeros for removed layers."""
        hidden, heads = int(config.hidden_size), heads.of(shape)
        outputs: dict[str, int] = {}
        rows = (
            (self.query, heads.query_rows(shape.value_dim)),
            (self.key, heads.key_rows),
            (self.value, shape.value_dim),
        )
        for path, width in rows[: len(rows) - shape.lacking]:
            outputs[path] = outputs.get(path, 0) + shape.kv_heads * width  # one layer may make them all
        inputs, of_mlps = {self.output: shape.kv_heads * heads.group * shape.value_dim}, list[str]()
        for kind in (kind for kind in self.mlp_kinds if kind.describes(shape)):
            for consumer, width in kind.widths(config, shape).items():
                inputs[consumer] = width
                producers = kind.links((consumer,))[consumer]
                outputs |= dict.fromkeys(producers, width * kind.rows_of(consumer))
                of_mlps += [*producers, consumer]
        found = {path: (count, hidden) for path, count in outputs.items()}
        found |= {path: (hidden, count) for path, count in inputs.items()}
        if self.latent is not None and shape.kv_heads:
            found |= self.latent.sizes(config, outputs)
        if self.recurrent is not None and shape.recurrent:
            found |= self.recurrent.sizes(config, shape.recurrent)
        beside = {path: [int(getattr(config, name)) for name in names] for path, names in self.beside.items()}
        found |= {path: (out, of) for path, (out, of) in beside.items() if path in self.layers}
        # A dense shape may have more experts than a config that was pruned.
        every = dict.fromkeys((*self.layers, *of_mlps))
        return {path: found.get(path, (0, hidden)) for path in every}


def _with_root(name: str, before: str, after: str) -> str:
    """Return a name with another first word, where it has that of `before`; unchanged where either is empty."""
    return f"{after}{name.removeprefix(before)}" if before and after and name.startswith(f"{before}.") else name


def rows_of_heads(joined: str, heads: Heads, shape: BlockShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the queries [kv_heads, group dim], keys [kv_heads, dim] and values [kv_heads, value_dim].

    `joined` is "" for three layers, "parts" for one layer with all queries before all keys before all values, "heads"
    for one layer with one KV head after the other, and "kv" for a layer of queries and one with the keys and the values
    of one head after the other. The factors of a gated head are among the rows of its queries.
    """
    heads = heads.of(shape)
    widths = (heads.query_rows(shape.value_dim), heads.key_rows, shape.value_dim)
    head = torch.arange(shape.kv_heads, device=device)[:, None]
    before = [0, *accumulate(widths)]
    rows = []
    for width, start in zip(widths, before[:3], strict=True):
        stride, first = {
            "": (width, 0),
            "parts": (width, shape.kv_heads * start),
            "heads": (before[3], start),
            "kv": (before[3] - before[1], start - before[1]) if start else (width, 0),
        }[joined]
        rows.append(first + head * stride + torch.arange(width, device=device))
    query, key, value = rows
    return query, key, value


def rows_of_gates(heads: Heads, shape: BlockShape, device: torch.device) -> Tensor:
    """Return the rows of the query layer that make the factors of the value dimensions [kv_heads, value_dim, group]."""
    width = heads.dim + shape.value_dim
    first = heads.dim + torch.arange(shape.kv_heads * heads.group, device=device).view(-1, 1, heads.group) * width
    return first + torch.arange(shape.value_dim, device=device)[:, None]


def counts_of_heads(joined: str, heads: Heads, key_rows: int, output_columns: int) -> tuple[int, int]:
    """Return the KV heads and the value dimensions of each, from the sizes of the key layer and the output layer.

    Raises InputError where the layers hold less than one head of the config.
    """
    values = output_columns // heads.group
    rows, width = {"": (key_rows, heads.dim), "kv": (key_rows - values, heads.key_rows)}.get(
        joined, (key_rows - values, (heads.group + 1) * heads.dim)
    )
    kv_heads = rows // width
    if kv_heads < 1:
        raise InputError(
            f"the key layer has {key_rows} rows, less than one head of {heads.dim} dimensions: config.json describes "
            "other weights, copy it again from their source"
        )
    return kv_heads, values // kv_heads


def rope_types(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the scalings of a model's rotary embeddings by name; each kind of attention may have its own."""
    found = getattr(config, "rope_parameters", None) or {}
    each = list(found.values()) if found and all(isinstance(value, dict) for value in found.values()) else [found]
    return tuple(dict.fromkeys(one.get("rope_type", "default") for one in each))
