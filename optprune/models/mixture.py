"""Experts as modules of three linear layers each, and as the two tensors of the stock classes of transformers 5.

The stock classes hold the experts of a block in gate_up_proj [experts, 2 width, hidden], with the rows of the gate
first, and down_proj [experts, hidden, width]. Checkpoints hold three matrices for each expert, under the names that the
modules here have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optprune.models.architecture import GATED, Mixture

GATE, UP, DOWN = GATED
FUSED, LAST = "gate_up_proj", "down_proj"


class Expert(nn.Module):
    """One expert: a gated MLP."""

    def __init__(self, matrices: dict[str, Tensor], trained: bool) -> None:
        super().__init__()
        for name, matrix in matrices.items():
            outputs, inputs = matrix.shape
            layer = nn.Linear(inputs, outputs, bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, trained)
            self.add_module(name, layer)


class SeparateExperts(nn.ModuleDict):
    """The experts of a block by number; it is called with the same arguments as the stock module."""

    def __init__(self, stock: nn.Module) -> None:
        """Take the experts out of a stock module, whose tensors they share; that module is empty until `joined`."""
        super().__init__()
        fused, last = stock.get_parameter(FUSED), stock.get_parameter(LAST)
        for number, (both, down) in enumerate(zip(fused.detach(), last.detach(), strict=True)):
            gate, up = both.chunk(2)
            self[str(number)] = Expert({GATE: gate, UP: up, DOWN: down}, fused.requires_grad)
        stock._parameters.update({FUSED: None, LAST: None})
        self._stock: list[Any] = [stock]  # in a list, so that it is not a sub-module
        self.train(stock.training)

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(self)

    def outputs(self, hidden_states: Tensor, number: int) -> Tensor:
        """Return the output of an expert [tokens, hidden] for these tokens [tokens, hidden]."""
        return self._layer(number, DOWN)(self.inner(hidden_states, number))

    def inner(self, tokens: Tensor, number: int) -> Tensor:
        """Return the inputs of an expert's last layer [tokens, width] for these tokens [tokens, hidden]."""
        activation = self._stock[0].act_fn
        return activation(self._layer(number, GATE)(tokens)) * self._layer(number, UP)(tokens)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum [tokens, hidden] of the outputs of each token's experts [tokens, k].

        Experts without tokens are called too, with an empty batch, so that hooks on their layers run for all of them.
        """
        routed = [torch.where(top_k_index == number) for number in range(self.count)]
        inner = [self.inner(hidden_states[tokens], number) for number, (tokens, _) in enumerate(routed)]
        total = torch.zeros_like(hidden_states)
        for number, (tokens, places) in enumerate(routed):
            output = self._layer(number, DOWN)(inner[number]) * top_k_weights[tokens, places, None]
            total = total.index_add(0, tokens, output.to(total.dtype))
        return total

    def keep(self, kept: Tensor) -> None:
        """Keep only the experts of a mask [experts], and renumber them."""
        experts = [self[str(number)] for number in kept.nonzero()[:, 0].tolist()]
        self.clear()
        self.update({str(number): expert for number, expert in enumerate(experts)})

    def joined(self) -> nn.Module:
        """Return the stock module, filled with the experts as they are now."""
        stock, numbers = self._stock[0], range(self.count)
        fused = torch.stack([torch.cat([self._matrix(number, name) for name in (GATE, UP)]) for number in numbers])
        last = torch.stack([self._matrix(number, DOWN) for number in numbers])
        trained = next(self.parameters()).requires_grad
        stock._parameters.update({FUSED: nn.Parameter(fused, trained), LAST: nn.Parameter(last, trained)})
        stock.num_experts, stock.intermediate_dim = self.count, last.shape[2]
        return stock.train(self.training)

    def _layer(self, number: int, name: str) -> nn.Module:
        return self[str(number)].get_submodule(name)

    def _matrix(self, number: int, name: str) -> Tensor:
        return self._layer(number, name).get_parameter("weight").detach()


def separate(block: nn.Module, mixture: Mixture) -> None:
    """Make the experts of a block separate modules that share memory with the stock tensors, if they are not yet.

    The router's correction, a buffer of the stock class, is a parameter until they are joined.
    """
    experts = experts_in(block, mixture)
    if experts is not None and not isinstance(experts, SeparateExperts):
        block.set_submodule(mixture.experts, SeparateExperts(experts))
        router, name = block.get_submodule(mixture.router), mixture.correction
        if name:  # a parameter meanwhile, so that all that reads and writes those of a block does this one too
            correction = router.get_buffer(name)
            del router._buffers[name]
            router.register_parameter(name, nn.Parameter(correction, requires_grad=False))


def join(block: nn.Module, mixture: Mixture) -> None:
    """Put the experts of a block, as they are now, back into the stock module."""
    experts = experts_in(block, mixture)
    if isinstance(experts, SeparateExperts):
        block.set_submodule(mixture.experts, experts.joined())
        router, name = block.get_submodule(mixture.router), mixture.correction
        if name:
            correction = router.get_parameter(name).detach()
            del router._parameters[name]
            router.register_buffer(name, correction)


def keep_experts(block: nn.Module, mixture: Mixture, kept: Tensor) -> None:
    """Delete the experts outside a mask [experts], and the rows of the router that choose them, in place."""
    experts, router = experts_in(block, mixture), block.get_submodule(mixture.router)
    assert isinstance(experts, SeparateExperts)
    experts.keep(kept)
    for name, rows in _rows(router, mixture).items():
        router._parameters[name] = nn.Parameter(rows.detach()[kept.to(rows.device)].contiguous(), rows.requires_grad)
    router.num_experts = experts.count  # type: ignore[assignment]  # a number of the stock router's


@contextmanager
def only_experts(block: nn.Module, mixture: Mixture, kept: Tensor) -> Iterator[None]:
    """Leave a block only the experts of a mask [experts] within the context."""
    experts, router = experts_in(block, mixture), block.get_submodule(mixture.router)
    assert isinstance(experts, SeparateExperts)
    modules, rows, count = dict(experts.items()), _rows(router, mixture), experts.count
    try:
        keep_experts(block, mixture, kept)
        yield
    finally:
        experts.clear()
        experts.update(modules)
        router._parameters.update(rows)
        router.num_experts = count  # type: ignore[assignment]  # a number of the stock router's


def experts_in(block: nn.Module, mixture: Mixture) -> nn.Module | None:
    """Return the module that holds the experts of a block; None where its MLP is removed, or of another kind."""
    mlp: Any = block._modules[mixture.module]
    return None if mlp is None else mlp._modules.get(mixture.experts.removeprefix(f"{mixture.module}."))


def _rows(router: nn.Module, mixture: Mixture) -> dict[str, nn.Parameter]:
    """Return the parameters of a router that have a row for each expert, by name."""
    names = ("weight", mixture.correction) if mixture.correction else ("weight",)
    return {name: router.get_parameter(name) for name in names}
