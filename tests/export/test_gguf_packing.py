"""Weights on the grid of a GGUF type are packed without a change of any number."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from optprune.export import GgufFile, export
from optprune.export.ggml import codes_of, packed
from optprune.grids import GRIDS
from optprune.models import Decoder, load_model
from optprune.pruning import prune
from optprune.recipe import Recipe
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import save_tiny, tiny_llama

KINDS = {"q4_0": Kind.Q4_0, "q5_0": Kind.Q5_0, "q8_0": Kind.Q8_0}
by_kind = pytest.mark.parametrize("name", KINDS)


def on_grid(name: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 96, generator=generator) * torch.logspace(-3, 1, 12)[:, None]
    weight[3] = 0
    weight[:, ::5] = 0
    return GRIDS[name].nearest(weight).values()


@by_kind
def test_the_decoded_numbers_are_those_that_were_packed(name: str) -> None:
    weight = on_grid(name)
    found = packed(weight, KINDS[name])
    assert torch.equal(torch.from_numpy(gguf.dequantize(found, KINDS[name])), weight)


@by_kind
def test_numbers_of_half_precision_are_packed_exactly_too(name: str) -> None:
    grid = GRIDS[name].within(torch.float16)
    weight = grid.nearest(torch.randn(6, 64, generator=torch.Generator().manual_seed(1))).values()
    stored = weight.half()
    assert torch.equal(stored.float(), weight)
    assert torch.equal(torch.from_numpy(gguf.dequantize(packed(stored, KINDS[name]), KINDS[name])), weight)


@by_kind
def test_ggmls_own_bytes_are_found_again(name: str) -> None:
    """What gguf's quantiser wrote is on the grid; the integers may be others where a block has several scales."""
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    decoded = gguf.dequantize(gguf.quantize(weight, KINDS[name]), KINDS[name])
    assert codes_of(torch.from_numpy(decoded), KINDS[name]) is not None
    assert np.array_equal(gguf.dequantize(packed(torch.from_numpy(decoded), KINDS[name]), KINDS[name]), decoded)


@by_kind
def test_other_weights_have_no_codes(name: str) -> None:
    weight = on_grid(name)
    weight[7, 11] += 1e-3
    assert codes_of(weight, KINDS[name]) is None
    assert codes_of(weight[:, :40], KINDS[name]) is None
    assert codes_of(torch.full((2, 32), torch.nan), KINDS[name]) is None


def test_experts_in_one_tensor_are_packed_one_after_another() -> None:
    weight = torch.stack([on_grid("q4_0", seed) for seed in range(3)])
    found = packed(weight, Kind.Q4_0)
    assert found.shape == (3, 12, 96 // 32 * 18)
    assert torch.equal(torch.from_numpy(gguf.dequantize(found, Kind.Q4_0)), weight)


@pytest.mark.e2e
@pytest.mark.parametrize("name", KINDS)
def test_a_folder_on_the_grid_is_exported_without_a_change(name: str, tmp_path: Path) -> None:
    model = tiny_llama()
    prune(model, batches(), Recipe(units="weights", sparsity=0.5, solver="wanda", bits=name))
    written = export(save_tiny(model, tmp_path / "model"), tmp_path / "model.gguf", GgufFile(kind=name))
    read = load_model(written.path, dtype="float32").decoder()
    for index, block in enumerate(Decoder(model).blocks):
        for path in read.paths(index):
            assert torch.equal(read.layer(index, path).weight, block.get_submodule(path).weight), path
            assert int((read.layer(index, path).weight == 0).sum()) >= block.get_submodule(path).weight.numel() // 2
