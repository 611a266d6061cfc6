"""The tokens that each expert of a stock model gets, worked out by hand from the two tensors that hold all experts."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel

from tests.helpers.token_batches import batches


def routed(model: PreTrainedModel, block: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Of each expert of a block: the calibration tokens that are sent there, and all others [tokens, hidden]."""
    stock: Any = model
    experts, found = stock.model.layers[block].mlp.experts, list[tuple[Tensor, Tensor]]()
    handle = experts.register_forward_pre_hook(lambda _, args: found.append((args[0], args[1])))
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch, use_cache=False)
    handle.remove()
    hidden, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
    sent = [(chosen == number).any(1) for number in range(len(experts.down_proj))]
    return [(hidden[here], hidden[~here]) for here in sent]


def inner(model: PreTrainedModel, expert: int, tokens: Tensor, block: int = 0) -> Tensor:
    """What the last matrix of an expert reads for these tokens: [tokens, width], in float64."""
    gate, up = first(model, expert, block).double().chunk(2)
    return silu(tokens.double() @ gate.T) * (tokens.double() @ up.T)


def first(model: PreTrainedModel, expert: int, block: int = 0) -> Tensor:
    """The two matrices before that, one above the other: [2 width, hidden]."""
    stock: Any = model
    return stock.model.layers[block].mlp.experts.gate_up_proj[expert].detach().clone()


def last(model: PreTrainedModel, expert: int, block: int = 0) -> Tensor:
    """The last matrix of an expert, [hidden, width]."""
    stock: Any = model
    return stock.model.layers[block].mlp.experts.down_proj[expert].detach().clone()
