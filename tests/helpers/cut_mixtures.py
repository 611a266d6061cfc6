"""Mixtures with fewer experts, cut by hand out of the tensors of stock models, and what they answer."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.models import architecture_of
from tests.helpers.heard_calls import heard


def cut(model: PreTrainedModel, block: int, kept: list[int]) -> PreTrainedModel:
    """A copy of a stock model of which a block has these experts alone, cut out of its tensors by hand."""
    other: Any = copy.deepcopy(model)
    mixture = mixture_in(other, block)
    router = mixture.router if model.config.model_type == "gpt_oss" else mixture.gate
    with torch.no_grad():
        for holder in (mixture.experts, router):
            for name, parameter in list(holder.named_parameters()):
                setattr(holder, name, torch.nn.Parameter(parameter[kept].clone()))
            for name, buffer in list(holder.named_buffers()):  # a router's correction
                holder.register_buffer(name, buffer[kept].clone())
            holder.num_experts = len(kept)
    return other


def answers(model: PreTrainedModel, block: int) -> Tensor:
    """What the experts of a block answer to the calibration tokens [tokens, hidden]."""
    return torch.cat([answer for _, answer in heard(model, mixture_in(model, block).experts)]).double()


def mixture_in(model: PreTrainedModel, block: int) -> Any:
    """The module of a block that holds its router and its experts."""
    mixture = architecture_of(model.config).mixture
    assert mixture is not None
    return model.get_submodule(f"model.layers.{block}.{mixture.module}")
