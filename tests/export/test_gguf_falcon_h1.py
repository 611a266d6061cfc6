"""Falcon-H1 as a GGUF file: attention and Mamba 2 side by side, with the multipliers in the weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

import optprune
from optprune.errors import InputError
from optprune.export import GgufFile, export
from optprune.export.gguf_families import FAMILIES
from optprune.models import Decoder, Mlp, Values
from optprune.models.units import KvGroups, LinkedUnits
from optprune.program import RUNTIMES
from optprune.recipe import Recipe, load_recipe
from tests.helpers.gguf_models import PROMPT, apart, cut, expected_of, made, saved
from tests.helpers.llama_cpp import LlamaCpp

LONG = torch.randint(5, 500, (150,), generator=torch.Generator().manual_seed(1))


def model_of(**fields: Any) -> PreTrainedModel:
    return made("falcon_h1", **fields)


def written(model: PreTrainedModel, folder: Path, kind: str = "f32") -> Path:
    return export(saved(model, folder / "model"), folder / "model.gguf", GgufFile(kind=kind)).path


def check_alike(model: PreTrainedModel, folder: Path, prompt: torch.Tensor = PROMPT) -> None:
    file = written(model, folder)
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == "falcon-h1"
    expected, tolerance = expected_of(folder / "model", prompt)
    assert apart(file, expected, prompt) < tolerance


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"mamba_rms_norm": False, "mamba_norm_before_gate": True},
        {"mamba_n_groups": 1, "mamba_d_ssm": None, "mamba_d_head": "auto", "rms_norm_eps": 1e-2},
        {"mamba_d_conv": 3, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e11}},
    ],
    ids=["plain", "tied", "no norm", "one group", "linear", "far positions"],
)
def test_answers_are_those_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    check_alike(model_of(**fields), tmp_path, LONG)


@pytest.mark.parametrize(
    "counts",
    [{KvGroups(): 1}, {Values(): 12}, {Mlp(): 96}, {KvGroups(): 1, Values(): 12, Mlp(): 96}],
    ids=["KV groups", "values", "MLP", "all"],
)
def test_units_of_each_kind_that_are_gone(counts: dict[LinkedUnits, int], tmp_path: Path) -> None:
    blocks = [1] if counts == {Values(): 12} else range(4)
    check_alike(cut(model_of(), counts, blocks), tmp_path)


def test_each_token_of_a_text(tmp_path: Path) -> None:
    found = LlamaCpp(written(model_of(), tmp_path)).log_likelihoods(LONG[None, :90])
    model = optprune.load_model(tmp_path / "model", device="cpu").model.float().eval()
    with torch.no_grad():
        every = model(input_ids=LONG[None, :90]).logits.double().log_softmax(-1)
    expected = every[:, :-1].gather(-1, LONG[None, 1:90, None])[..., 0]
    assert float((found - expected).abs().max()) < 1e-4


FACTORS = {
    **dict.fromkeys(
        ("model.embed_tokens.weight", "lm_head.weight", "feed_forward.gate_proj", "feed_forward.down_proj"), 1
    ),
    **dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), 1),
    **{"mamba.in_proj": 5, "mamba.out_proj": 1},
}
"""the layers whose weights are multiplied, each by so many numbers"""
PLACES = [(path, place) for path, count in FACTORS.items() for place in range(count)]


@pytest.mark.parametrize(("path", "place"), PLACES)
def test_a_multiplier_that_is_left_out_is_noticed(
    path: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["falcon_h1"]

    def without_one(config: Any) -> dict[str, Sequence[float]]:
        every = {name: list(numbers) for name, numbers in family.factors(config).items()}
        assert {name: len(numbers) for name, numbers in every.items()} == FACTORS
        every[path][place] = 1.0
        return {**every}

    monkeypatch.setitem(FAMILIES, "falcon_h1", replace(family, factors=without_one))
    file = written(model_of(num_hidden_layers=2), tmp_path)
    expected, tolerance = expected_of(tmp_path / "model", PROMPT)
    assert apart(file, expected, PROMPT) > 100 * tolerance


def test_single_weights_that_are_zero(tmp_path: Path) -> None:
    decoder = Decoder(model_of())
    with torch.no_grad():
        for block in range(4):
            for path in decoder.paths(block):
                weight = decoder.layer(block, path).weight
                weight[weight.abs() < weight.abs().median()] = 0
    check_alike(decoder.joined(), tmp_path)


def test_a_block_that_is_gone(tmp_path: Path) -> None:
    decoder = Decoder(model_of())
    for part in ("attention", "recurrent", "mlp"):
        decoder.remove(1, part)
    decoder.record_shapes()
    check_alike(decoder.joined(), tmp_path)


def test_states_stay_float32(tmp_path: Path) -> None:
    file = written(model_of(), tmp_path, "q8_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    for name in (
        "ssm_a",
        "ssm_d",
        "ssm_dt.bias",
        "ssm_conv1d.weight",
        "ssm_conv1d.bias",
        "ssm_norm.weight",
        "ffn_norm",
    ):
        assert kinds[f"blk.0.{name}"] == gguf.GGMLQuantizationType.F32
    for name in ("ssm_in.weight", "ssm_out.weight", "attn_q.weight"):
        assert kinds[f"blk.0.{name}"] == gguf.GGMLQuantizationType.Q8_0
    assert LlamaCpp(file).log_probabilities(PROMPT)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mamba_norm_before_gate": True}, r"a Mamba 2 with a norm before the gate \(mamba_norm_before_gate\)"),
    ({"mamba_conv_bias": False}, "a Mamba 2 whose convolution has no bias"),
    ({"time_step_limit": (0.0, 0.1)}, "a Mamba 2 whose steps are limited to 0 to 0.1"),
    ({"hidden_act": "gelu"}, "an MLP with the activation gelu"),
    ({"attention_bias": True}, "biases of linear layers, as model.layers.0.self_attn.q_proj.bias"),
    ({"mlp_bias": True}, "biases of linear layers, as model.layers.0.feed_forward.gate_proj.bias"),
    ({"mamba_proj_bias": True}, "biases of linear layers, as model.layers.0.mamba.in_proj.bias"),
    ({"projectors_bias": True}, "biases of linear layers, as model.layers.0.mamba.out_proj.bias"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[str(one[0]) for one in REFUSED])
def test_other_models_are_refused_by_name(fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = saved(model_of(**fields), tmp_path / "model")
    with pytest.raises(InputError, match=f"^llama.cpp does not support {sentence}: the model cannot be exported"):
        export(folder, tmp_path / "model.gguf", GgufFile())
    assert not (tmp_path / "model.gguf").exists()


def test_a_scaling_whose_divisors_the_graph_leaves_out_is_refused(tmp_path: Path) -> None:
    llama3 = {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    model = model_of(rope_parameters={**llama3, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
    with pytest.raises(InputError, match=r"rotary embeddings scaled by llama3 .*only default, linear"):
        export(saved(model, tmp_path / "model"), tmp_path / "model.gguf", GgufFile())


@pytest.mark.parametrize("part", ["attention", "recurrent", "mlp"])
def test_blocks_without_a_part_are_refused(part: str, tmp_path: Path) -> None:
    decoder = Decoder(model_of())
    decoder.remove(0, part)
    decoder.record_shapes()
    shapes = decoder.shapes()
    with pytest.raises(InputError, match="blocks of a falcon-h1 model that differ in shape"):
        export(saved(decoder.joined(), tmp_path / "model"), tmp_path / "model.gguf", GgufFile())
    dense = Decoder(model_of().to("meta"))  # type: ignore[arg-type]
    assert "remove whole layers" in str(RUNTIMES["gguf"].refuses(dense, shapes))


def test_the_target_takes_what_the_export_takes() -> None:
    decoder, target = Decoder(model_of().to("meta")), RUNTIMES["gguf"]  # type: ignore[arg-type]
    target.fitted(load_recipe("depth", {"allocation.parts": "layers"}), decoder)
    target.fitted(Recipe(units="kv-groups", sparsity=0.1), decoder)
    with pytest.raises(InputError, match="does not take blocks without attention or without an MLP"):
        target.fitted(load_recipe("depth"), decoder)
    with pytest.raises(InputError, match="does not take blocks of different shapes"):
        target.fitted(load_recipe("structured_best"), decoder)
