"""Experts as modules of linear layers, and as the tensors of the stock classes of transformers 5.

The stock classes hold the experts of a block in gate_up_proj [experts, 2 width, hidden] and down_proj [experts, hidden,
width], some of them transposed, with rows that alternate, with biases, or with up_proj alone in place of the first one
(`ExpertTensors`). Checkpoints hold the matrices of each expert, under the names that the modules here have, or those
tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optprune.models.architecture import GATED, ExpertTensors, Mixture
from optprune.models.surgery import as_buffers, as_parameters
from optprune.numerics.tensors import first_output

GATE, UP, DOWN = GATED
FUSED = "gate_up_proj"
"""the name of the tensor of two layers"""
BIAS = "_bias"
"""the ending of the name of a tensor of biases"""


@dataclass(frozen=True)
class ExpertTensor:
    """One of the stock class's tensors of all experts in a block."""

    name: str
    parts: tuple[str, ...]
    """the parameters of an expert whose rows it holds, by their names in the expert"""
    transposed: bool
    """whether it holds a matrix [in, out] for each expert"""
    dimensions: int
    """3 for a matrix of each expert, 2 for a vector"""

    def rows(self, count: int, layout: ExpertTensors) -> dict[str, range]:
        """Return the rows of each part among so many of all."""
        return dict(zip(self.parts, (range(count),) if len(self.parts) == 1 else layout.rows(count), strict=True))

    def divided(self, of_expert: Tensor, layout: ExpertTensors) -> dict[str, Tensor]:
        """Return the parameters of an expert, which share memory with its part of the tensor unless rows alternate.

        Transposed ones are copied too, so that they lie in memory as they do after reading them from a file: products
        of matrices that lie otherwise are rounded otherwise.
        """
        whole, copied = of_expert.t() if self.transposed else of_expert, layout.transposed or layout.interleaved
        found = {
            part: whole[rows.start : rows.stop : rows.step] for part, rows in self.rows(len(whole), layout).items()
        }
        return {
            part: rows.clone(memory_format=torch.contiguous_format) if copied else rows for part, rows in found.items()
        }

    def united(self, parts: Sequence[Tensor], layout: ExpertTensors) -> Tensor:
        """Return an expert's part of the tensor."""
        if len(parts) > 1:
            whole = torch.stack(list(parts), 1).flatten(0, 1) if layout.interleaved else torch.cat(list(parts))
        else:
            [whole] = parts
        return whole.t() if self.transposed else whole


def expert_tensors(layout: ExpertTensors) -> tuple[ExpertTensor, ...]:
    """Return the tensors of a layout."""
    found = list[ExpertTensor]()
    *first, last = layout.layers
    for name, layers in ((FUSED if len(first) > 1 else UP, first), (last, (last,))):
        found.append(ExpertTensor(name, tuple(f"{layer}.weight" for layer in layers), layout.transposed, 3))
        if layout.biased:
            found.append(
                ExpertTensor(
                    f"{name}{BIAS}", tuple(f"{layer}.bias" for layer in layers), transposed=False, dimensions=2
                )
            )
    return tuple(found)


class Expert(nn.Module):
    """One expert: an MLP, gated or not."""

    def __init__(self, layers: Sequence[str], parameters: Mapping[str, Tensor], trained: bool) -> None:
        super().__init__()
        for name in layers:
            outputs, inputs = parameters[f"{name}.weight"].shape
            layer = nn.Linear(inputs, outputs, bias=f"{name}.bias" in parameters, device="meta")
            for own in layer._parameters:
                if f"{name}.{own}" in parameters:
                    layer._parameters[own] = nn.Parameter(parameters[f"{name}.{own}"], trained)
            self.add_module(name, layer)


class SeparateExperts(nn.ModuleDict):
    """The experts of a block by number; it is called with the same arguments as the stock module."""

    def __init__(self, stock: nn.Module, mixture: Mixture) -> None:
        """Take the experts out of a stock module, whose tensors they share; that module is empty until `joined`."""
        super().__init__()
        layout = mixture.layout
        tensors = {each: stock.get_parameter(each.name) for each in expert_tensors(layout)}
        for number in range(len(next(iter(tensors.values())))):
            parameters: dict[str, Tensor] = {}
            for each, whole in tensors.items():
                parameters |= each.divided(whole.detach()[number], layout)
            self[str(number)] = Expert(layout.layers, parameters, next(iter(tensors.values())).requires_grad)
        stock._parameters.update(dict.fromkeys(each.name for each in tensors))
        self._stock: list[Any] = [stock]  # in a list, so that it is not a sub-module
        self._mixture = mixture
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
        first = (self._layer(number, name)(tokens) for name in self._mixture.layout.layers[:-1])
        return self._mixture.gated(self._stock[0], *first)

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
        stock, trained = self._stock[0], next(self.parameters()).requires_grad
        for each in expert_tensors(self._mixture.layout):
            stock._parameters[each.name] = nn.Parameter(self.stock_tensor(each.name), trained)
        stock.num_experts = self.count
        setattr(stock, self._mixture.layout.width, self.width)
        return stock.train(self.training)

    @property
    def width(self) -> int:
        """The units of an expert."""
        return self._parameter(0, f"{DOWN}.weight").shape[1]

    def stock_shapes(self) -> dict[str, Tensor]:
        """Return the stock class's tensors of these experts by name, without values."""
        found: dict[str, Tensor] = {}
        for each in expert_tensors(self._mixture.layout):
            parts = [self._parameter(0, part).to("meta") for part in each.parts]
            found[each.name] = each.united(parts, self._mixture.layout).expand(self.count, *[-1] * parts[0].ndim)
        return found

    def stock_tensor(self, name: str) -> Tensor:
        """Return one of the stock class's tensors."""
        layout = self._mixture.layout
        [each] = (each for each in expert_tensors(layout) if each.name == name)
        experts = ([self._parameter(number, part) for part in each.parts] for number in range(self.count))
        return torch.stack([each.united(parts, layout) for parts in experts])

    def _layer(self, number: int, name: str) -> nn.Module:
        return self[str(number)].get_submodule(name)

    def _parameter(self, number: int, name: str) -> Tensor:
        return self[str(number)].get_parameter(name).detach()


class RoutedExperts(nn.Module):
    """The router and the experts of a block that has no module for both: the sum of the experts' weighted outputs."""

    def __init__(self, block: nn.Module, mixture: Mixture) -> None:
        super().__init__()
        self.router, self.experts = block.get_submodule(mixture.router), block.get_submodule(mixture.experts)
        self.normed = block.get_submodule(mixture.normed) if mixture.normed else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the sum for each of the states [tokens, hidden] that the router reads."""
        _, weights, chosen = self.router(tokens)
        return self.experts(self.normed(tokens), chosen, weights)


def mixture_of(block: nn.Module, mixture: Mixture) -> nn.Module:
    """Return the module of a block that routes and adds up."""
    return block.get_submodule(mixture.module) if mixture.module else RoutedExperts(block, mixture)


def read_by_experts(block: nn.Module, mixture: Mixture, tokens: Tensor) -> Tensor:
    """Return the states [tokens, hidden] that the experts read, from those that the router reads."""
    return block.get_submodule(mixture.normed)(tokens) if mixture.normed else tokens


def scoring(block: nn.Module, mixture: Mixture) -> nn.Module:
    """Return the module of a block whose first output the logits of the experts are."""
    return block.get_submodule(mixture.scored or mixture.router)


def logits_of(block: nn.Module, mixture: Mixture, tokens: Tensor) -> Tensor:
    """Return the logits [tokens, experts] of the states that the router reads."""
    seen = list[Tensor]()
    handle = scoring(block, mixture).register_forward_hook(lambda _, __, output: seen.append(first_output(output)))
    try:
        block.get_submodule(mixture.router)(tokens)
    finally:
        handle.remove()
    return seen[0]


def answer_factors(block: nn.Module, mixture: Mixture, scale: float) -> Tensor:
    """Return what each expert's answers are multiplied by beside the router's weights [experts]."""
    router = block.get_submodule(mixture.router)
    if mixture.factors:
        return scale * router.get_parameter(mixture.factors).detach().double()
    rows = router.get_parameter(mixture.rows[0])
    return torch.full((len(rows),), scale, dtype=torch.float64, device=rows.device)


def separate(block: nn.Module, mixture: Mixture) -> None:
    """Make the experts of a block separate modules that share memory with the stock tensors, if they are not yet.

    The router's correction, a buffer of the stock class, is a parameter until they are joined.
    """
    experts = experts_in(block, mixture)
    if experts is not None and not isinstance(experts, SeparateExperts):
        block.set_submodule(mixture.experts, SeparateExperts(experts, mixture))
        router, name = block.get_submodule(mixture.router), mixture.correction
        as_parameters(router, (name,) if name else ())


def join(block: nn.Module, mixture: Mixture) -> None:
    """Put the experts of a block, as they are now, back into the stock module."""
    experts = experts_in(block, mixture)
    if isinstance(experts, SeparateExperts):
        block.set_submodule(mixture.experts, experts.joined())
        router, name = block.get_submodule(mixture.router), mixture.correction
        as_buffers(router, (name,) if name else ())


def keep_experts(block: nn.Module, mixture: Mixture, kept: Tensor) -> None:
    """Delete the experts outside a mask [experts], and the rows of the router that choose them, in place."""
    experts, router = experts_in(block, mixture), block.get_submodule(mixture.router)
    assert isinstance(experts, SeparateExperts)
    experts.keep(kept)
    for name, rows in _rows(router, mixture).items():
        chosen = rows.detach()[kept.to(rows.device)].contiguous()
        _put_rows(router, {name: nn.Parameter(chosen, rows.requires_grad)})
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
        _put_rows(router, rows)
        router.num_experts = count  # type: ignore[assignment]  # a number of the stock router's


def experts_in(block: nn.Module, mixture: Mixture) -> nn.Module | None:
    """Return the module that holds the experts of a block; None where its MLP is removed, or of another kind."""
    if not mixture.module:
        return block._modules.get(mixture.experts)
    mlp: Any = block._modules[mixture.module]
    return None if mlp is None else mlp._modules.get(mixture.experts.removeprefix(f"{mixture.module}."))


def _rows(router: nn.Module, mixture: Mixture) -> dict[str, nn.Parameter]:
    """Return the parameters of a router that have a row for each expert, by name."""
    names = (*mixture.rows, *((mixture.correction,) if mixture.correction else ()))
    return {name: router.get_parameter(name) for name in names}


def _put_rows(router: nn.Module, rows: Mapping[str, nn.Parameter]) -> None:
    """Give a router these parameters, by name."""
    for name, parameter in rows.items():
        path, _, own = name.rpartition(".")
        holder = router.get_submodule(path)
        holder._parameters[own] = parameter
        if isinstance(holder, nn.Linear):
            holder.out_features = len(parameter)
