"""A unit kind in somebody else's package: one class, through `prune`."""

from pathlib import Path

import pytest
import torch

from optprune import load_recipe, prune
from optprune.models import UNITS, BlockShape, Decoder, LinkedUnits, Mlp, Target, unit_kinds
from optprune.models.units import Composite
from optprune.work import Work
from tests.helpers.tiny_models import tiny_llama

PACKAGE = '''
"""MLP units in groups of four neighbours."""
from dataclasses import dataclass, replace

import torch

from optprune.models import LinkedUnits, Mlp
from optprune.problems import Channels
from optprune.work import Work


@dataclass(frozen=True)
class Quads(LinkedUnits):
    size: int = 4
    name, field, part = "quads", "mlp_width", "mlp"

    def consumers(self, architecture):
        return architecture.mlp_consumers

    def linked(self, decoder, block, consumer):
        single = Mlp().linked(decoder, block, consumer)
        columns = single.channels.columns.reshape(-1, self.size)
        slots = torch.zeros(len(columns), dtype=torch.long, device=columns.device)
        return replace(single, channels=Channels(columns, slots), rows=(columns,) * len(single.producers))

    def there(self, shape):
        return shape.mlp_width // self.size

    def with_count(self, shape, count):
        return replace(shape, mlp_width=self.size * count)

    def work(self, outputs, inputs):
        return Work(flops=outputs * inputs)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "somebodys_units"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    import somebodys_units  # type: ignore[import-not-found]

    return somebodys_units


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("multiple", [None, 4])
def test_units_of_another_package_are_cut_to_the_multiple(package, allocation: str, multiple: int | None) -> None:
    model = tiny_llama()
    batches = list(torch.randint(5, 500, (4, 2, 24), generator=torch.Generator().manual_seed(1)))
    fields = {"units": package.Quads(), "sparsity": 0.3, "allocation.multiple": multiple, "allocation": allocation}
    report = prune(model, batches, load_recipe("structured_best", fields))
    assert report.recipe["units"] == "quads"
    widths = [block.mlp.up_proj.out_features for block in model.model.layers]
    # A multiple counts units, each of which is four columns here.
    assert all(width % (4 * (multiple or 1)) == 0 for width in widths) and min(widths) < 128


def test_units_say_what_choosing_them_costs(package) -> None:
    assert Target("mlp.down_proj", "mlp.down_proj", package.Quads()).work(64, 128) == Work(flops=64 * 128)
    assert Target("mlp.down_proj", "mlp.down_proj").work(64, 128) == Work()


def test_a_composite_sums_the_work_of_its_kinds(package) -> None:
    assert Composite("two", (Mlp(), package.Quads())).work(64, 128) == Work(flops=64 * 128)
    assert all(units.work(64, 128) == Work() for units in UNITS.values())


def test_every_kind_is_described() -> None:
    kinds = unit_kinds()
    assert kinds.keys() == UNITS.keys() and len(set(kinds.values())) == len(kinds)
    assert all(text and "\n" not in text and len(text) < 160 for text in kinds.values())


def test_a_count_of_zero_removes_the_sub_block() -> None:
    decoder = Decoder(tiny_llama())
    shape = decoder.shape(0)
    for units in UNITS.values():
        if isinstance(units, LinkedUnits):
            assert units.part not in units.with_count(shape, 0).parts
            assert isinstance(units.with_count(shape, 1), BlockShape)
