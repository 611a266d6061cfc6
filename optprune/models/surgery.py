"""Changes of modules in place: weights written, rows and columns deleted, dtypes and classes exchanged."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optprune.errors import InputError

HALF = (torch.bfloat16, torch.float16)
"""the dtypes that are too coarse for gradients and small differences; float32 holds all numbers of both"""


def write(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Replace the values of a linear layer, in its own dtype."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)


def put_parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module these parameters, by their names inside it, whatever their shapes; new ones have no gradients."""
    for name, weight in weights.items():
        path, _, own = name.rpartition(".")
        parent = module.get_submodule(path)
        before = parent._parameters.get(own)
        parent._parameters[own] = nn.Parameter(weight, before is not None and before.requires_grad)
        if isinstance(parent, nn.Linear) and own == "weight":
            parent.out_features, parent.in_features = weight.shape


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


def keep_entries(module: nn.Module, name: str, entries: Tensor) -> None:
    """Keep only these entries of a vector that is a parameter of a module, in place."""
    vector = module.get_parameter(name)
    put_parameters(module, {name: vector.detach()[entries]})


def keep_pairs(module: nn.Module, name: str, entries: Tensor) -> None:
    """Keep only these entries of a matrix that lists the rotary pairs of each KV head, in place.

    Entries are counted row by row. Heads without one go, and the others keep equally many.
    """
    pairs = module.get_parameter(name).detach()
    heads = (entries // pairs.shape[1]).unique()
    put_parameters(module, {name: pairs.flatten()[entries].view(len(heads), -1)})


def as_parameters(module: nn.Module, names: Iterable[str]) -> None:
    """Make buffers of a module parameters without gradients: what reads and writes its parameters does these too."""
    for parent, own in _places(module, names):
        value = parent._buffers.pop(own, None)
        if value is not None:
            parent.register_parameter(own, nn.Parameter(value, requires_grad=False))


def as_buffers(module: nn.Module, names: Iterable[str]) -> None:
    """Make such parameters of a module buffers again."""
    for parent, own in _places(module, names):
        value = parent._parameters.pop(own, None)
        if value is not None:
            parent.register_buffer(own, value.detach())


def _places(module: nn.Module, names: Iterable[str]) -> Iterator[tuple[nn.Module, str]]:
    """Yield the sub-module and the name in it for each of these names, as far as the module has the sub-module."""
    there = dict(module.named_modules())
    for name in names:
        path, _, own = name.rpartition(".")
        if path in there:
            yield there[path], own


def classes_of(module: nn.Module) -> list[tuple[nn.Module, type]]:
    """Return a module and all modules inside it, each with its class."""
    return [(part, part.__class__) for part in module.modules()]


def set_classes(classes: list[tuple[nn.Module, type]]) -> None:
    """Give modules the classes that `classes_of` found."""
    for part, cls in classes:
        part.__class__ = cls


@contextmanager
def parameters_in(dtype: torch.dtype | None, *modules: nn.Module) -> Iterator[None]:
    """Convert the parameters of modules to a dtype within the context, and round them to their own dtype after it.

    Whole numbers stay, and so do parameters that have the dtype already, as within another such context; None converts
    nothing. In a wider dtype unchanged numbers come back bit for bit.
    """
    own = [
        {
            name: each.dtype
            for name, each in module.named_parameters()
            if each.is_floating_point() and dtype not in (None, each.dtype)
        }
        for module in modules
    ]
    try:
        for module, dtypes in zip(modules, own, strict=True):
            for name in dtypes:
                parameter = module.get_parameter(name)
                parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for module, dtypes in zip(modules, own, strict=True):
            for name, parameter in module.named_parameters():
                if name in dtypes:
                    parameter.data = parameter.data.to(dtypes[name])


class TransposedLinear(nn.Linear):
    """A linear layer whose weight [out, in] is a view of a stored matrix [in, out], as in transformers' Conv1D.

    Its state dict holds the matrix as it is stored, so that saving and loading match the stock class.
    """

    def forward(self, input: Tensor) -> Tensor:
        # The same operation as Conv1D's, so that the output is equal bit for bit.
        rows = torch.addmm(self.bias, input.reshape(-1, self.in_features), self.weight.t())
        return rows.view(*input.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        name = f"{prefix}weight"
        found = {**state_dict, name: state_dict[name].t()} if name in state_dict else state_dict
        super()._load_from_state_dict(found, prefix, *others)


def as_linear(layer: nn.Module) -> None:
    """Make a Conv1D a `TransposedLinear`, in place and without a copy; other layers stay as they are."""
    if type(layer) is not Conv1D:
        return
    weight, linear = layer.weight, cast(Any, layer)
    linear.__class__ = TransposedLinear
    linear.out_features, linear.in_features = vars(layer).pop("nf"), vars(layer).pop("nx")
    linear.weight = nn.Parameter(weight.detach().t(), weight.requires_grad)


def check_linear(layer: nn.Module, path: str, transposed: bool) -> None:
    """Raise InputError unless a layer is a plain linear one; a `transposed` one is made linear first."""
    if transposed:
        as_linear(layer)
    if type(layer) is not (TransposedLinear if transposed else nn.Linear):
        raise InputError(
            f"{path} is a {type(layer).__name__}, not a plain linear layer: load the model without quantisation or "
            "adapters"
        )
    if layer._parameters.get("weight") is None:
        raise InputError(
            f"the weight of {path} is computed in each forward pass (by torch.nn.utils.prune, for example), which "
            "would undo the pruning: make it a parameter first, e.g. by torch.nn.utils.prune.remove(layer, 'weight')"
        )


def numbers_of(module: nn.Module) -> dict[str, int]:
    """Return the whole numbers that a module holds, such as its sizes, without its place in a cache."""
    return {name: value for name, value in vars(module).items() if type(value) is int and name != "layer_idx"}
