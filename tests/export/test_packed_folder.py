"""Folders of 4-bit weights: transformers with compressed-tensors gives the logits of the weights that were packed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optprune.cli import main
from optprune.errors import InputError, OptpruneError
from optprune.export import PackedFolder, export
from optprune.export.packed_folder import BITS, pack
from optprune.grids import Grid
from optprune.models import load_model
from optprune.models.quantised import WordsFormat
from optprune.pruning import prune
from optprune.recipe import Recipe
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import TINY_MODELS, save_tiny, tiny_llama


def on_grid(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **bits: Any) -> Path:
    model = TINY_MODELS[name]().to(dtype)
    settings = {"kind": "w4a16", "group": 32, **bits}
    prune(model, batches(), Recipe({"units": "weights", "sparsity": 0.3, "solver": "wanda", "bits": settings}))
    return save_tiny(model, folder)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(torch.arange(40)[None]).logits


def logits_of(folder: Path) -> Tensor:
    """Return the logits of a folder as stock transformers loads it."""
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shape", [(3, 16), (12, 64), (5, 32)])
def test_unpacking_gives_the_weights_back(shape: tuple[int, int], shifted: bool) -> None:
    grid = Grid(4, 8, shifted)
    weight = grid.nearest(torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3).values()
    weight[1] = 0
    parts = {f".{name}": part for name, part in pack(grid.encode(weight), grid, torch.float32).items()}
    assert torch.equal(WordsFormat(BITS).decode(parts, shape), weight)


def words(rows: Tensor) -> Tensor:
    """Eight integers a word of 32 bits, four bits each from the lowest; the bits behind the last integer are zero."""
    numbers = [sum((value + 8) << 4 * place for place, value in enumerate(row)) for row in rows.tolist()]
    count = 4 * -(-rows.shape[1] // 8)
    return torch.tensor([list(number.to_bytes(count, "little")) for number in numbers], dtype=torch.uint8)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_word_that_is_not_full_ends_with_zeros(shifted: bool) -> None:
    """As compressed-tensors writes it."""
    grid = Grid(4, 4, shifted)
    codes = grid.encode(grid.nearest(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)) + 0.3).values())
    found = pack(codes, grid, torch.float32)
    zeros = -8 - codes.lows.int() if shifted else torch.zeros(3, 3, dtype=torch.int32)
    integers = codes.integers + zeros.repeat_interleave(4, dim=1)
    assert torch.equal(found["weight_packed"].view(torch.uint8), words(integers))
    if shifted:
        assert torch.equal(found["weight_zero_point"].t().contiguous().view(torch.uint8), words(zeros.t()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [{}, {"kind": "w4a16_shifted"}], ids=["scale", "scale and zero point"])
def test_transformers_gives_the_logits_of_the_weights(bits: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    folder = on_grid(tmp_path / "model", dtype=dtype, **bits)
    written = export(folder, tmp_path / "packed", PackedFolder())
    expected, found = logits(load_model(folder).model), logits_of(written.path)
    # The same numbers in the same products, up to their order.
    assert float((found - expected).abs().max()) <= 64 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert "14 layers" in written.summary and not written.notes
    one, other = (AutoTokenizer.from_pretrained(place)("a b").input_ids for place in (written.path, folder))
    assert one == other


@pytest.mark.e2e
def test_the_config_says_what_is_packed_and_nothing_of_sparsity(tmp_path: Path) -> None:
    export(on_grid(tmp_path / "model"), tmp_path / "packed", PackedFolder())
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert "sparsity_config" not in config
    assert config["format"] == "pack-quantized" and config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["opt", "qwen2"])
def test_other_families(name: str, tmp_path: Path) -> None:
    folder = on_grid(tmp_path / "model", name)
    export(folder, tmp_path / "packed", PackedFolder())
    expected, found = logits(load_model(folder).model), logits_of(tmp_path / "packed")
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.e2e
def test_layers_that_are_not_on_the_grid_stay_and_are_named(tmp_path: Path) -> None:
    model = tiny_llama()
    prune(model, batches(), Recipe(units="weights", sparsity=0.0, bits={"kind": "w4a16", "group": 32}))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-4
    written = export(save_tiny(model, tmp_path / "model"), tmp_path / "packed", PackedFolder())
    assert written.notes == ("1 layer on no 4-bit grid, such as model.layers.1.mlp.up_proj, stay as they are",)
    assert float((logits_of(written.path) - logits(model)).abs().max()) <= 1e-5


def test_a_model_on_no_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptpruneError, match="prune with --bits w4a16 first"):
        export(save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "packed", PackedFolder())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


@pytest.mark.e2e
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = on_grid(tmp_path / "model")
    command = ["export", str(folder), "--format", "compressed-tensors", "--output", str(tmp_path / "packed")]
    assert main(command) == 0
    assert "4 bits in groups of 32, 14 layers" in capsys.readouterr().out
    assert main([*command[:-1], str(tmp_path / "other"), "--type", "f16"]) != 0
    with pytest.raises(InputError, match="exists already"):
        export(folder, tmp_path / "packed", PackedFolder())
