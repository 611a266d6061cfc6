"""Reordering: the layers of a block whose inputs may stand in another order, since other layers make them."""

import torch

from optprune.models.architecture import GATED
from optprune.models.decoder import Decoder, LinkedLayers
from optprune.models.units import Mlp, Values
from optprune.problems import Link


def reorderable(decoder: Decoder, block: int, path: str, size: int) -> LinkedLayers | None:
    """The units that are a layer's inputs, and may change places in whole groups of a `size`, or None.

    They are MLP units, of experts too, and the value dimensions of a KV head. None where there are none, where a head's
    are no whole groups, and where a description does not say that they can be told apart.
    """
    architecture = decoder.architecture
    for kind in (Values(), Mlp()):
        if kind.consumer(architecture) == path:
            free = kind.field not in architecture.indivisible and kind.there(decoder.shape(block)) % size == 0
            return kind.layers(decoder, block) if free else None
    place, _, name = path.rpartition(".")
    if architecture.mixture is None or name != GATED[2]:
        return None
    layer = decoder.layer(block, path)
    every = torch.arange(layer.in_features, device=layer.weight.device)
    link = Link(every[:, None], torch.zeros_like(every), (every[:, None],) * 2)
    return LinkedLayers(path, tuple(f"{place}.{producer}" for producer in GATED[:2]), link)
