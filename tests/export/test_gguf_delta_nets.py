"""Qwen3.5, its mixture and Qwen3-Next as GGUF files: gated delta networks beside gated attention."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

import optprune
from optprune.errors import InputError
from optprune.export import GgufFile, ModelSource, export
from optprune.models import Decoder, Mlp, Values
from optprune.models.units import KvGroups, LinkedUnits, RecurrentHeads
from optprune.program import RUNTIMES
from optprune.recipe import Recipe, load_recipe
from tests.helpers.gguf_models import PROMPT, apart, cut, expected_of, made, saved
from tests.helpers.llama_cpp import LlamaCpp

NETS = {"qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text", "qwen3next": "qwen3_next"}
"""llama.cpp's names of the families, which are tried every day"""
LINEAR, FULL = "linear_attention", "full_attention"
LONG = torch.randint(5, 500, (150,), generator=torch.Generator().manual_seed(1))
"""more tokens than the delta rule takes at a time"""
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 500.0, "partial_rotary_factor": 0.75}
YARN |= {"original_max_position_embeddings": 2048}
WIDE_HEADS: dict[str, Any] = {"head_dim": 32, "rope_parameters": YARN}
MANY_HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 12}


def written(model: PreTrainedModel, folder: Path, kind: str = "f32") -> Path:
    return export(saved(model, folder / "model"), folder / "model.gguf", GgufFile(kind=kind)).path


def check_alike(net: str, model: PreTrainedModel, folder: Path, prompt: torch.Tensor = PROMPT) -> None:
    file = written(model, folder)
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == net
    expected, tolerance = expected_of(folder / "model", prompt)
    assert apart(file, expected, prompt) < tolerance


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True, "linear_conv_kernel_dim": 3},
        {"linear_num_value_heads": 2},
        MANY_HEADS,
        WIDE_HEADS,
        {**WIDE_HEADS, "rope_parameters": {**YARN, "rope_type": "linear"}},
        {"layer_types": [FULL, LINEAR, LINEAR, FULL]},
    ],
    ids=["plain", "tied", "a value head each", "three value heads each", "yarn", "linear", "another order"],
)
@pytest.mark.parametrize("net", NETS)
def test_answers_are_those_of_transformers(net: str, fields: dict[str, Any], tmp_path: Path) -> None:
    check_alike(net, made(NETS[net], **fields), tmp_path, LONG)


@pytest.mark.parametrize(
    "counts",
    [
        {RecurrentHeads(): 3},
        {KvGroups(): 1},
        {Values(): 12},
        {Mlp(): 96},
        {RecurrentHeads(): 3, KvGroups(): 1, Values(): 12, Mlp(): 96},
    ],
    ids=["recurrent heads", "KV groups", "values", "MLP", "all"],
)
@pytest.mark.parametrize("net", NETS)
def test_units_of_each_kind_that_are_gone(net: str, counts: dict[LinkedUnits, int], tmp_path: Path) -> None:
    """Blocks may lack other value dimensions than the first ones, whose rows in the queries' layer go too."""
    blocks = [1] if counts == {Values(): 12} else range(4)
    check_alike(net, cut(made(NETS[net], **MANY_HEADS), counts, blocks), tmp_path)


@pytest.mark.parametrize("net", NETS)
def test_each_token_of_a_text(net: str, tmp_path: Path) -> None:
    """The states are carried from one token to the next, and over more of them at a time."""
    file = written(cut(made(NETS[net]), {RecurrentHeads(): 1}), tmp_path)
    found = LlamaCpp(file).log_likelihoods(LONG[None, :90])
    model = optprune.load_model(tmp_path / "model", device="cpu").model.float().eval()
    with torch.no_grad():
        every = model(input_ids=LONG[None, :90]).logits.double().log_softmax(-1)
    expected = every[:, :-1].gather(-1, LONG[None, 1:90, None])[..., 0]
    assert float((found - expected).abs().max()) < 2e-4


def test_single_weights_that_are_zero(tmp_path: Path) -> None:
    """Of a model whose own answers change by 2e-5 where its embeddings are rounded otherwise."""
    decoder = Decoder(made("qwen3_5_text", seed=1))
    with torch.no_grad():
        for block in range(4):
            for path in decoder.paths(block):
                weight = decoder.layer(block, path).weight
                weight[weight.abs() < weight.abs().median()] = 0
    check_alike("qwen35", decoder.joined(), tmp_path)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("block", "mixer", "left", "period"),
    [(0, "recurrent", [False, True, False], None), (3, "attention", [True, False, True], 2)],
)
def test_blocks_that_are_gone(
    net: str, block: int, mixer: str, left: list[bool], period: int | None, tmp_path: Path
) -> None:
    """The file lists which are recurrent; what older builds read instead is there where it says the same."""
    decoder = Decoder(made(NETS[net]))
    for part in (mixer, "mlp"):
        decoder.remove(block, part)
    decoder.record_shapes()
    check_alike(net, decoder.joined(), tmp_path)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields[f"{net}.attention.recurrent_layers"].contents() == left
    interval = fields.get(f"{net}.full_attention_interval")
    assert (interval and interval.contents()) == period
    notes = export(tmp_path / "model", tmp_path / "again.gguf", GgufFile()).notes
    assert ("does not read attention.recurrent_layers does not load" in "".join(notes)) == (period is None)


def test_sections_cover_all_rotated_pairs(tmp_path: Path) -> None:
    """As in the published models: 64 of 256 dimensions."""
    model = made("qwen3_5_text", head_dim=256, num_hidden_layers=2, partial_rotary_factor=0.25)
    fields = gguf.GGUFReader(written(model, tmp_path)).fields
    assert fields["qwen35.rope.dimension_sections"].contents() == [11, 11, 10, 0]
    assert fields["qwen35.rope.dimension_count"].contents() == 64


@pytest.mark.parametrize("net", NETS)
def test_states_stay_float32(net: str, tmp_path: Path) -> None:
    file = written(made(NETS[net]), tmp_path, "q8_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    for name in ("ssm_a", "ssm_dt.bias", "ssm_conv1d.weight", "ssm_norm.weight"):
        assert kinds[f"blk.0.{name}"] == gguf.GGMLQuantizationType.F32
    for name in ("attn_qkv.weight", "attn_gate.weight", "ssm_out.weight"):
        # Both have rows of 64 or 32 numbers.
        assert kinds[f"blk.0.{name}"] == gguf.GGMLQuantizationType.Q8_0
    assert LlamaCpp(file).log_probabilities(PROMPT)


def test_an_importance_goes_with_the_order_of_value_heads(tmp_path: Path) -> None:
    source = ModelSource(saved(made("qwen3_5_text"), tmp_path / "model"))
    targets = {target.name: target for target in GgufFile(kind="q8_0").targets(source)}
    numbers = torch.arange(32.0)
    found = targets["blk.0.ssm_out.weight"].importance({"model.layers.0.linear_attn.out_proj": numbers})
    heads = numbers.view(4, 8)
    assert found is not None and torch.equal(found, heads[[0, 2, 1, 3]].flatten())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"linear_value_head_dim": 12}, "a delta network whose heads have 8 key dimensions and 12 value dimensions"),
    ({"rms_norm_eps": 1e-5}, "a delta network with an rms_norm_eps of 1e-05 in place of 1e-06"),
    ({"layer_types": [FULL] * 4}, "a qwen3_.* model without delta networks"),
    ({"attention_bias": True}, "biases of linear layers, as model.layers.1.self_attn.q_proj.bias"),
    ({"hidden_act": "gelu"}, "an MLP with the activation gelu"),
    ({"rope_parameters": {**YARN, "attention_factor": 1.5}}, "a yarn scaling beside .* with attention_factor"),
    ({"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.7}}, "a yarn scaling beside .* with mscale"),
    ({"rope_parameters": {**YARN, "truncate": False}}, "a yarn scaling beside .* with truncate false"),
    ({"rope_parameters": {**YARN, "beta_fast": 16}}, "a yarn scaling beside .* with another beta_fast than 32"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[str(one[0]) for one in REFUSED])
@pytest.mark.parametrize("net", NETS)
def test_other_models_are_refused_by_name(net: str, fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = saved(made(NETS[net], **fields), tmp_path / "model")
    with pytest.raises(InputError, match=f"^llama.cpp does not support {sentence}.*: the model cannot be exported"):
        export(folder, tmp_path / "model.gguf", GgufFile())
    assert not (tmp_path / "model.gguf").exists()


def test_a_mixture_whose_weights_do_not_add_up_is_refused(tmp_path: Path) -> None:
    folder = saved(made("qwen3_next", norm_topk_prob=False), tmp_path / "model")
    with pytest.raises(InputError, match="does not support routers with norm_topk_prob False"):
        export(folder, tmp_path / "model.gguf", GgufFile())


@pytest.mark.parametrize("net", NETS)
def test_a_scaling_whose_divisors_the_graph_leaves_out_is_refused(net: str, tmp_path: Path) -> None:
    llama3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = made(NETS[net], rope_parameters=llama3)
    sentence = "rotary embeddings scaled by llama3 .*only default, linear, yarn"
    with pytest.raises(InputError, match=sentence):
        export(saved(model, tmp_path / "model"), tmp_path / "model.gguf", GgufFile())
    with pytest.raises(InputError, match="rotary embeddings scaled by llama3: it takes default, linear, yarn"):
        RUNTIMES["gguf"].fitted(Recipe(units="mlp"), Decoder(model))


@pytest.mark.parametrize(("block", "part"), [(0, "mlp"), (0, "recurrent"), (1, "attention")])
def test_blocks_without_a_part_are_refused(block: int, part: str, tmp_path: Path) -> None:
    decoder = Decoder(made("qwen3_5_text"))
    decoder.remove(block, part)
    decoder.record_shapes()
    with pytest.raises(InputError, match="blocks of a qwen35 model that differ in shape"):
        export(saved(decoder.joined(), tmp_path / "model"), tmp_path / "model.gguf", GgufFile())


@pytest.mark.parametrize("counts", [{RecurrentHeads(): 1}, {Mlp(): 96}])
def test_mixers_and_mlps_that_differ_are_refused(counts: dict[LinkedUnits, int], tmp_path: Path) -> None:
    folder = saved(cut(made("qwen3_5_text"), counts, [0]), tmp_path / "model")
    with pytest.raises(InputError, match="blocks of a qwen35 model that differ in shape"):
        export(folder, tmp_path / "model.gguf", GgufFile())


@pytest.mark.parametrize("net", NETS)
def test_the_target_takes_what_the_export_takes(net: str) -> None:
    decoder, target = Decoder(made(NETS[net]).to("meta")), RUNTIMES["gguf"]  # type: ignore[arg-type]
    target.fitted(load_recipe("depth", {"allocation.parts": "layers"}), decoder)
    target.fitted(Recipe(units="kv-groups", sparsity=0.1), decoder)
    target.fitted(Recipe(units="recurrent-heads", sparsity=0.03), decoder)
    with pytest.raises(InputError, match="does not take blocks without attention or without an MLP"):
        target.fitted(load_recipe("depth", {"allocation.parts": "mlp"}), decoder)
    with pytest.raises(InputError, match="does not take blocks of different shapes"):
        target.fitted(load_recipe("structured_best"), decoder)
