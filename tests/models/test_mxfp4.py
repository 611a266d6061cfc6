"""Experts in MXFP4: the numbers of transformers' own function, in memory and from files, and folders without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import optprune
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import Decoder, load_model, open_model
from optprune.models.mxfp4 import unpacked
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.packed_experts import packed_folder, write_config
from tests.helpers.token_batches import batches

TOKENS = torch.arange(10, 58)[None]
WHERE = "model.layers.1.mlp.experts"


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether the bits are the same, the sign of a zero among them."""
    return found.dtype == expected.dtype and torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_every_byte_with_every_scale_is_the_number_of_transformers() -> None:
    """But for the last scale, which stands for no number."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16)
    found, expected = unpacked(blocks, scales), convert_moe_packed_tensors(blocks[None], scales[None])[0].t()
    assert found.dtype == torch.bfloat16 and same(found, expected.contiguous())
    # Each scale has 15 numbers, half of which are not among those of the scale below.
    assert 1000 < found.unique().numel() < 1100


def stock(folder: Path) -> Any:
    """What transformers makes of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))


def test_a_loaded_model_is_that_of_transformers(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    model, expected = load_model(folder, device="cpu").model, stock(folder)
    assert type(model) is type(expected) and model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(same(weight, expected.state_dict()[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_wider_floats_are_the_same_numbers(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    model, expected = load_model(folder, dtype="float32", device="cpu").model, stock(folder).state_dict()
    assert all(torch.equal(weight, expected[name].float()) for name, weight in model.state_dict().items())


def test_blocks_are_read_one_by_one(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    opened, whole = open_model(folder).decoder(), Decoder(stock(folder))
    for block in range(2):
        with opened.resident(block):
            found, expected = opened.weights(block), whole.weights(block)
            assert found.keys() == expected.keys()
            assert all(same(found[name], weight) for name, weight in expected.items())
            assert all(found[name].stride() == weight.stride() for name, weight in expected.items())


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("experts_best", {"sparsity": 0.17}), ("fasp", {"units": "mlp", "sparsity": 0.2}), ("sparsegpt", {})],
)
def test_a_pruned_folder_holds_floats_and_is_the_same_from_files(
    recipe: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = packed_folder(tmp_path / "dense")
    model, streamed = load_model(folder, device="cpu").model, open_model(folder, device="cpu")
    prune(model, batches(), load_recipe(recipe, settings))
    prune(streamed.model, batches(), load_recipe(recipe, settings), store=streamed.store)
    assert save_model(streamed, tmp_path / "out", check_tokens=TOKENS).stock
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}
    assert not any(name.endswith(("_blocks", "_scales")) for name in written)
    again, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(same(weight, expected[name]) for name, weight in again.state_dict().items())


def changed(folder: Path, change: Any) -> Path:
    """The folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def without_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{WHERE}.down_proj_scales"]


def with_fewer_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{WHERE}.down_proj_scales"] = tensors[f"{WHERE}.down_proj_scales"][:, :, :1].clone()


def with_scales_of_floats(tensors: dict[str, Tensor]) -> None:
    tensors[f"{WHERE}.down_proj_scales"] = tensors[f"{WHERE}.down_proj_scales"].float()


def with_a_scale_of_no_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{WHERE}.down_proj_scales"][2, 5, 1] = 255


MISFIT = f"{WHERE}.down_proj of .* is in mxfp4, but its blocks and scales do not fit together: fetch the weights again"


@pytest.mark.parametrize("read", [load_model, open_model])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_scales, MISFIT),
        (with_fewer_scales, MISFIT),
        (with_scales_of_floats, MISFIT),
        (with_a_scale_of_no_number, f"{WHERE}.* of .* holds NaN or infinity: the checkpoint is damaged"),
    ],
)
def test_damaged_ones_are_refused(read: Any, change: Any, sentence: str, tmp_path: Path) -> None:
    folder = changed(packed_folder(tmp_path), change)
    with pytest.raises(InputError, match=sentence):
        loaded = read(folder)
        with loaded.decoder().resident(1):
            pass


def test_bytes_of_another_name_or_family_and_other_methods_are_refused(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "gpt_oss")
    write_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(InputError, match=r"is quantised \(bitsandbytes\), which is not read"):
        optprune.load_model(folder)
    write_config(folder, quantization_config=None)
    changed(folder, lambda tensors: tensors.update({"model.layers.0.bytes": torch.zeros(3, dtype=torch.uint8)}))
    with pytest.raises(InputError, match="hold 9 tensors that a gpt_oss model does not have"):
        load_model(folder)
    with pytest.raises(InputError, match="holds tensors of U8, but pruning needs plain weights"):
        open_model(folder)
