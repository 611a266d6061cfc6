"""Digits: what a model in half precision is computed in where its own dtype has too few, one part of it at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from optprune.models.decoder import Decoder

HALF = (torch.bfloat16, torch.float16)
"""the dtypes that gradients and small differences lose too many digits in; float32 holds all numbers of both"""


@contextmanager
def parameters_in(dtype: torch.dtype | None, *modules: nn.Module) -> Iterator[None]:
    """Modules whose parameters are of another dtype meanwhile; what became of them is rounded to their own then.

    Those that are of it already, as within another such context, stay as they are, and all of them do for None. In a
    wider dtype numbers that nobody changes come back bit for bit.
    """
    own = [
        {name: each.dtype for name, each in module.named_parameters() if dtype not in (None, each.dtype)}
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


@contextmanager
def entrance(decoder: "Decoder") -> Iterator[None]:
    """What stands before the blocks gives their inputs in the decoder's dtype, for as long as the context lasts.

    Rows of an embedding are looked up as they are stored, and only then of that dtype: the numbers are the same.
    """
    dtype, model = decoder.computes_in, decoder.model
    passed_over = {*decoder.blocks.modules(), model.get_output_embeddings()}
    leaves = [each for each in model.modules() if each not in passed_over and not any(each.children())]
    with ExitStack() as hooks:
        for module in leaves if dtype is not None else ():
            if isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_hook(lambda _, __, rows: rows.to(dtype)).remove)
        with parameters_in(dtype, *(each for each in leaves if not isinstance(each, nn.Embedding))):
            yield


@contextmanager
def readout(decoder: "Decoder") -> Iterator[None]:
    """What gives the logits computes in the decoder's dtype, for as long as the context lasts."""
    with parameters_in(decoder.computes_in, *decoder.after_blocks()):
        yield
