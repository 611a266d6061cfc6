"""What changes modules in place: weights written, rows and columns deleted, classes exchanged."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def write(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Replace the values of a linear layer, in its own dtype."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)


def put_parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module these parameters, by their names inside it, whatever their shapes."""
    for name, weight in weights.items():
        path, _, own = name.rpartition(".")
        parent = module.get_submodule(path)
        parent._parameters[own] = nn.Parameter(weight, parent._parameters[own].requires_grad)  # type: ignore[union-attr]
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


def classes_of(module: nn.Module) -> list[tuple[nn.Module, type]]:
    """A module and all that is in it, each with its class."""
    return [(part, part.__class__) for part in module.modules()]


def set_classes(classes: list[tuple[nn.Module, type]]) -> None:
    """Give modules the classes that `classes_of` found."""
    for part, cls in classes:
        part.__class__ = cls
