"""The tokens that each expert of a stock model gets, worked out by hand from the two tensors that hold all experts."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel

from tests.helpers.cut_mixtures import mixture_in
from tests.helpers.token_batches import batches


def block_of(model: PreTrainedModel, number: int = 0) -> int:
    """The block of a mixture, counted among those of the model."""
    having = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    return int(having[number].split(".")[2])


def experts_of(model: PreTrainedModel, number: int) -> Any:
    """The experts of a mixture."""
    return mixture_in(model, block_of(model, number)).experts


def routed(model: PreTrainedModel, block: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Of each expert of a mixture: the calibration tokens that are sent there, and all others [tokens, hidden]."""
    hidden, chosen = reaching_experts(model, block)
    sent = [(chosen == number).any(1) for number in range(len(experts_of(model, block).down_proj))]
    return [(hidden[here], hidden[~here]) for here in sent]


def reaching_experts(model: PreTrainedModel, block: int = 0) -> tuple[Tensor, Tensor]:
    """The calibration tokens in front of the experts [tokens, hidden], and the experts they are sent to [tokens, k]."""
    found = list[tuple[Tensor, Tensor]]()
    handle = experts_of(model, block).register_forward_pre_hook(lambda _, args: found.append((args[0], args[1])))
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch, use_cache=False)
    handle.remove()
    hidden, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
    return hidden, chosen


def inner(model: PreTrainedModel, expert: int, tokens: Tensor, block: int = 0) -> Tensor:
    """What the last matrix of an expert reads for these tokens: [tokens, width], in float64."""
    stock: Any = model
    before = tokens.double() @ first(model, expert, block)[:, : tokens.shape[1]].double().T
    if halves(model) == 1:
        return before.relu().square()
    if not in_gpt_oss(model):
        gate, up = before.chunk(2, 1)
        return silu(gate) * up
    gate, up = (before + first(model, expert, block)[:, -1].double()).chunk(2, 1)
    alpha, limit = stock.config.swiglu_alpha, stock.config.swiglu_limit
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + (-alpha * gate).exp()) * (up + 1)


def in_gpt_oss(model: PreTrainedModel) -> bool:
    """Whether experts are those of GPT-OSS: transposed, with rows of both matrices in turn, and biases."""
    return model.config.model_type.endswith("gpt_oss")


def halves(model: PreTrainedModel) -> int:
    """The matrices of an expert before the last one."""
    return 1 if model.config.model_type.endswith("nemotron_h") else 2


def first(model: PreTrainedModel, expert: int, block: int = 0) -> Tensor:
    """The matrices before that, one above the other, [2 width, hidden], and in GPT-OSS a column of biases."""
    experts = experts_of(model, block)
    if halves(model) == 1:
        return experts.up_proj[expert].detach().clone()
    both = experts.gate_up_proj[expert].detach().clone()
    if not in_gpt_oss(model):
        return both
    both = torch.cat([both.T, experts.gate_up_proj_bias[expert].detach()[:, None]], 1)
    return torch.cat([both[::2], both[1::2]])


def last(model: PreTrainedModel, expert: int, block: int = 0) -> Tensor:
    """The last matrix of an expert, [hidden, width]."""
    found = experts_of(model, block).down_proj[expert].detach().clone()
    return found.T if in_gpt_oss(model) else found
