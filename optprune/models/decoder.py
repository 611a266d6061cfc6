"""Decoder blocks of a transformers model, whose linear layers can be read, written and narrowed."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optprune.errors import InputError, check_kind
from optprune.models.architecture import GATED, KEPT_PAIRS, BlockShape, Classes, counts_of_heads
from optprune.models.images import ImageFeatures
from optprune.models.mixture import SeparateExperts, experts_in, join, keep_experts, only_experts, separate
from optprune.models.places import InFile, OnDevice, Place
from optprune.models.registry import architecture_of, is_stock
from optprune.models.store import BlockStore
from optprune.models.surgery import (
    HALF,
    as_buffers,
    as_parameters,
    check_linear,
    classes_of,
    keep_entries,
    keep_inputs,
    keep_outputs,
    keep_pairs,
    numbers_of,
    parameters_in,
    put_parameters,
    set_classes,
)
from optprune.models.uneven import uneven
from optprune.models.vision import SHAPES
from optprune.numerics.tensors import as_indices
from optprune.problems import Channels


@dataclass(frozen=True, eq=False)
class LinkedLayers:
    """Layers of one block that share a choice of units, with the columns and rows of each unit.

    Where units are rows of all layers (`by_rows`), the columns are the rows of the first one, the consumer.
    """

    consumer: str
    producers: tuple[str, ...]
    channels: Channels
    """the columns [units, n] of the consumer and the slot of each unit"""
    rows: tuple[Tensor, ...]
    """the rows [units, n] of each producer, with their biases, that go with the units"""
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    """the entries [units, n] of vectors that go with the units, by the names of these parameters in the block"""
    by_rows: bool = False

    def __post_init__(self) -> None:
        every = tuple(
            as_indices("the rows of units", rows, ("units", "rows"), self.channels.columns) for rows in self.rows
        )
        object.__setattr__(self, "rows", every)
        if len(every) != len(self.producers):
            raise InputError(f"{len(self.producers)} layers have rows of {len(every)}: give those of each layer")
        for path, rows in zip(self.producers, every, strict=True):
            if len(rows) != self.channels.units:
                raise InputError(f"{self.channels.units} units have {len(rows)} rows in {path}: give one for each unit")


class Decoder:
    """The parts of a model that pruning reads and writes. Nothing is copied; writing changes the model.

    Experts are modules of their own, which share memory with the tensors of the stock class, until `joined` is called.

    The blocks of a skeleton come from a `store` and have values only while they are `resident`. Where `computes_in`
    differs from the dtype of the stored weights, a resident block has that dtype, and is rounded at the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: BlockStore | None = None,
        computes_in: torch.dtype | None = None,
        images: ImageFeatures | None = None,
    ) -> None:
        remedy = "give a model of transformers, and merge adapters first, e.g. by merge_and_unload()"
        check_kind("the model", model, PreTrainedModel, remedy)
        self.model, self.store, self.computes_in = model, store, computes_in
        self.states: Place = OnDevice()
        """the place of hidden states while no block needs them"""
        self.images = images
        """the features of images, which token ids behind the vocabulary are numbers of"""
        self.architecture = architecture_of(model.config)
        self.heads = self.architecture.heads(model.config)
        """the head layout of the stock class; a block may hold fewer KV heads, each with as many query heads"""
        try:
            self.blocks: nn.ModuleList = model.get_submodule(self.architecture.blocks)  # type: ignore[assignment]
        except AttributeError as error:
            raise InputError(
                f"the model, a {type(model).__name__}, has no blocks at {self.architecture.blocks}: give the whole "
                "model, with its head"
            ) from error
        if self.architecture.mixture is not None:
            for block in self.blocks:
                separate(block, self.architecture.mixture)
        for block in self.blocks:
            as_parameters(block, self.architecture.buffers)
        for index in range(len(self.blocks)):
            for path in self.paths(index):
                check_linear(self.layer(index, path), path, path in self.architecture.transposed)

    def precise(self) -> "Decoder":
        """Return a decoder of the same model that computes in float32 where the weights are in half precision."""
        wider = self.model.dtype in HALF and self.computes_in is None
        return self._computing_in(torch.float32) if wider else self

    def as_stored(self) -> "Decoder":
        """Return a decoder of the same model that computes in the dtype of its weights."""
        return self._computing_in(None)

    def _computing_in(self, dtype: torch.dtype | None) -> "Decoder":
        other = Decoder(self.model, self.store, dtype, self.images)
        other.states = self.states
        return other

    def name(self, block: int, path: str) -> str:
        """Return the full name of a layer, as in the checkpoint."""
        return f"{self.block_name(block)}.{path}"

    def block_name(self, block: int) -> str:
        """Return the full name of a block, as in the checkpoint."""
        return f"{self.architecture.blocks}.{block}"

    def layer(self, block: int, path: str) -> nn.Linear:
        """Return one linear layer; its weight is [out, in]."""
        return self.blocks[block].get_submodule(path)  # type: ignore[return-value]

    @contextmanager
    def resident(self, index: int, *, keep: bool = False) -> Iterator[nn.Module]:
        """Hold a block in memory within the context; without a store every block is in memory anyway.

        With `keep` the changes made to it last; without, a block from a store is read again the next time.
        """
        block = self.blocks[index]
        present = nullcontext() if self.store is None else self.store.resident(block, keep)
        with present, parameters_in(self.computes_in, block):
            yield block

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Return the arguments of the model for token ids [batch, length], which may be numbers of images too."""
        return {"input_ids": ids} if self.images is None else self.images.inputs(self.model, ids)

    def form(self, ids: Tensor) -> Hashable:
        """Return all of a batch of token ids that decides the arguments of the blocks beside hidden states."""
        return ids.shape if self.images is None else self.images.form(ids)

    def arguments(self, ids: Tensor, hidden: Tensor, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the arguments of each block for token ids, from those for a text; `hidden` enters the first."""
        return blocks if self.images is None else self.images.arguments(ids, hidden, blocks)

    @contextmanager
    def embeddings_in_dtype(self) -> Iterator[None]:
        """Let the modules before the blocks give the blocks' inputs in the dtype of `computes_in` within the context.

        Rows of an embedding are looked up in their own dtype and then converted: the numbers are the same.
        """
        dtype, model = self.computes_in, self.model
        others = {*self.blocks.modules(), model.get_output_embeddings()}
        leaves = [each for each in model.modules() if each not in others and not any(each.children())]
        with ExitStack() as hooks:
            for module in leaves if dtype is not None else ():
                if isinstance(module, nn.Embedding):
                    hooks.callback(module.register_forward_hook(lambda _, __, rows: rows.to(dtype)).remove)
            with parameters_in(dtype, *(each for each in leaves if not isinstance(each, nn.Embedding))):
                yield

    def head_in_dtype(self) -> AbstractContextManager[None]:
        """Let the modules behind the blocks compute in the dtype of `computes_in` within the context."""
        return parameters_in(self.computes_in, *self.after_blocks())

    @property
    def offload(self) -> Place:
        """The place of tensors that are not needed for a while: a file where blocks are read from files."""
        return self.states if self.store is None or isinstance(self.states, InFile) else self.store.offload

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the whole model run within the context: each block is in memory while it runs."""
        if self.store is None:
            yield
            return
        with ExitStack() as handles, ExitStack() as present:

            def enter(block: nn.Module, _: tuple[Any, ...]) -> None:
                present.enter_context(self.resident(places[block]))

            places = {block: index for index, block in enumerate(self.blocks)}
            for block in self.blocks:
                handles.callback(block.register_forward_pre_hook(enter).remove)
                handles.callback(block.register_forward_hook(lambda *_: present.close()).remove)
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocabulary] for outputs of the last block [..., hidden]."""
        hidden = hidden[..., : self.model.config.hidden_size]  # without what goes from block to block beside them
        for module in self.after_blocks():
            hidden = module(hidden)
        return self.architecture.scale_logits(self.model.config, hidden)

    def after_blocks(self) -> list[nn.Module]:
        """Return the modules behind the last block in their order, the head at the end."""
        places = [path.rpartition(".") for path in self.architecture.after_blocks]
        found = [getattr(self.model.get_submodule(parent), name) for parent, _, name in places]
        return [module for module in (*found, self.model.get_output_embeddings()) if module is not None]

    def weights(self, block: int) -> dict[str, Tensor]:
        """Return a block's parameters by their names inside it, in the stored dtype: copies only if need be."""
        exact = self.architecture.float32
        parameters = {name: weight.detach() for name, weight in self.blocks[block].named_parameters()}
        return {name: weight if name in exact else self.rounded(weight) for name, weight in parameters.items()}

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a weight in the dtype that it is stored in."""
        return weight if self.computes_in is None or not weight.is_floating_point() else weight.to(self.model.dtype)

    def paths(self, block: int) -> tuple[str, ...]:
        """Return the linear layers that a block has, in the order of the forward pass."""
        return tuple(path for path in self.architecture.layers if self._has(block, path))

    def recoverable(self, block: int) -> dict[str, tuple[str, ...]]:
        """Return the sub-modules of a block whose output is affine in some of its layers, each with these."""
        there = set(self.paths(block))
        return {part: layers for part, layers in self.architecture.recoverable if there.issuperset(layers)}

    def linear_weights(self) -> int:
        """Return the number of weights in the decoder blocks' linear layers, which sparsity is counted over."""
        return sum(
            self.layer(block, path).weight.numel() for block in range(len(self.blocks)) for path in self.paths(block)
        )

    # -- shapes

    def shape(self, block: int) -> BlockShape:
        """Return the sizes of a block."""
        width, experts = self._mlp_counts(block) if self._has_part(block, "mlp") else (0, 0)
        attention, mixer = self._has_part(block, "attention"), self.architecture.recurrent
        heads = self._head_counts(block) if attention else (0, 0)
        recurrent = 0
        if mixer is not None and self._has_part(block, "recurrent"):
            recurrent = mixer.heads_of(self.model.config, self.layer(block, mixer.output).in_features)
        made = {self.architecture.key, self.architecture.value}
        lacking = sum(not self._has(block, path) for path in made) if attention else 0
        pairs = self.kept_pairs(block)
        return BlockShape(width, *heads, experts, recurrent, lacking, 0 if pairs is None else pairs.shape[1])

    def kept_pairs(self, block: int) -> Tensor | None:
        """Return the rotary pairs [kv_heads, pairs] that the heads of a block keep; None where they keep all."""
        place = self.architecture.attention
        return self.blocks[block].get_submodule(place)._parameters.get(KEPT_PAIRS) if self._has(block, place) else None

    def _mlp_counts(self, block: int) -> tuple[int, int]:
        """Return the units of a block's MLP, or of each expert, and the number of experts (zero for one MLP)."""
        architecture = self.architecture
        mixture = architecture.mixture
        experts = None if mixture is None else experts_in(self.blocks[block], mixture)
        if experts is None:
            return self.layer(block, architecture.mlp_consumer).in_features, 0
        assert isinstance(experts, SeparateExperts)
        first: Any = experts["0"].get_submodule(GATED[2])
        return first.in_features, experts.count

    def _head_counts(self, block: int) -> tuple[int, int]:
        """Return the KV heads of a block's attention, and the value dimensions of each."""
        names = self.architecture
        if self.heads.by_block:
            attention: Any = self.blocks[block].get_submodule(names.attention)
            dim = self.layer(block, names.output).in_features // self.heads.query
            return self.heads.query // attention.num_key_value_groups, dim
        keys, output, pairs = self.layer(block, names.key), self.layer(block, names.output), self.kept_pairs(block)
        if pairs is not None:
            return len(pairs), output.in_features // (len(pairs) * self.heads.group)
        return counts_of_heads(names.joined, self.heads, keys.out_features, output.in_features)

    def handed_on(self) -> frozenset[int]:
        """Return the numbers of the blocks whose attention hands on its keys and values."""
        shared, place = self.architecture.shared, self.architecture.attention
        having = [index for index, shape in enumerate(self.shapes()) if shape.kv_heads and shared is not None]
        return frozenset(
            index for index in having if shared is not None and shared.writes(self.blocks[index].get_submodule(place))
        )

    def shapes(self) -> tuple[BlockShape, ...]:
        """Return the sizes of every block."""
        return tuple(self.shape(block) for block in range(len(self.blocks)))

    def weights_of(self, shape: BlockShape) -> int:
        """Return the number of linear weights in a block of a shape."""
        return sum(outputs * inputs for outputs, inputs in self.layer_sizes(shape).values())

    @property
    def experts_for_a_token(self) -> int:
        """The number of experts that a router chooses for a token; zero without a router."""
        mixture = self.architecture.mixture
        return 0 if mixture is None else int(getattr(self.model.config, mixture.chosen))

    def layer_sizes(self, shape: BlockShape) -> dict[str, tuple[int, int]]:
        """Return the outputs and inputs of every linear layer in a block of a shape, zeros for removed layers."""
        return self.architecture.layer_sizes(self.model.config, self.heads, shape)

    def _has(self, block: int, path: str) -> bool:
        module: nn.Module | None = self.blocks[block]
        for name in path.split("."):
            module = None if module is None else module._modules.get(name)
        return module is not None

    def _has_part(self, block: int, part: str) -> bool:
        names = self.architecture
        whole = all(self._has(block, module) for module in names.modules_of(part))
        return whole and any(self._has(block, module) for module in names.marks_of(part))

    # -- units

    def keep_units(self, block: int, layers: LinkedLayers, choice: Tensor) -> None:
        """Delete the columns and rows of all other units; `choice` is a bool mask over the units."""
        channels = layers.channels
        consumer = self.layer(block, layers.consumer)
        if layers.by_rows:
            self._list_pairs(block)
            keep_outputs(consumer, channels.column_mask(choice, consumer.out_features)[0])
        else:
            keep_inputs(consumer, channels.column_mask(choice, consumer.in_features)[0])
        for path, rows in zip(layers.producers, layers.rows, strict=True):
            producer = self.layer(block, path)
            mask = torch.ones(producer.out_features, dtype=torch.bool, device=rows.device)
            mask[rows[~choice].reshape(-1)] = False
            keep_outputs(producer, mask)
        for name, entries in layers.vectors.items():
            keep = keep_pairs if name == self.architecture.kept_pairs else keep_entries
            keep(self.blocks[block], name, entries[choice].reshape(-1).sort().values)
        mixer = self.architecture.recurrent
        if mixer is not None and layers.consumer == mixer.output:
            self._fit_mixer(block)
        self.take_classes(self.architecture.pruned, block)

    def _list_pairs(self, block: int) -> None:
        """Give the attention of a block the list of its rotary pairs, if it has none: all of every KV head."""
        if self.kept_pairs(block) is None:
            every = torch.arange(self.heads.dim // 2, device=self.layer(block, self.architecture.key).weight.device)
            pairs = every.repeat(self.shape(block).kv_heads, 1)
            put_parameters(self.blocks[block], {self.architecture.kept_pairs: pairs})

    def _fit_mixer(self, block: int) -> None:
        """Give the recurrent mixer of a block, if it has one, the sizes that its class holds beside the weights."""
        mixer, heads = self.architecture.recurrent, self.shape(block).recurrent
        if mixer is not None and heads:
            mixer.fit(self.blocks[block].get_submodule(mixer.module), self.model.config, heads)

    def keep_experts(self, block: int, kept: Tensor) -> None:
        """Delete the experts of a block outside a mask [experts], and the rows of the router that choose them."""
        assert self.architecture.mixture is not None
        keep_experts(self.blocks[block], self.architecture.mixture, kept)

    def only_experts(self, block: int, kept: Tensor) -> AbstractContextManager[None]:
        """Leave a block only the experts of a mask [experts] within the context."""
        assert self.architecture.mixture is not None
        return only_experts(self.blocks[block], self.architecture.mixture, kept)

    def joined(self) -> PreTrainedModel:
        """Return the model with the modules and buffers of the stock class; this decoder ends then.

        With a store the experts stay modules, as its files name them.
        """
        for block in self.blocks if self.store is None else ():
            if self.architecture.mixture is not None:
                join(block, self.architecture.mixture)
            as_buffers(block, self.architecture.buffers)
        return self.model

    def remove(self, block: int, part: str) -> None:
        """Remove a whole sub-block, "attention", "recurrent" or "mlp", with its norm: the hidden states skip it.

        A norm that another sub-block reads too stays. Nothing changes where the block has no such sub-block.
        """
        if not self._has_part(block, part):
            return
        others = [self.architecture.modules_of(other) for other in self.shape(block).parts if other != part]
        for name in self.architecture.modules_of(part):
            if not any(name in modules for modules in others):
                self.blocks[block]._modules[name] = None
        self.take_classes(self.architecture.pruned, block)

    def put(self, block: int, shape: BlockShape, weights: Mapping[str, Tensor]) -> None:
        """Load a pruned block: its shape, and its parameters by their names inside it."""
        before = self.shape(block)
        for part in before.parts:
            if part not in shape.parts:
                self.remove(block, part)
        if shape.experts < self.shape(block).experts:
            self.keep_experts(block, torch.arange(before.experts) < shape.experts)
        computed = self.computes_in
        wide = {
            name: weight.to(computed) if computed and weight.is_floating_point() else weight
            for name, weight in weights.items()
        }
        put_parameters(self.blocks[block], wide)
        self._fit_mixer(block)
        if shape != before:
            self.take_classes(self.architecture.pruned, block)

    @contextmanager
    def without(self, parts: Iterable[tuple[int, str]]) -> Iterator[None]:
        """Remove some sub-blocks (block, part) from the model within the context."""
        taken: list[tuple[nn.Module, dict[str, nn.Module | None], list[tuple[nn.Module, type]]]] = []
        try:
            for block, part in parts:
                module = self.blocks[block]
                taken.append((module, dict(module._modules), classes_of(module)))
                self.remove(block, part)
            yield
        finally:
            for module, before, classes in reversed(taken):
                module._modules.update(before)
                set_classes(classes)

    @contextmanager
    def narrowed(self, block: int, layers: LinkedLayers, choice: Tensor) -> Iterator[None]:
        """Leave a block of the model only these units within the context."""
        own = self.blocks[block]
        paths = (layers.consumer, *layers.producers, *(name.rpartition(".")[0] for name in layers.vectors))
        places = [own.get_submodule(path) for path in dict.fromkeys(paths)]
        before = [(place, dict(place._parameters), numbers_of(place)) for place in places]
        classes = classes_of(own)
        try:
            self.keep_units(block, layers, choice)
            yield
        finally:
            for place, parameters, numbers in before:
                place._parameters.clear()
                place._parameters.update(parameters)
                vars(place).update(numbers)
            set_classes(classes)

    # -- classes and config

    def record_shapes(self) -> None:
        """Write the blocks' shapes into the model's classes and config, so that a saved folder has them too.

        Empty blocks are dropped. The model gets its stock class where that can hold the shapes, and is `joined`.
        """
        self._drop_empty_blocks()
        architecture, config, shapes = self.architecture, self.model.config, self.shapes()
        if not any(shape.kv_heads for shape in shapes):
            raise InputError("no block has attention left: lower the sparsity")
        every = list(zip(shapes, architecture.multiples(config, len(shapes)), strict=True))
        for kind in architecture.mlp_kinds:
            widths = [-(-shape.mlp_width // times) for shape, times in every if kind.describes(shape)]
            if widths or len(architecture.mlp_kinds) == 1:
                kind.record_widths(config, widths)
        self._record_experts(shapes)
        stock = not uneven(architecture, config, shapes)
        for block in range(len(self.blocks)):
            self.take_classes(architecture.stock if stock else architecture.pruned, block)
        if stock:
            self._record_stock(shapes)
        else:
            self._record_pruned(shapes)
        self.joined()

    def _record_pruned(self, shapes: Sequence[BlockShape]) -> None:
        """Give the model the pruned classes of its family, and list the shapes in the config."""
        classes, config = self.architecture.pruned, self.model.config
        if classes is None or self.architecture.alike:
            family, alike = self.architecture.model_type, self.architecture.alike
            raise InputError(f"the blocks of a {family} model must have one shape {alike}: use a uniform allocation")
        config.__class__, self.model.__class__ = classes.config, classes.model
        vars(config).pop("auto_map", None)  # the classes of another library; saving names those of optprune
        setattr(config, SHAPES, [shape.counts() for shape in shapes])
        self.model.number_caches()  # type: ignore[operator]  # the pruned classes have it

    def _record_stock(self, shapes: Sequence[BlockShape]) -> None:
        """Give the model the stock classes of its family, and write the sizes of its blocks, all alike."""
        architecture, config = self.architecture, self.model.config
        first = next(shape for shape in shapes if shape.kv_heads)
        if architecture.stock is not None and not is_stock(config):
            config.__class__, self.model.__class__ = architecture.stock.config, architecture.stock.model
            for name in (SHAPES, "auto_map"):
                vars(config).pop(name, None)
        if first.kv_heads < self.heads.kv and not self.heads.by_block:
            config.head_dim = self.heads.dim
            config.num_key_value_heads = first.kv_heads
            config.num_attention_heads = first.kv_heads * self.heads.group
            self.heads = architecture.heads(config)
        mixer, recurrent = architecture.recurrent, max(shape.recurrent for shape in shapes)
        if mixer is not None and recurrent:
            mixer.record(config, recurrent)
        for index, block in enumerate(self.blocks):
            for mixer in architecture.mixers_of(shapes[index]):
                block.get_submodule(mixer).layer_idx = index  # type: ignore[assignment]
            if shapes[index].mlp_width and not shapes[index].experts:
                mlp = block.get_submodule(architecture.mlp_consumer.rpartition(".")[0])
                if architecture.mlp_width in vars(mlp):
                    setattr(mlp, architecture.mlp_width, shapes[index].mlp_width)

    def _record_experts(self, shapes: Sequence[BlockShape]) -> None:
        """Write the number of experts into the config and the model, whose balancing loss uses its own copy."""
        mixture, most = self.architecture.mixture, max(shape.experts for shape in shapes)
        if mixture is not None and most:
            setattr(self.model.config, mixture.count, most)
            vars(self.model)["num_experts"] = most

    def take_classes(self, classes: Classes | None, block: int) -> None:
        """Give a block these classes: their state is the same, only forward differs."""
        if classes is None:
            return
        module = self.blocks[block]
        module.__class__ = classes.block
        if self._has_part(block, "attention"):
            module.get_submodule(self.architecture.attention).__class__ = classes.attention

    def _drop_empty_blocks(self) -> None:
        kept = [index for index, shape in enumerate(self.shapes()) if shape.parts or self.architecture.stays]
        if len(kept) == len(self.blocks):
            return
        if self.architecture.ordered:
            raise InputError(f"nothing is left of a block that cannot be removed, because {self.architecture.ordered}")
        parent, _, name = self.architecture.blocks.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(self.blocks[index] for index in kept))
        self.blocks = self.model.get_submodule(self.architecture.blocks)  # type: ignore[assignment]
        config = self.model.config
        config.num_hidden_layers = len(kept)
        for name in self.architecture.leading:
            setattr(config, name, sum(index < getattr(config, name) for index in kept))
        for name in self.architecture.by_block:
            if getattr(config, name, None):
                setattr(config, name, [getattr(config, name)[index] for index in kept])
        for name in self.architecture.numbers:
            if getattr(config, name, None):
                listed = set(getattr(config, name))
                setattr(config, name, [number for number, index in enumerate(kept) if index in listed])
