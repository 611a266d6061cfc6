"""Why a stock class cannot hold some shapes: for every family, against the tensors of the stock class itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from optprune.errors import InputError
from optprune.models import UNITS, BlockShape, Decoder, LinkedUnits
from optprune.models.uneven import Uneven, uneven
from tests.helpers.tiny_models import ALL_MODELS

KINDS = [
    units for units in UNITS.values() if isinstance(units, LinkedUnits) and not units.rotated and not units.by_rows
]
CHANGES: dict[str, Callable[[int], bool]] = {"all blocks": lambda block: True, "one block": lambda block: block == 1}


def halved(decoder: Decoder, kind: LinkedUnits, of: Callable[[int], bool]) -> None:
    """Remove half of the units of a kind from some blocks."""
    for block in filter(of, range(len(decoder.blocks))):
        for layers in kind.layers(decoder, block):
            each = layers.channels.units // layers.channels.slot_count
            decoder.keep_units(block, layers, layers.channels.first(max(each // 2, 1)))


def holds(decoder: Decoder) -> bool:
    """Return whether the stock class of the model's config has the tensors of the model, and none beside them."""
    config = decoder.model.config
    if not type(config).__module__.startswith("transformers."):
        return False
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    own = {name: value.shape for name, value in decoder.model.state_dict().items()}
    return own == {name: value.shape for name, value in stock.state_dict().items()}


@pytest.mark.parametrize("of", CHANGES)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_stock_class_holds_shapes_without_a_reason_against_it(name: str, of: str) -> None:
    for kind in KINDS:
        decoder = Decoder(ALL_MODELS[name]())
        assert uneven(decoder.architecture, decoder.model.config, decoder.shapes()) == ()
        try:
            halved(decoder, kind, CHANGES[of])
            reasons = uneven(decoder.architecture, decoder.model.config, decoder.shapes())
            decoder.record_shapes()
        except InputError:
            continue  # the family has no such units, or no class for blocks that differ
        assert holds(decoder) == (not reasons), f"{kind.name}: {reasons}"


def test_the_reasons_are_those_of_the_shapes() -> None:
    decoder = Decoder(ALL_MODELS["llama"]())
    first, *rest = decoder.shapes()
    heads, config = decoder.heads, decoder.model.config

    def reasons(*shapes: BlockShape) -> tuple[Uneven, ...]:
        return uneven(decoder.architecture, config, shapes)

    assert reasons(first.without("mlp"), *rest) == (Uneven.PARTS,)
    assert reasons(replace(first, pairs=3), *rest) == (Uneven.PAIRS,)
    assert reasons(*(replace(shape, value_dim=heads.value_dim - 1) for shape in (first, *rest))) == (Uneven.VALUES,)
    assert reasons(replace(first, mlp_width=5), *rest) == (Uneven.SIZES,)
