"""A transformers model seen as a row of decoder blocks with linear layers that can be read, written and narrowed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optprune.models.architecture import BlockShape, Classes
from optprune.models.digits import HALF, parameters_in
from optprune.models.mixture import join, keep_experts, only_experts, separate
from optprune.models.places import InFile, OnDevice, Place
from optprune.models.record import record_shapes
from optprune.models.registry import architecture_of
from optprune.models.shapes import head_counts, layer_sizes, linear_weights, mlp_counts
from optprune.models.store import BlockStore
from optprune.models.surgery import classes_of, keep_inputs, keep_outputs, put_parameters, set_classes
from optprune.models.turned import check_linear
from optprune.problems import Link


@dataclass(frozen=True, eq=False)
class LinkedLayers:
    """The layers of one block that share a choice of units, with the Link that says how."""

    consumer: str
    producers: tuple[str, ...]
    link: Link


class Decoder:
    """Access to the parts of a model that pruning reads and writes. Nothing is copied; writing changes the model.

    Experts are modules of their own, which share memory with the tensors that held them, until they are `joined`.

    The blocks of a skeleton come from a `store` and have values only while they are `resident`. Where it `computes_in`
    another dtype than the weights are stored in, a block is of that dtype while it is resident, and rounded then.
    """

    def __init__(
        self, model: PreTrainedModel, store: BlockStore | None = None, computes_in: torch.dtype | None = None
    ) -> None:
        self.model, self.store, self.computes_in = model, store, computes_in
        self.states: Place = OnDevice()
        """where hidden states are kept while no block needs them"""
        self.architecture = architecture_of(model.config)
        self.heads = self.architecture.heads(model.config)
        """the head layout of the stock class; a block may hold fewer KV heads, each with as many query heads"""
        self.blocks: nn.ModuleList = model.get_submodule(self.architecture.blocks)  # type: ignore[assignment]
        if self.architecture.mixture is not None:
            for block in self.blocks:
                separate(block, self.architecture.mixture)
        for index in range(len(self.blocks)):
            for path in self.paths(index):
                check_linear(self.layer(index, path), path, turned=path in self.architecture.transposed)

    def precise(self) -> "Decoder":
        """Access to the same model in float32 where it is in half precision: for gradients and small differences."""
        wider = self.model.dtype in HALF and self.computes_in is None
        return self._computing_in(torch.float32) if wider else self

    def as_stored(self) -> "Decoder":
        """Access to the same model in the dtype that it has."""
        return self._computing_in(None)

    def _computing_in(self, dtype: torch.dtype | None) -> "Decoder":
        other = Decoder(self.model, self.store, dtype)
        other.states = self.states
        return other

    def name(self, block: int, path: str) -> str:
        """The full name of a layer, as in the checkpoint."""
        return f"{self.block_name(block)}.{path}"

    def block_name(self, block: int) -> str:
        """The full name of a block, as in the checkpoint."""
        return f"{self.architecture.blocks}.{block}"

    def layer(self, block: int, path: str) -> nn.Linear:
        """One linear layer; its weight is [out, in]."""
        return self.blocks[block].get_submodule(path)  # type: ignore[return-value]

    @contextmanager
    def resident(self, index: int, *, keep: bool = False) -> Iterator[nn.Module]:
        """A block in memory for as long as the context lasts, which every block of a model without a store is.

        With `keep` what became of it is what a later context has; else that is as if it had never been.
        """
        block = self.blocks[index]
        present = nullcontext() if self.store is None else self.store.resident(block, keep)
        with present, parameters_in(self.computes_in, block):
            yield block

    @property
    def aside(self) -> Place:
        """Where tensors are kept that nobody needs for a while: in a file where blocks are read from files."""
        return self.states if self.store is None or isinstance(self.states, InFile) else self.store.aside

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the model can be run as a whole: each block is in memory while it runs."""
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
        """The logits [..., vocabulary] of what leaves the last block [..., hidden]."""
        for module in self.after_blocks():
            hidden = module(hidden)
        return self.architecture.answer(self.model.config, hidden)

    def after_blocks(self) -> list[nn.Module]:
        """What hidden states go through behind the last block, one after the other, to the head."""
        places = [path.rpartition(".") for path in self.architecture.after_blocks]
        found = [getattr(self.model.get_submodule(parent), name) for parent, _, name in places]
        return [module for module in (*found, self.model.get_output_embeddings()) if module is not None]

    def weights(self, block: int) -> dict[str, Tensor]:
        """A block's parameters by their names inside it, as they are stored: copies only if need be."""
        return {name: self.rounded(weight.detach()) for name, weight in self.blocks[block].named_parameters()}

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight with the digits that will be stored of it."""
        return weight if self.computes_in is None else weight.to(self.model.dtype)

    def paths(self, block: int) -> tuple[str, ...]:
        """The linear layers that a block has, in the order of the forward pass."""
        return tuple(path for path in self.architecture.layers if self._has(block, path))

    def linear_weights(self) -> int:
        """The number of weights in the decoder blocks' linear layers, which sparsity is counted over."""
        return sum(
            self.layer(block, path).weight.numel() for block in range(len(self.blocks)) for path in self.paths(block)
        )

    # -- shapes

    def shape(self, block: int) -> BlockShape:
        """What a block holds."""
        architecture = self.architecture
        there = self.blocks[block]
        width, experts = mlp_counts(architecture, there) if self._has_part(block, "mlp") else (0, 0)
        heads = head_counts(architecture, self.heads, there) if self._has_part(block, "attention") else (0, 0)
        return BlockShape(width, *heads, experts)

    def shapes(self) -> tuple[BlockShape, ...]:
        """What every block holds."""
        return tuple(self.shape(block) for block in range(len(self.blocks)))

    def weights_of(self, shape: BlockShape) -> int:
        """The linear weights of a block of this shape."""
        return linear_weights(self.architecture, self.model.config, self.heads, shape)

    @property
    def experts_for_a_token(self) -> int:
        """How many experts a router chooses for a token; none without a router."""
        mixture = self.architecture.mixture
        return 0 if mixture is None else int(getattr(self.model.config, mixture.chosen))

    def layer_sizes(self, shape: BlockShape) -> dict[str, tuple[int, int]]:
        """The outputs and inputs of every linear layer in a block of this shape, zeros where it is not there."""
        return layer_sizes(self.architecture, self.model.config, self.heads, shape)

    def _has(self, block: int, path: str) -> bool:
        module: nn.Module | None = self.blocks[block]
        for name in path.split("."):
            module = None if module is None else module._modules.get(name)
        return module is not None

    def _has_part(self, block: int, part: str) -> bool:
        return all(self._has(block, module) for module in self.architecture.modules_of(part))

    # -- units

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
        self.take_classes(self.architecture.pruned, block)

    def keep_experts(self, block: int, kept: Tensor) -> None:
        """Delete the experts of a block outside a mask [experts], and the rows of the router that choose them."""
        assert self.architecture.mixture is not None
        keep_experts(self.blocks[block], self.architecture.mixture, kept)

    def only_experts(self, block: int, kept: Tensor) -> AbstractContextManager[None]:
        """A block with the experts of a mask [experts] alone, for as long as the context lasts."""
        assert self.architecture.mixture is not None
        return only_experts(self.blocks[block], self.architecture.mixture, kept)

    def joined(self) -> PreTrainedModel:
        """The model as the classes of transformers hold it, whose experts are no modules; then this is done with it.

        With a store the experts stay modules, as its files name them.
        """
        if self.architecture.mixture is not None and self.store is None:
            for block in self.blocks:
                join(block, self.architecture.mixture)
        return self.model

    def remove(self, block: int, part: str) -> None:
        """Remove a whole sub-block, "attention" or "mlp", with its norm: the hidden states pass it by."""
        for name in self.architecture.modules_of(part):
            self.blocks[block]._modules[name] = None
        self.take_classes(self.architecture.pruned, block)

    def put(self, block: int, shape: BlockShape, weights: Mapping[str, Tensor]) -> None:
        """Let a block be what a run made of it: of this shape, with these parameters by their names inside it."""
        before = self.shape(block)
        for part in before.parts:
            if part not in shape.parts:
                self.remove(block, part)
        if shape.experts < self.shape(block).experts:
            self.keep_experts(block, torch.arange(before.experts) < shape.experts)
        wide = {name: weight.to(self.computes_in or weight.dtype) for name, weight in weights.items()}
        put_parameters(self.blocks[block], wide)
        if shape != before:
            self.take_classes(self.architecture.pruned, block)

    @contextmanager
    def without(self, parts: Iterable[tuple[int, str]]) -> Iterator[None]:
        """The model without some sub-blocks (block, part), for as long as the context lasts."""
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
        """The model with only these units of a block, for as long as the context lasts."""
        linear = [self.layer(block, path) for path in (layers.consumer, *layers.producers)]
        before = [(layer, dict(layer._parameters), layer.in_features, layer.out_features) for layer in linear]
        classes = classes_of(self.blocks[block])
        try:
            self.keep_units(block, layers, choice)
            yield
        finally:
            for layer, parameters, inputs, outputs in before:
                layer._parameters.update(parameters)
                layer.in_features, layer.out_features = inputs, outputs
            set_classes(classes)

    # -- what the classes and the config must say

    def record_shapes(self) -> None:
        """Make the model's classes and config say what the blocks hold, so that a saved folder says it too.

        Blocks that hold nothing are dropped. The model is of its stock class where that can hold the shapes, and is
        `joined`.
        """
        record_shapes(self)
        self.joined()

    def take_classes(self, classes: Classes | None, block: int) -> None:
        """Let a block be of these classes: their state is the same, only forward differs."""
        if classes is None:
            return
        module = self.blocks[block]
        module.__class__ = classes.block
        if self._has_part(block, "attention"):
            module.get_submodule(self.architecture.attention).__class__ = classes.attention

    def drop_blocks(self, kept: Sequence[int]) -> None:
        """Leave only these blocks."""
        parent, _, name = self.architecture.blocks.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(self.blocks[index] for index in kept))
        self.blocks = self.model.get_submodule(self.architecture.blocks)  # type: ignore[assignment]
