"""A width multiple that is asked for: every width is one, or it is refused where it could do nothing."""

from dataclasses import dataclass, replace

import pytest
import torch

from optprune import Recipe, load_recipe, prune
from optprune.allocation.uniform import uniform
from optprune.errors import InputError
from optprune.models import UNITS, Architecture, Decoder, LinkedLayers, LinkedUnits, Mlp, Values
from optprune.models.architecture import BlockShape
from optprune.work import Work
from tests.helpers.tiny_models import tiny_llama


@dataclass(frozen=True)
class Neurons(LinkedUnits):
    """The hidden neurons of an MLP, as a user's own unit kind."""

    name = "neurons"
    field = "mlp_width"
    part = "mlp"

    def consumers(self, architecture: Architecture) -> tuple[str, ...]:
        return architecture.mlp_consumers

    def linked(self, decoder: Decoder, block: int, consumer: str) -> LinkedLayers:
        return Mlp().linked(decoder, block, consumer)

    def work(self, outputs: int, inputs: int) -> Work:
        return Work()


def batches() -> list[torch.Tensor]:
    return list(torch.randint(5, 500, (4, 2, 24), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_units_of_ones_own_are_cut_to_the_multiple(allocation: str) -> None:
    model = tiny_llama()
    fields = {"units": Neurons(), "sparsity": 0.3, "allocation.multiple": 16, "allocation": allocation}
    prune(model, batches(), load_recipe("structured_best", fields))
    widths = [block.mlp.up_proj.out_features for block in model.model.layers]
    assert all(width % 16 == 0 for width in widths) and min(widths) < 128


@pytest.mark.parametrize("settings", [{"units": "kv-groups"}, {"units": "kv-groups", "allocation": "global"}], ids=str)
def test_heads_have_no_multiple(settings: dict) -> None:
    with pytest.raises(InputError, match="a width multiple of 16 has no effect on units 'kv-groups'"):
        prune(tiny_llama(), batches(), Recipe({"allocation.multiple": 16}, sparsity=0.2, **settings))


def test_heads_that_are_too_small_for_whole_multiples_are_refused() -> None:
    decoder = Decoder(tiny_llama())
    assert decoder.shape(0).value_dim == 16
    with pytest.raises(InputError, match="a width multiple of 8 has no effect on units 'vo', of which a block has 16"):
        uniform(decoder, 0.1, Values(), 8)
    # With MLP units beside them, those are.
    shapes = [block.shape for block in uniform(decoder, 0.2, UNITS["all"], 8).blocks]
    assert all(shape.mlp_width % 8 == 0 for shape in shapes)
    assert uniform(decoder, 0.1, replace(Values()), None)


@pytest.mark.parametrize(
    "fields",
    [
        {"units": "weights"},
        {"units": "experts"},
        {"units": "blocks"},
        {"allocation": "depth"},
        {"units": {"weights": "2:4"}},
    ],
    ids=str,
)
def test_what_has_no_widths_has_no_multiple(fields: dict) -> None:
    sparsity = {"sparsity": 0.5} if isinstance(fields.get("units"), dict) else {}
    with pytest.raises(InputError, match=r"allocation\.multiple"):
        Recipe({"allocation.multiple": 16, **fields, **sparsity})


@pytest.mark.parametrize(("width", "multiple"), [(14336, 64), (4096, 64), (1536, 32), (512, 32), (504, 8)])
def test_the_default_multiple_of_an_mlp_goes_by_its_width(width: int, multiple: int) -> None:
    """32 numbers are a block of llama.cpp's small types; see docs/explanation/units.md."""
    assert Mlp().multiple(BlockShape(width, 3, 64), None) == multiple
    assert Mlp().multiple(BlockShape(width, 3, 64), 24) == 24


@pytest.mark.parametrize(
    ("dim", "alike", "apart"), [(256, 32, 32), (128, 16, 16), (80, 16, 16), (64, 8, 8), (16, 1, 8)]
)
def test_the_default_multiple_of_value_dimensions_goes_by_the_head(dim: int, alike: int, apart: int) -> None:
    shape = BlockShape(1536, 3, dim)
    assert (Values().multiple(shape, None, alike=True), Values().multiple(shape, None)) == (alike, apart)
