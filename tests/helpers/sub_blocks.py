"""Which block has a sub-block, whether blocks of a family have a mixer and an MLP each, or one sub-block."""

from optprune.models import Decoder


def block_with(decoder: Decoder, number: int, part: str) -> int:
    """The block of an MLP, or else of a mixer of any kind, counted among the MLPs or the mixers of a model."""
    fields = ("mlp_width",) if part == "mlp" else ("kv_heads", "recurrent")
    having = [index for index, shape in enumerate(decoder.shapes()) if any(getattr(shape, field) for field in fields)]
    return having[number]
