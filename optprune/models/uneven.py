"""Why equal blocks of a family's stock class cannot hold the shapes of a model's blocks."""

from collections.abc import Sequence
from enum import Enum

from transformers import PretrainedConfig

from optprune.models.architecture import Architecture, BlockShape


class Uneven(Enum):
    """A reason, in the words of messages."""

    PARTS = "blocks without attention or without an MLP"
    PAIRS = "heads with fewer dimensions of queries and keys"
    VALUES = "heads with fewer value dimensions than key dimensions"
    SIZES = "blocks of different shapes"
    EXPERTS = "experts of another width than the one that every token goes through"
    HEADS = "fewer heads than the config can hold"


def uneven(architecture: Architecture, config: PretrainedConfig, shapes: Sequence[BlockShape]) -> tuple[Uneven, ...]:
    """Return the reasons why the stock class of a config cannot hold blocks of these shapes; none where it can.

    The config has the heads of the model before it was pruned; its widths count only beside those of shared experts.
    """
    heads, having = architecture.heads(config), [shape for shape in shapes if shape.kv_heads]
    counts = set[int]() if heads.by_block else {shape.kv_heads for shape in having}
    kinds = [(kind, shape) for kind in architecture.mlp_kinds for shape in shapes if kind.describes(shape)]
    found = {
        Uneven.PARTS: any(shape.parts not in architecture.whole for shape in shapes),
        Uneven.PAIRS: any(shape.pairs for shape in having),
        Uneven.VALUES: not heads.by_block and any(shape.value_dim != heads.value_dim for shape in having),
        Uneven.SIZES: len(counts) > 1 or not architecture.alike_beside_attention(config, shapes),
        Uneven.EXPERTS: not all(kind.stock_holds(config, shape) for kind, shape in kinds),
        # The stock configs require heads that divide the hidden size, though head_dim gives their width.
        Uneven.HEADS: any(
            count != heads.kv and (not architecture.head_dim_is_free or config.hidden_size % (count * heads.group))
            for count in counts
        ),
    }
    return tuple(reason for reason, holds in found.items() if holds)
