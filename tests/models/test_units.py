"""Unit kinds: the layers that each prunes, and a kind of one's own."""

from dataclasses import dataclass, replace

import pytest
import torch

from optprune import Allocation, Recipe, load_recipe, prune
from optprune.errors import InputError
from optprune.models import (
    UNITS,
    Architecture,
    BlockAllocation,
    BlockShape,
    Decoder,
    KvGroups,
    LinkedLayers,
    LinkedUnits,
    Mlp,
    Values,
    Weights,
)
from optprune.patterns import Pattern, PatternFamily, largest, pattern_family
from optprune.problems import Channels
from optprune.work import Work
from tests.helpers.sub_blocks import block_with
from tests.helpers.tiny_models import ALL_MODELS, tiny_llama


def batches() -> list[torch.Tensor]:
    return list(torch.randint(5, 500, (4, 2, 24), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("units", [Mlp(), Values(), KvGroups()], ids=lambda units: units.name)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_block_keeps_the_units_of_its_shape(name: str, units: LinkedUnits) -> None:
    """Deleting one unit of every slot gives the shape with one fewer, and its number of linear weights."""
    decoder = Decoder(ALL_MODELS[name]())
    if units.field in decoder.architecture.indivisible:
        with pytest.raises(InputError, match=rf"units {units.name} remove {units.field}, but {name} models"):
            units.layers(decoder, 1)
        return
    block = block_with(decoder, 1, units.part)
    before, every, total = decoder.shape(block), units.layers(decoder, block), decoder.linear_weights()
    consumers = units.consumers(decoder.architecture)
    assert [layers.consumer for layers in every] == [path for path in decoder.paths(block) if path in consumers]
    assert len(every) == (before.experts or 1 if isinstance(units, Mlp) else 1)
    fewer = units.with_count(before, units.there(before) - 1)
    for layers in every:
        assert units.total(before) == layers.channels.units == units.there(before) * layers.channels.slot_count
        first = torch.zeros(layers.channels.units, dtype=torch.bool)
        first[[int((layers.channels.slots == slot).nonzero()[0]) for slot in range(layers.channels.slot_count)]] = True
        decoder.keep_units(block, layers, ~first)
    assert decoder.shape(block) == fewer
    assert total - decoder.linear_weights() == decoder.weights_of(before) - decoder.weights_of(fewer)
    assert units.part in before.parts and units.part not in units.with_count(before, 0).parts


@dataclass(frozen=True)
class Pairs(LinkedUnits):
    """The hidden units of an MLP in pairs."""

    name = "pairs"
    field = "mlp_width"
    part = "mlp"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return architecture.mlp_consumers

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        single = Mlp().linked(decoder, block, consumer)
        pairs = single.channels.columns.reshape(-1, 2)
        channels = Channels(pairs, torch.zeros(len(pairs), dtype=torch.long))
        return replace(single, channels=channels, rows=(pairs,) * len(single.producers))

    def there(self, shape: BlockShape) -> int:
        return shape.mlp_width // 2

    def with_count(self, shape: BlockShape, count: int) -> BlockShape:
        return replace(shape, mlp_width=2 * count)

    def work(self, outputs: int, inputs: int) -> Work:
        return Work()


@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
def test_a_kv_head_with_fewer_value_dimensions_goes_with_its_own_columns(name: str) -> None:
    """The output is that of zeros in their place."""
    model = ALL_MODELS[name]()
    decoder, ids = Decoder(model), batches()[0]
    architecture, group = decoder.architecture, decoder.heads.group
    [values] = Values().layers(decoder, 0)
    decoder.keep_units(0, values, torch.arange(values.channels.units) % decoder.shape(0).value_dim < 5)
    heads = decoder.shape(0).kv_heads
    gone = torch.arange(5 * group) + 5 * group  # those of the second KV head
    weight = decoder.layer(0, architecture.output).weight
    assert weight.shape[1] == 5 * group * heads
    with torch.no_grad():
        weight[:, gone] = 0
        expected = model(input_ids=ids, use_cache=False).logits
        weight[:, gone] = torch.nan
        [linked] = KvGroups().layers(decoder, 0)
        decoder.keep_units(0, linked, torch.arange(heads) != 1)
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"propagation": "cross"}, {"allocation": "global"}], ids=str)
def test_units_of_ones_own(settings: dict) -> None:
    """Pairs of units are removed wherever the budget takes them."""
    model = tiny_llama()
    before = [block.mlp.up_proj.weight.detach().clone() for block in model.model.layers]
    recipe = load_recipe("structured_best", {"units": Pairs(), "sparsity": 0.2, "allocation.multiple": 1, **settings})
    report = prune(model, batches(), recipe)
    assert report.recipe["units"] == "pairs"
    assert report.sparsity_reached == pytest.approx(0.2, abs=0.01)
    for block, rows in zip(model.model.layers, before, strict=True):
        kept = (block.mlp.up_proj.weight[:, None] == rows[None]).all(2).any(0)
        assert int(kept.sum()) == block.mlp.up_proj.out_features < 128
        assert torch.equal(kept[::2], kept[1::2])


def test_an_allocation_of_other_units_than_are_corrected() -> None:
    """Where all KV heads stay and are only corrected, an allocation can still remove value dimensions."""
    model = tiny_llama()
    decoder = Decoder(model)
    narrow = BlockAllocation(replace(decoder.shape(0), value_dim=9))
    allocation = Allocation.of(decoder, [narrow] * 2)
    prune(model, batches(), Recipe(units="kv-groups", propagation="cross"), allocation=allocation)
    assert decoder.shapes() == (narrow.shape,) * 2


@pytest.mark.parametrize("name", UNITS)
def test_units_are_spelled_as_before(name: str) -> None:
    recipe = Recipe(units=name)
    assert recipe.units == UNITS[name] and recipe.to_dict()["units"] == name
    assert Recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize("wrong", ["heads", 3, None, ["mlp"]])
def test_units_that_are_not_known(wrong: object) -> None:
    known = "all, all-heads, all-recurrent, blocks, experts, kv-groups, mlp, qk, recurrent-heads, rotated-all, "
    known += "rotated-all-heads, rotated-all-qk, rotated-vo, vo, weights"
    with pytest.raises(InputError, match=f"use one of {known}"):
        Recipe({"units": wrong})


@dataclass(frozen=True)
class HalfOfEachColumn(Pattern):
    """Half of the entries of every column."""

    def project(self, score: torch.Tensor) -> torch.Tensor:
        return largest(score.T.contiguous(), score.shape[0] // 2).T

    def admits(self, mask: torch.Tensor) -> bool:
        return bool((mask.sum(0) == mask.shape[0] // 2).all())


@dataclass(frozen=True)
class InColumns(PatternFamily):
    name = "columns"
    only_share = 0.5

    def of(self, outputs: int, inputs: int, share: float) -> Pattern:
        return HalfOfEachColumn()

    def keep(self, outputs: int, inputs: int, share: float) -> int:
        return outputs // 2 * inputs


def test_a_pattern_family_of_ones_own() -> None:
    model = tiny_llama()
    recipe = load_recipe("wanda", {"units.weights": InColumns(), "sparsity": 0.5})
    assert recipe.units == Weights(InColumns())
    report = prune(model, batches(), recipe)
    assert report.recipe["units"] == {"weights": "columns"} and report.sparsity_reached == 0.5
    decoder = Decoder(model)
    for path in decoder.paths(1):
        weight = decoder.layer(1, path).weight
        assert (weight.count_nonzero(0) == len(weight) // 2).all()


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "2:4"])
def test_single_weights_have_the_pattern_of_the_recipe(pattern: str) -> None:
    recipe = Recipe(units={"weights": pattern}, sparsity=0.5)
    assert recipe.units == Weights(pattern_family(pattern)) == Recipe(**{**dict(recipe), "units": recipe.units}).units
    assert Recipe(recipe.to_dict()) == recipe
    for units in (recipe.units, {"weights": pattern}, "weights"):
        more = {"units.weights": pattern} if units == "weights" else {}
        assert Recipe({"units": units, "sparsity": 0.5, **more}) == recipe


@pytest.mark.usefixtures("as_users_run")
def test_linked_layers_have_rows_of_every_layer_for_every_unit() -> None:
    channels, rows = Channels.of(4), torch.arange(4)[:, None]
    with pytest.raises(InputError, match=r"4 units have 3 rows in up: give one for each unit"):
        LinkedLayers("down", ("gate", "up"), channels, (rows, rows[:3]))
    with pytest.raises(InputError, match=r"2 layers have rows of 1: give those of each layer"):
        LinkedLayers("down", ("gate", "up"), channels, (rows,))
    with pytest.raises(InputError, match="rows of units must be whole numbers"):
        LinkedLayers("down", ("up",), channels, (rows.float(),))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
def test_rows_may_be_whole_numbers_of_any_size(dtype: torch.dtype, as_users_run: None) -> None:
    decoder, choice = Decoder(tiny_llama()), torch.arange(128) % 3 == 0
    [layers] = Mlp().layers(decoder, 0)
    weight = decoder.layer(0, "mlp.up_proj").weight.detach().clone()
    small = Channels(layers.channels.columns.to(dtype), layers.channels.slots.to(dtype))
    decoder.keep_units(0, replace(layers, channels=small, rows=tuple(rows.to(dtype) for rows in layers.rows)), choice)
    assert torch.equal(decoder.layer(0, "mlp.up_proj").weight, weight[choice])
