"""Recurrent mixers: sub-blocks that carry a state from token to token, in the place of attention or beside it.

The laws of such a mixer: its layers of the first stage read the normed hidden states, its last layer makes the output
of the sub-block, and nothing else of it is linear. It runs before the MLP. A block that has one has no attention, or
both read the states after one norm and their outputs are added. It is removed whole, with a norm that nothing else
reads.

Its heads come in units that share nothing: a key head of a delta network with the value heads that read it, or a group
of heads of a Mamba 2 with what they write and read by. The norm before the last layer goes over each head, or over each
group, so a unit can be removed where the stock class can be made with fewer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from optprune.models.pruned.pruned_recurrent import with_fewer_heads
from optprune.models.surgery import numbers_of

Count = Callable[[PretrainedConfig], int]
Runs = tuple[Count, ...]
"""the sizes of runs of rows: a run holds the rows of all heads, head after head"""


@dataclass(frozen=True)
class Recurrent:
    """A recurrent mixer by its linear layers, with the sizes that a config says."""

    module: str
    """the sub-module"""
    heads: Count
    """the number that a block's shape holds: key heads, groups of heads, or channels of a convolution"""
    reads: Mapping[str, Runs]
    """the layers that read the hidden states, each with its runs of outputs"""
    output: str
    """the layer that makes the output of the sub-block, and reads head after head"""
    width: Count
    """the inputs of that layer"""
    parts: tuple[str, ...] = field(default=())
    """the modules that make up the sub-block: they are removed with it"""
    vectors: Mapping[str, Runs] = field(default_factory=dict)
    """the other parameters with rows of heads, by their names in a block, each with its runs"""
    counted: tuple[str, ...] = field(default=())
    """the config fields that are smaller with fewer heads, that of `heads` first; none where all of them stay"""

    def sizes(self, config: PretrainedConfig, heads: int) -> dict[str, tuple[int, int]]:
        """Return the outputs and inputs of the linear layers with so many heads."""
        hidden, there = int(config.hidden_size), self.heads(config)
        every = {path: sum(run(config) for run in runs) for path, runs in self.reads.items()}
        found = {path: (outputs * heads // there, hidden) for path, outputs in every.items()}
        return found | {self.output: (hidden, self.width(config) * heads // there)}

    def heads_of(self, config: PretrainedConfig, width: int) -> int:
        """Return the number of heads of a mixer whose last layer has so many inputs."""
        return width * self.heads(config) // self.width(config)

    def rows(self, config: PretrainedConfig, runs: Runs, heads: int, device: torch.device) -> Tensor:
        """Return the rows [heads, n] of each head in runs of so many heads."""
        found, first = [], 0
        for run in runs:
            width = run(config) // self.heads(config)
            found.append(first + torch.arange(heads * width, device=device).view(heads, width))
            first += heads * width
        return torch.cat(found, 1)

    def fit(self, mixer: nn.Module, config: PretrainedConfig, heads: int) -> None:
        """Give a mixer whose weights have so many heads the numbers that its stock class holds beside them."""
        with torch.device("meta"):
            new = with_fewer_heads(mixer, config, self.counted, heads)
        for own, other in zip(mixer.modules(), new.modules(), strict=True):
            vars(own).update(numbers_of(other))

    def record(self, config: PretrainedConfig, heads: int) -> None:
        """Write so many heads of every mixer into a config."""
        there = self.heads(config)
        for name in self.counted:
            setattr(config, name, getattr(config, name) * heads // there)
