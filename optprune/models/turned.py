"""Layers whose weight a file holds as [in, out], as transformers' Conv1D does: linear layers like all others here."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optprune.errors import InputError


class TurnedLinear(nn.Linear):
    """A linear layer, whose weight here is [out, in], a view of what is stored as [in, out].

    A state dict has it as it is stored, so that whatever saves or loads the model finds what the stock class has.
    """

    def forward(self, input: Tensor) -> Tensor:
        # The very operation of Conv1D, so that not a bit of the answer is another.
        rows = torch.addmm(self.bias, input.reshape(-1, self.in_features), self.weight.t())
        return rows.view(*input.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        name = f"{prefix}weight"
        found = {**state_dict, name: state_dict[name].t()} if name in state_dict else state_dict
        super()._load_from_state_dict(found, prefix, *others)


def turn(layer: nn.Module) -> None:
    """Let a Conv1D be a linear layer, in place and without a copy; what is one already stays as it is."""
    if type(layer) is not Conv1D:
        return
    weight, linear = layer.weight, cast(Any, layer)
    linear.__class__ = TurnedLinear
    linear.out_features, linear.in_features = vars(layer).pop("nf"), vars(layer).pop("nx")
    linear.weight = nn.Parameter(weight.detach().t(), weight.requires_grad)


def check_linear(layer: nn.Module, path: str, turned: bool) -> None:
    """Raise InputError where a layer is no plain linear one; one that is stored transposed is `turned` first."""
    if turned:
        turn(layer)
    if type(layer) is not (TurnedLinear if turned else nn.Linear):
        raise InputError(
            f"{path} is a {type(layer).__name__}, not a plain linear layer: load the model without quantisation or "
            "adapters"
        )
