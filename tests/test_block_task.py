"""A block's work as a value: the same task gives the same bytes wherever and whenever it is run."""

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_models import tiny_model
from optprune import load_recipe, prune
from optprune.allocation import Allocation
from optprune.calibration import calibrating, first_inputs
from optprune.models import Decoder
from optprune.pruning.block import BlockResult, BlockTask, prune_block
from optprune.recipe.allocator import allocator_of
from optprune.calibration import DenseStatistics


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 500, (4, 32), generator=generator) for _ in range(2)]
