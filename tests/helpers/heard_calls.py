"""What a module of a model gets and answers while the calibration batches go through."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.token_batches import batches


def heard(model: PreTrainedModel, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The first input and the answer of each call, [tokens, width]."""
    found = list[tuple[Tensor, Tensor]]()

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((args[0].flatten(0, -2), output.flatten(0, -2)))

    handle = module.register_forward_hook(note)
    try:
        with torch.no_grad():
            for batch in batches():
                model(input_ids=batch, use_cache=False)
    finally:
        handle.remove()
    return found
