"""How a budget over the whole model is divided: so far uniformly, the same share from every block."""

from dataclasses import dataclass

from optprune.errors import InputError
from optprune.models import Decoder


@dataclass(frozen=True)
class Allocation:
    """What every block keeps, and the sparsity that this comes to over the decoder blocks' linear weights."""

    mlp_units: int
    value_dim: int
    weights: float
    """the share of weights kept in each linear layer, where single weights are pruned"""
    sparsity: float


def uniform(decoder: Decoder, sparsity: float, units: str, width_multiple: int) -> Allocation:
    """The same number of units in every block, for a sparsity over all linear weights of the decoder blocks.

    Q and K are never touched, so the units that are pruned take a larger share: with units 'all', the ratio of MLP
    units and of value dimensions is sparsity / (1 - share of Q and K) (FASP). Value dimensions are rounded first,
    then the MLP width is chosen to meet the budget as nearly as a multiple of `width_multiple` can.
    """
    architecture, heads = decoder.architecture, decoder.heads
    consumer = decoder.layer(0, architecture.mlp_consumer)
    width, hidden = consumer.in_features, consumer.out_features
    dim = decoder.value_dim(0)
    blocks = len(decoder.blocks)
    total = decoder.linear_weights()
    if units == "weights":
        return Allocation(width, dim, 1 - sparsity, sparsity)
    # Weights per unit, over all blocks: a row of each producer and a column of the consumer.
    per_mlp_unit = blocks * hidden * (len(architecture.mlp_producers) + 1)
    per_value_dim = blocks * hidden * heads.kv * (1 + heads.group)
    mlp = per_mlp_unit * width if units in ("mlp", "all") else 0
    value = per_value_dim * dim if units in ("vo", "all") else 0
    ratio = sparsity * total / (mlp + value)
    if ratio >= 1:
        raise InputError(
            f"a sparsity of {sparsity:g} is out of reach with units {units!r}: they hold only "
            f"{(mlp + value) / total:.1%} of the decoder's linear weights; ask for less, or use --units all"
        )
    kept_dim = max(1, round(dim * (1 - ratio))) if value else dim
    removed = per_value_dim * (dim - kept_dim)
    kept_width = width
    if mlp:
        exact = width - (sparsity * total - removed) / per_mlp_unit
        kept_width = min(width, max(1, round(exact / width_multiple)) * width_multiple)
        if kept_width > width - width % width_multiple:
            kept_width = width
        removed += per_mlp_unit * (width - kept_width)
    if removed == 0:
        raise InputError(
            f"a sparsity of {sparsity:g} rounds to nothing with a width multiple of {width_multiple}: "
            f"the MLP has {width} units; ask for more, or lower --width-multiple"
        )
    return Allocation(kept_width, kept_dim, 1.0, removed / total)
