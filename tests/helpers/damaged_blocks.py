"""Whole blocks with weights at zero, for block matching, and the calls of the dense ones."""

import torch
from torch import nn

from optprune.calibration.calls import Calls
from optprune.models import ARCHITECTURES
from tests.helpers.damaged_modules import damaged

LAYERS = {name: ARCHITECTURES[name].layers for name in ("llama", "qwen2", "opt")}
"""the linear layers of a block, by family"""


def damaged_block(name: str, dtype: torch.dtype) -> tuple[nn.Module, Calls]:
    """A block with a third of the weights of all its layers at zero, and the calls of the whole one."""
    return damaged(name, "", LAYERS[name], dtype)
