"""Recurrent mixers: sub-blocks that carry a state from token to token, in the place of attention or beside it.

The laws of such a mixer: its layers of the first stage read the normed hidden states, its last layer makes the output
of the sub-block, and nothing else of it is linear. It runs before the MLP. A block that has one has no attention, or
both read the states after one norm and their outputs are added. It is removed whole, with a norm that nothing else
reads, or keeps all its heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig

Count = Callable[[PretrainedConfig], int]


@dataclass(frozen=True)
class Recurrent:
    """A recurrent mixer by its linear layers, with the sizes that a config says."""

    module: str
    """the sub-module"""
    heads: Count
    """the number of its heads, or of the channels of a convolution, which a block's shape holds"""
    reads: Mapping[str, Count]
    """the layers that read the hidden states, each with its number of outputs"""
    output: str
    """the layer that makes the output of the sub-block"""
    width: Count
    """the inputs of that layer"""
    parts: tuple[str, ...] = field(default=())
    """the modules that make up the sub-block: they are removed with it"""
    groups: Count = field(default=lambda config: 1)
    """the groups of heads that the norm before that layer goes over, each for itself"""

    def sizes(self, config: PretrainedConfig) -> dict[str, tuple[int, int]]:
        """Return the outputs and inputs of the linear layers."""
        hidden = int(config.hidden_size)
        found = {path: (outputs(config), hidden) for path, outputs in self.reads.items()}
        return found | {self.output: (hidden, self.width(config))}
