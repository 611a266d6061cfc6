"""Reordering: the layers of a block whose inputs may stand in another order, since other layers make them."""

from optprune.models.decoder import Decoder, LinkedLayers
from optprune.models.units import Mlp, Values


def reorderable(decoder: Decoder, block: int, path: str, size: int) -> LinkedLayers | None:
    """The units that are a layer's inputs, and may change places in whole groups of a `size`, or None.

    They are MLP units, of experts too, and the value dimensions of a KV head. None where there are none, where a head's
    are no whole groups, and where a description does not say that they can be told apart.
    """
    architecture = decoder.architecture
    for kind, paths in ((Values(), (architecture.output,)), (Mlp(), architecture.mlps)):
        if path in paths and kind.field not in architecture.indivisible:
            linked = kind.linked(decoder, block, path)
            return linked if linked.link.units // linked.link.slot_count % size == 0 else None
    return None
