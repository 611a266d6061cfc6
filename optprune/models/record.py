"""What a model's classes and config must say of blocks that are no longer as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optprune.errors import InputError
from optprune.models.architecture import BlockShape
from optprune.models.registry import SHAPES_FIELD, is_stock

if TYPE_CHECKING:
    from optprune.models.decoder import Decoder


def record_shapes(decoder: Decoder) -> None:
    """Make a model's classes and config say what its blocks hold; those that hold nothing are dropped."""
    _drop_empty_blocks(decoder)
    architecture, config, model, shapes = decoder.architecture, decoder.model.config, decoder.model, decoder.shapes()
    if not any(shape.kv_heads for shape in shapes):
        raise InputError("no block has attention left, so no token would see another: remove less")
    setattr(config, architecture.mlp_width, max(shape.mlp_width for shape in shapes) or 1)
    _record_experts(decoder, shapes)
    stock = _stock_can_hold(decoder, shapes)
    classes = architecture.stock if stock else architecture.pruned
    for block in range(len(decoder.blocks)):
        decoder.take_classes(classes, block)
    if not stock:
        if classes is None:
            raise InputError(f"blocks of a {architecture.model_type} model are alike under a draft: prune evenly")
        config.__class__, model.__class__ = classes.config, classes.model
        vars(config).pop("auto_map", None)  # another owner's classes; saving names ours
        setattr(config, SHAPES_FIELD, [shape.counts() for shape in shapes])
        model.number_caches()  # type: ignore[operator]  # the pruned classes have it
        return
    if classes is not None and not is_stock(config):
        config.__class__, model.__class__ = classes.config, classes.model
        for field in (SHAPES_FIELD, "auto_map"):
            vars(config).pop(field, None)
    if shapes[0].kv_heads < decoder.heads.kv:
        config.head_dim = decoder.heads.dim
        config.num_key_value_heads = shapes[0].kv_heads
        config.num_attention_heads = shapes[0].kv_heads * decoder.heads.group
        decoder.heads = architecture.heads(config)
    for index, block in enumerate(decoder.blocks):
        block.get_submodule(architecture.attention).layer_idx = index  # type: ignore[assignment]
        if architecture.mixture is None:
            mlp = block.get_submodule(architecture.mlp_consumer.rpartition(".")[0])
            if architecture.mlp_width in vars(mlp):
                setattr(mlp, architecture.mlp_width, shapes[0].mlp_width)


def _record_experts(decoder: Decoder, shapes: Sequence[BlockShape]) -> None:
    """Say how many experts there are, which the model counts too, for the loss that balances them."""
    mixture, most = decoder.architecture.mixture, max(shape.experts for shape in shapes)
    if mixture is not None and most:
        setattr(decoder.model.config, mixture.count, most)
        vars(decoder.model)["num_experts"] = most


def _stock_can_hold(decoder: Decoder, shapes: Sequence[BlockShape]) -> bool:
    heads, first = decoder.heads, shapes[0]
    if any(shape != first for shape in shapes) or not first.mlp_width or first.value_dim != heads.dim:
        return False
    # The stock configs insist that the heads divide the hidden size, though head_dim says how wide they are.
    divides = first.kv_heads > 0 and decoder.model.config.hidden_size % (first.kv_heads * heads.group) == 0
    return first.kv_heads == heads.kv or (decoder.architecture.head_dim_is_free and divides)


def _drop_empty_blocks(decoder: Decoder) -> None:
    kept = [index for index, shape in enumerate(decoder.shapes()) if shape.parts]
    if len(kept) == len(decoder.blocks):
        return
    config = decoder.model.config
    decoder.drop_blocks(kept)
    config.num_hidden_layers = len(kept)
    for field in decoder.architecture.by_block:
        if getattr(config, field, None):
            setattr(config, field, [getattr(config, field)[index] for index in kept])
