"""The weights of a model whose blocks are in memory one at a time."""

from torch import Tensor

from optprune.models import Decoder


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    """All of them, copied while they are in memory."""
    found = {name: value.clone() for name, value in decoder.model.state_dict().items() if not value.is_meta}
    for index in range(len(decoder.blocks)):
        with decoder.resident(index) as block:
            found |= {decoder.name(index, name): value.clone() for name, value in block.state_dict().items()}
    return found
