"""Quantised checkpoints: the weights that their numbers and scales stand for, in memory and from files."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from optprune.cli import main
from optprune.errors import InputError
from optprune.export import PackedFolder, export, save_model
from optprune.models import Decoder, load_model, open_model
from optprune.models.quantised import Quantisation
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.attempts import Attempt
from tests.helpers.packed_experts import write_config
from tests.helpers.quantised_folders import (
    GROUP,
    Quantise,
    awq,
    change_tensors,
    fp8,
    fp8_rows,
    gptq,
    integers_of,
    meant_by,
    quantised_folder,
)
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import save_tiny, tiny_llama

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
TOKENS = torch.arange(10, 58)[None]


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    """Return the config of compressed-tensors for one kind of weights."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}, "ignore": []}


def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Quantise to four bits in the words of compressed-tensors' own function, with zero points."""
    integers, zeros, scales = integers_of(weight, 4, GROUP)
    parts = {
        ".weight_packed": pack_to_int32((integers - 8).to(torch.int8), 4),
        ".weight_scale": scales.half(),
        ".weight_zero_point": pack_to_int32((zeros - 8).to(torch.int8), 4, packed_dim=0),
        ".weight_shape": torch.tensor(weight.shape),
    }
    return parts, meant_by(integers, zeros, scales, torch.arange(weight.shape[1]) // GROUP)


def nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Quantise to floats of four bits by compressed-tensors' own functions."""
    whole = 448 * 6 / weight.abs().max()
    scales = (weight.unflatten(1, (-1, GROUP)).abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
    spread = scales.float().repeat_interleave(GROUP, 1) / whole
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = sizes[((weight / spread).abs()[..., None] - sizes).abs().argmin(-1)] * weight.sign()
    parts = {
        ".weight_packed": pack_fp4_to_uint8(nearest),
        ".weight_scale": scales,
        ".weight_global_scale": whole.reshape(1),
    }
    return parts, nearest.double() * spread.double()


def modelopt_nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Store NVFP4 as ModelOpt does, with the scale of the matrix as a factor."""
    parts, meant = nvfp4(weight)
    whole = 1 / parts[".weight_global_scale"][0]
    meant *= whole.double() * parts[".weight_global_scale"].double()  # its rounding
    names = {".weight": ".weight_packed", ".weight_scale": ".weight_scale"}
    return {name: parts[other] for name, other in names.items()} | {".weight_scale_2": whole}, meant


def powers_of_two(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Quantise to FP8 with scales of blocks of 16 in E8M0, which are powers of two."""
    blocks = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
    scales = torch.exp2((blocks.abs().amax((1, 3)) / 448).log2().ceil())
    numbers = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = (numbers.double() * scales[:, None, :, None].double()).reshape(weight.shape)
    return {".weight": numbers.reshape(weight.shape), ".weight_scale_inv": scales.to(torch.float8_e8m0fnu)}, meant


FORMATS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "fp8": (fp8((16, 16)), FP8),
    "fp8, cut blocks": (fp8((48, 40)), {**FP8, "weight_block_size": [48, 40]}),
    "fp8, one scale": (fp8((10**6, 10**6)), {**FP8, "weight_block_size": None}),
    "fp8, scales that are powers of two": (powers_of_two, {**FP8, "scale_fmt": "ue8m0"}),
    "rows": (
        fp8_rows(torch.bfloat16),
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "one scale": (
        fp8_rows(torch.float32, one=True),
        compressed("naive-quantized", num_bits=8, type="float", strategy="tensor"),
    ),
    "blocks": (
        fp8((32, 16), ".weight_scale"),
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 16]),
    ),
    "words": (
        packed,
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False),
    ),
    "nvfp4": (nvfp4, compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=GROUP)),
    "modelopt, nvfp4": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "modelopt, fp8": (fp8_rows(torch.float32, one=True), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt, fp8 by blocks": (
        fp8((128, 128), ".weight_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
    ),
    "gptq": (gptq(), GPTQ),
    "gptq, groups in any order": (gptq(order=True), {**GPTQ, "desc_act": True}),
    "gptq, second version": (gptq(less=0), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq, eight bits": (gptq(bits=8), {**GPTQ, "bits": 8}),
    "awq": (awq, AWQ),
}
"""how a layer is quantised, and what the config says"""


@pytest.mark.parametrize("name", FORMATS)
def test_layers_are_read_as_what_they_stand_for(name: str, tmp_path: Path) -> None:
    quantise, config = FORMATS[name]
    folder, expected = quantised_folder(tmp_path / "model", "llama", quantise, config)
    found = load_model(folder, dtype="float32", device="cpu").model.state_dict()
    assert len(expected) == 14
    for layer, weight in expected.items():
        # A product of two float32 numbers, rounded once.
        assert torch.allclose(found[layer].double(), weight, rtol=torch.finfo(torch.float32).eps, atol=0), layer
    loaded = load_model(folder, device="cpu").model
    assert loaded.dtype == torch.bfloat16 and getattr(loaded.config, "quantization_config", None) is None
    opened = open_model(folder, device="cpu")
    decoder, whole = opened.decoder(), Decoder(loaded)
    for block in range(2):
        with decoder.resident(block):
            assert all(torch.equal(weight, whole.weights(block)[own]) for own, weight in decoder.weights(block).items())


def said_beside(folder: Path, **said: Any) -> None:
    """Move what the config says of a quantisation into ModelOpt's own file."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = {name: value for name, value in fields.pop("quantization_config").items() if name != "quant_method"}
    told = {"producer": {"name": "modelopt"}, "quantization": {**own, "exclude_modules": ["lm_head"], **said}}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "hf_quant_config.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.mark.parametrize("name", ["modelopt, nvfp4", "modelopt, fp8", "modelopt, fp8 by blocks"])
def test_a_file_of_modelopt_says_it_alone(name: str, tmp_path: Path) -> None:
    folder, expected = quantised_folder(tmp_path / "model", "llama", *FORMATS[name])
    said_beside(folder, kv_cache_quant_algo="FP8")
    found = load_model(folder, dtype="float32", device="cpu")
    for layer, weight in expected.items():
        read = found.model.state_dict()[layer].double()
        assert torch.allclose(read, weight, rtol=torch.finfo(torch.float32).eps, atol=0), layer
    save_model(found, tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert torch.equal(load_model(tmp_path / "out").model(TOKENS).logits, found.model(TOKENS).logits)


def test_a_file_of_modelopt_that_says_another_method_is_refused(tmp_path: Path) -> None:
    folder, _ = quantised_folder(tmp_path / "model", "llama", *FORMATS["modelopt, fp8"])
    said_beside(folder, quant_algo="MIXED_PRECISION")
    with pytest.raises(InputError, match=r"is quantised \(modelopt, by the algorithm 'MIXED_PRECISION'\)"):
        load_model(folder)
    for text, why in (("[]", "does not say how the model is quantised"), ("{", "hf_quant_config.json is not valid")):
        (folder / "hf_quant_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=why):
            load_model(folder)


def test_scales_of_blocks_by_dimensions_of_the_matrix(tmp_path: Path) -> None:
    """As ModelOpt's exports have them: [blocks of rows, 1, blocks of columns, 1]."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, meant = fp8((128, 128), ".weight_scale")(weight)
        return {**parts, ".weight_scale": parts[".weight_scale"][:, None, :, None]}, meant

    fields = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    said = FORMATS["modelopt, fp8 by blocks"][1]
    folder, expected = quantised_folder(tmp_path / "model", "llama", quantise, said, **fields)
    found = load_model(folder, dtype="float32", device="cpu").model.state_dict()
    assert found["model.layers.0.mlp.up_proj.weight"].shape == (384, 256)
    for layer, weight in expected.items():
        assert torch.allclose(found[layer].double(), weight, rtol=torch.finfo(torch.float32).eps, atol=0), layer


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_fp8_is_what_transformers_makes_of_it(family: str, tmp_path: Path) -> None:
    # Whole blocks: of cut ones transformers takes others than DeepSeek's checkpoints have.
    config = {**FP8, "weight_block_size": [8, 8]}
    folder, _ = quantised_folder(tmp_path / "model", family, fp8((8, 8)), config)
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    found, expected = load_model(folder, device="cpu").model, stock.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.state_dict().items())


def test_what_we_pack_is_read_again(tmp_path: Path) -> None:
    model = tiny_llama()
    settings = {"kind": "w4a16_shifted", "group": 32}
    prune(model, batches(), Recipe({"units": "weights", "sparsity": 0.3, "solver": "wanda", "bits": settings}))
    folder = save_tiny(model, tmp_path / "model")
    export(folder, tmp_path / "packed", PackedFolder())
    found, expected = load_model(tmp_path / "packed", device="cpu").model.state_dict(), model.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("name", "family", "recipe", "settings"),
    [
        ("fp8", "qwen3_moe", "experts_best", {"sparsity": 0.25}),
        ("gptq", "llama", "fasp", {"sparsity": 0.2, "units": "mlp"}),
        ("awq", "llama", "sparsegpt", {}),
    ],
)
def test_a_pruned_folder_holds_floats_and_is_the_same_from_files(
    name: str, family: str, recipe: str, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    folder, _ = quantised_folder(tmp_path / "dense", family, *FORMATS[name])
    model, streamed = load_model(folder, device="cpu").model, open_model(folder, device="cpu")
    prune(model, batches(), load_recipe(recipe, settings))
    prune(streamed.model, batches(), load_recipe(recipe, settings), store=streamed.store)
    assert save_model(streamed, tmp_path / "out", check_tokens=TOKENS).stock
    again, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.state_dict().items())


def test_the_command_says_that_floats_are_saved(attempt: Attempt, tmp_path: Path) -> None:
    folder, _ = quantised_folder(tmp_path / "model", "llama", *FORMATS["fp8"])
    quantised = Attempt(folder, attempt.text, tmp_path, attempt.capsys)
    assert main(quantised.command("--recipe", "fasp")) == 0
    said = attempt.capsys.readouterr().err
    assert said.count("its weights are stored in fp8: they are read and saved as floats") == 1
    assert main(["audit", str(quantised.output), "--against", str(folder)]) == 0


# -- what is refused


LAYER = "model.layers.1.mlp.up_proj"
MISFIT = f"{LAYER} of .* is in {{}}, but its numbers and scales do not fit together: fetch the weights again"


def without(ending: str) -> Any:
    return lambda tensors: tensors.pop(LAYER + ending)


def shorter(ending: str) -> Any:
    return lambda tensors: tensors.update({LAYER + ending: tensors[LAYER + ending][:-1].clone()})


@pytest.mark.parametrize("read", [load_model, open_model])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fp8", without(".weight_scale_inv")),
        ("fp8", shorter(".weight_scale_inv")),
        ("rows", shorter(".weight_scale")),
        ("words", without(".weight_scale")),
        ("words", shorter(".weight_zero_point")),
        ("nvfp4", shorter(".weight_scale")),
        ("modelopt, nvfp4", without(".weight_scale_2")),
        ("gptq", without(".qzeros")),
        ("gptq", shorter(".g_idx")),
        ("gptq", shorter(".qzeros")),
        ("awq", shorter(".scales")),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, change: Any, read: Any, tmp_path: Path) -> None:
    quantise, config = FORMATS[name]
    folder, _ = quantised_folder(tmp_path, "llama", quantise, config)
    change_tensors(folder, change)
    with pytest.raises(InputError, match=MISFIT.format(config["quant_method"])):
        read(folder)


@pytest.mark.parametrize("read", [load_model, open_model])
def test_a_scale_of_no_number_is_refused(read: Any, tmp_path: Path) -> None:
    folder, _ = quantised_folder(tmp_path, "llama", *FORMATS["fp8"])
    change_tensors(folder, lambda tensors: tensors[f"{LAYER}.weight_scale_inv"].fill_(torch.nan))
    refused = pytest.raises(InputError, match=f"{LAYER}.weight of .* holds NaN or infinity")
    with refused, read(folder).decoder().resident(1):
        pass


def test_numbers_without_a_config_are_refused(tmp_path: Path) -> None:
    folder, _ = quantised_folder(tmp_path, "llama", *FORMATS["fp8"])
    write_config(folder, quantization_config=None)
    with pytest.raises(InputError, match="holds tensors of F8_E4M3, but pruning needs plain weights"):
        open_model(folder)


WORDS = FORMATS["words"][1]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "bitsandbytes"}, r"\(bitsandbytes\)"),
        ({"bits": 4}, r"\(by an unnamed method\)"),
        ({**GPTQ, "bits": 3}, r"\(gptq, with 3 bits\)"),
        ({**AWQ, "version": "gemv"}, r"\(awq, in the version 'gemv' with 4 bits\)"),
        ({**FP8, "expert_dtype": "fp4"}, r"\(fp8, with experts in another format than FP8, or scales in one"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"\(modelopt, by the algorithm 'W4A8_AWQ'\)"),
        (compressed("marlin-24", num_bits=4), "in the format 'marlin-24'"),
        (compressed("int-quantized", num_bits=4, strategy="channel"), "in the format 'int-quantized'"),
        ({**WORDS, "sparsity_config": {"format": "sparse-24"}}, "with sparse or transformed weights"),
        (compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False), "with zero points beside"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "its settings are not known"),
    ],
)
def test_other_methods_are_refused_by_name(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path)
    write_config(folder, quantization_config=config)
    with pytest.raises(InputError, match=why) as refused:
        load_model(folder)
    methods = "fp8, compressed-tensors, modelopt, gptq or awq"
    assert f"load the unquantised original, or one in {methods}" in str(refused.value)
    before = copy.deepcopy(config)
    Quantisation.of(config)
    assert config == before
