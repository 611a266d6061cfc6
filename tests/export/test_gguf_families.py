"""Every family that llama.cpp knows, as a GGUF file: cut, it gives the probabilities that transformers gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import tiny_llama, tiny_qwen2
from optprune.errors import InputError
from optprune.export import GgufFile, export
from optprune.export.gguf_families import FAMILIES
from optprune.models import Decoder, Mlp, Values
from optprune.models.units import KvGroups, LinkedUnits, RecurrentHeads
from optprune.program import RUNTIMES
from optprune.recipe import Recipe, load_recipe
from tests.helpers.gguf_models import (
    BENT,
    MIXED,
    NEAR,
    PROMPT,
    SCALED,
    THERE,
    YARN,
    apart,
    cut,
    expected_of,
    made,
    saved,
)
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.mixed_models import narrow

SOME_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
FULL, SLIDING = ["full_attention"], ["sliding_attention"]
FIXED_HEADS = ("exaone4", "gemma4_text", "gpt2", "gpt_neox", "lfm2", "olmo2", "olmoe", "phi3", "qwen2_moe")
"""of which all stay: their sizes add up to the hidden size there, or one norm goes over them"""


def check_alike(folder: Path, known_as: str) -> None:
    written = export(folder, folder.parent / "model.gguf", GgufFile(kind="f32"))
    expected, tolerance = expected_of(folder, PROMPT)
    assert written.summary == f"architecture {known_as}"
    assert apart(written.path, expected, PROMPT) < tolerance


def test_all_that_it_knows_is_tried() -> None:
    assert set(FAMILIES) == {*THERE, "llama", "qwen2"} == set(RUNTIMES["gguf"].families)


@pytest.mark.parametrize("family", THERE)
def test_units_that_are_gone(family: str, tmp_path: Path) -> None:
    """MLP units, and experts, value dimensions, and where they may be fewer there, heads."""
    model = made(family)
    heads = {} if family in FIXED_HEADS else {KvGroups(): 1}
    values = {} if family == "gemma4_text" else {Values(): 12}
    folder = saved(cut(model, {**heads, **values, Mlp(): 96}), tmp_path / "model")
    other = {"gemma3_text": "gemma3", "nemotron_h": "nemotron_h_moe"}
    check_alike(folder, other.get(family, FAMILIES[family].name))


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2", "olmoe", "qwen2_moe"])
def test_a_head_that_is_the_embeddings(family: str, tmp_path: Path) -> None:
    """Where llama.cpp wants a matrix of its own for it; those of the others are tied in the test above, or may be."""
    check_alike(saved(made(family, tie_word_embeddings=True), tmp_path / "model"), FAMILIES[family].name)


def test_heads_of_qwen2_that_do_not_make_up_the_hidden_size(tmp_path: Path) -> None:
    check_alike(saved(cut(tiny_qwen2(num_hidden_layers=4), {KvGroups(): 1}), tmp_path / "model"), "deci")


def test_windows_of_the_exaone4_that_it_knows_by_its_number_of_blocks(tmp_path: Path) -> None:
    """Blocks with a window rotate queries and keys there, and every fourth, without one, does not."""
    model = made("exaone4", num_hidden_layers=64, sliding_window=8, sliding_window_pattern=4, layer_types=None)
    check_alike(saved(cut(model, {Values(): 12, Mlp(): 96}, range(64)), tmp_path / "model"), "exaone4")


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family", ["exaone4", "granite", "granitemoehybrid", "mistral", "mixtral"])
def test_divisors_of_the_rotary_frequencies(family: str, tmp_path: Path) -> None:
    fields = {"position_embedding_type": "rope"} if family == "granitemoehybrid" else {}
    check_alike(saved(made(family, rope_parameters=LLAMA3, **fields), tmp_path / "model"), FAMILIES[family].name)


@pytest.mark.parametrize(
    "family",
    [
        *("gemma2", "gemma3_text", "glm4_moe", "gpt_neox", "gpt_oss", "lfm2", "olmo2", "olmoe", "qwen2", "qwen2_moe"),
        *("qwen3", "qwen3_moe", "seed_oss", "smollm3"),
    ],
)
def test_divisors_that_a_graph_does_not_know(family: str, tmp_path: Path) -> None:
    rotary = {"full_attention": LLAMA3, "sliding_attention": NEAR} if family == "gemma3_text" else LLAMA3
    model = tiny_qwen2(rope_parameters=rotary) if family == "qwen2" else made(family, rope_parameters=rotary)
    folder = saved(model, tmp_path / "model")
    with pytest.raises(InputError, match="rotary embeddings scaled by llama3 cannot be exported to GGUF, only default"):
        export(folder, tmp_path / "model.gguf", GgufFile())


@pytest.mark.parametrize("fields", [{"first_k_dense_replace": 0}, {"first_k_dense_replace": 2, "use_qk_norm": False}])
def test_first_blocks_of_a_glm4_moe(fields: dict[str, Any], tmp_path: Path) -> None:
    check_alike(saved(cut(made("glm4_moe", **fields), {Mlp(): 96}), tmp_path / "model"), "glm4moe")


GROUPS = {"n_routed_experts": 8, "n_group": 4}
UNSCALED = {"rope_type": "default", "rope_theta": 500.0, "mscale": 0.5, "mscale_all_dim": 0.3}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("deepseek_v2", {"q_lora_rank": None, "num_hidden_layers": 25}),
        ("deepseek_v3", {"q_lora_rank": None, "num_hidden_layers": 27}),
        ("deepseek_v3", {"tie_word_embeddings": True, "norm_topk_prob": False}),
        ("deepseek_v3", {"first_k_dense_replace": 0, "rope_parameters": UNSCALED}),
        (
            "deepseek_v2",
            {"first_k_dense_replace": 2, "rope_parameters": {**SCALED, "mscale": 1.0, "mscale_all_dim": 1.0}},
        ),
        ("deepseek_v3", {"first_k_dense_replace": 4}),
        ("deepseek_v3", {**GROUPS, "topk_group": 2}),
        ("deepseek_v3", {**GROUPS, "topk_group": 4}),
        ("deepseek_v2", {**GROUPS, "topk_group": 1}),  # of which its router takes no notice
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"] * 3 + ["sparse"], "n_shared_experts": 2}),
    ],
)
def test_models_with_latent_attention(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    check_alike(saved(made(family, **fields), tmp_path / "model"), "deepseek2")


@pytest.mark.parametrize(("blocks", "left"), [(range(4), 12), (range(1, 3), 16)])
def test_value_dimensions_of_latent_attention(blocks: range, left: int, tmp_path: Path) -> None:
    """The file is smaller where all blocks lose as many; otherwise zeros fill up to the largest number."""
    folder = saved(cut(made("deepseek_v3"), {Values(): 12}, blocks), tmp_path / "model")
    check_alike(folder, "deepseek2")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    shapes = {tensor.name: list(tensor.shape) for tensor in reader.tensors}
    assert reader.fields["deepseek2.attention.value_length_mla"].contents() == left
    assert shapes["blk.1.attn_v_b.weight"] == [24, left, 4] and shapes["blk.1.attn_k_b.weight"] == [12, 24, 4]


def test_two_shared_experts_are_filled_up_each(tmp_path: Path) -> None:
    """llama.cpp takes a shared expert to be so many times as wide as the others."""
    folder = saved(made("deepseek_v3", n_shared_experts=2), tmp_path / "model")
    written = export(folder, tmp_path / "model.gguf", GgufFile(kind="q8_0"))
    shapes = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(written.path).tensors}
    assert shapes["blk.1.ffn_down_exps.weight"] == (64, 64, 4) and shapes["blk.1.ffn_down_shexp.weight"] == (128, 64)
    assert LlamaCpp(written.path).log_probabilities(PROMPT)


def test_what_the_norms_of_low_rank_vectors_add_is_told(tmp_path: Path) -> None:
    folder = saved(made("deepseek_v3", rms_norm_eps=1e-2), tmp_path / "model")
    written = export(folder, tmp_path / "model.gguf", GgufFile(kind="f32"))
    [note] = written.notes
    assert note.startswith("llama.cpp adds the rms_norm_eps of 0.01 in the norms of low-rank vectors too")
    assert apart(written.path, expected_of(folder, PROMPT)[0], PROMPT) > 1e-3


def test_experts_narrower_than_the_shared_one_are_refused(tmp_path: Path) -> None:
    model = made("glm4_moe")
    decoder = Decoder(model)
    for block in range(1, 4):
        narrow(decoder, block, Mlp(), 40)
    decoder.record_shapes()
    sentence = "support experts of another width than the one that every token goes through in a glm4moe model:"
    with pytest.raises(InputError, match=sentence):
        export(saved(decoder.joined(), tmp_path / "model"), tmp_path / "model.gguf", GgufFile())


def test_a_ministral3_without_a_scaling_of_its_rotary_embeddings(tmp_path: Path) -> None:
    check_alike(saved(made("ministral3", rope_parameters={**YARN, "rope_type": "default"}), tmp_path / "m"), "mistral3")


@pytest.mark.parametrize(
    "fields", [{"conv_L_cache": 4, "tie_word_embeddings": False}, {"num_hidden_layers": 7, "full_attn_idxs": [0, 4, 5]}]
)
def test_convolutions_of_an_lfm2(fields: dict[str, Any], tmp_path: Path) -> None:
    check_alike(saved(made("lfm2", **fields), tmp_path / "model"), "lfm2")


def test_an_lfm2_without_some_of_its_blocks(tmp_path: Path) -> None:
    """The counts of KV heads say which blocks have a convolution, so any may go."""
    decoder = Decoder(made("lfm2", num_hidden_layers=5))
    for part in ("recurrent", "mlp"):
        decoder.remove(2, part)
    decoder.record_shapes()
    folder = saved(decoder.joined(), tmp_path / "model")
    check_alike(folder, "lfm2")
    heads = gguf.GGUFReader(tmp_path / "model.gguf").fields["lfm2.attention.head_count_kv"].contents()
    assert heads == [0, 2, 2, 0]


def test_a_kernel_of_a_convolution_stays_float32(tmp_path: Path) -> None:
    file = export(saved(made("lfm2"), tmp_path / "model"), tmp_path / "model.gguf", GgufFile(kind="q8_0")).path
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.shortconv.conv.weight"] == gguf.GGMLQuantizationType.F32
    assert kinds["blk.0.shortconv.in_proj.weight"] == gguf.GGMLQuantizationType.Q8_0
    assert LlamaCpp(file).log_probabilities(PROMPT)


DENSE = ["linear_attention", "mlp", "full_attention", "mlp"]


@pytest.mark.parametrize("counts", [{}, {Mlp(): 96, Values(): 12}], ids=["alike", "of several widths"])
@pytest.mark.parametrize("kinds", [DENSE * 2, ["full_attention", "mlp", *DENSE[:2], "mlp", *DENSE[:3]]])
def test_a_nemotron_h_without_experts(kinds: list[str], counts: dict[LinkedUnits, int], tmp_path: Path) -> None:
    """In any order; the file lists a width of each block, so that they may differ."""
    model = made("nemotron_h", num_hidden_layers=4, layer_types=kinds)
    check_alike(saved(cut(model, counts, range(1, 5)), tmp_path / "model"), "nemotron_h")


def test_a_nemotron_h_without_some_of_its_blocks(tmp_path: Path) -> None:
    decoder = Decoder(made("nemotron_h", num_hidden_layers=4, layer_types=DENSE * 2))
    for block, part in ((2, "attention"), (3, "mlp"), (4, "recurrent")):
        decoder.remove(block, part)
    decoder.record_shapes()
    check_alike(saved(decoder.joined(), tmp_path / "model"), "nemotron_h")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["nemotron_h.attention.head_count_kv"].contents() == [0, 0, 0, 2, 0]
    assert fields["nemotron_h.feed_forward_length"].contents() == [0, 128, 128, 0, 128]


def test_steps_of_any_size_are_those_of_transformers(tmp_path: Path) -> None:
    """time_step_min bounds how the biases are drawn, and nothing afterwards."""
    model = made("nemotron_h", layer_types=DENSE)
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("dt_bias"):
                bias.fill_(-40.0)
    check_alike(saved(model, tmp_path / "model"), "nemotron_h")


def test_groups_of_a_mamba2_beside_value_dimensions_that_are_gone(tmp_path: Path) -> None:
    """The config of such a folder has the dense model's counts still, and lists those of each block."""
    model = made("nemotron_h", num_hidden_layers=4, layer_types=DENSE * 2, n_groups=4, mamba_num_heads=8)
    folder = saved(cut(model, {RecurrentHeads(): 3, Values(): 12}, range(8)), tmp_path / "model")
    check_alike(folder, "nemotron_h")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["nemotron_h.ssm.group_count"].contents() == 3
    assert fields["nemotron_h.ssm.time_step_rank"].contents() == 6


def test_states_of_a_mamba2_stay_float32(tmp_path: Path) -> None:
    file = export(saved(made("nemotron_h"), tmp_path / "model"), tmp_path / "model.gguf", GgufFile(kind="q8_0")).path
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    for name in ("ssm_a", "ssm_d", "ssm_dt.bias", "ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_norm.weight"):
        assert kinds[f"blk.0.{name}"] == gguf.GGMLQuantizationType.F32
    for name in ("blk.0.ssm_in.weight", "blk.0.ssm_out.weight", "blk.1.ffn_up_exps.weight"):
        assert kinds[name] == gguf.GGMLQuantizationType.Q8_0
    assert LlamaCpp(file).log_probabilities(PROMPT)


@pytest.mark.parametrize(
    ("fields", "known_as"),
    [
        ({"position_embedding_type": "rope", "mamba_n_groups": 4, "tie_word_embeddings": True}, "granitehybrid"),
        ({"position_embedding_type": "rope", "layer_types": FULL * 4}, "granite"),
        ({"layer_types": FULL * 4}, "granite"),
        ({**SOME_EXPERTS, "position_embedding_type": "rope"}, "granitehybrid"),
    ],
)
def test_a_granite_4_with_other_blocks(fields: dict[str, Any], known_as: str, tmp_path: Path) -> None:
    """Rotary embeddings or none, and attention in all blocks, as in those that are called micro."""
    check_alike(saved(cut(made("granitemoehybrid", **fields), {Mlp(): 96, KvGroups(): 1}), tmp_path / "m"), known_as)


def test_halves_of_a_layer_are_two_there(tmp_path: Path) -> None:
    """Each is filled up for itself."""
    folder = saved(cut(made("granitemoehybrid"), {Mlp(): 88}), tmp_path / "model")
    tensors = {
        one.name: one for one in gguf.GGUFReader(export(folder, tmp_path / "m", GgufFile(kind="q8_0")).path).tensors
    }
    weight = load_file(folder / "model.safetensors")["model.layers.1.shared_mlp.input_linear.weight"]
    for name, half in zip(("gate", "up"), weight.chunk(2), strict=True):
        stored = torch.from_numpy(decoded(tensors[f"blk.1.ffn_{name}.weight"]))
        assert stored.shape == (96, 64) and not stored[88:].any()
        assert float((stored[:88] - half).abs().max()) < 0.01
    for name in ("ssm_a", "ssm_d", "ssm_dt.bias", "ssm_conv1d.weight", "ssm_norm.weight"):
        assert tensors[f"blk.0.{name}"].tensor_type == gguf.GGMLQuantizationType.F32


def decoded(tensor: gguf.ReaderTensor) -> Any:
    return gguf.dequantize(tensor.data, tensor.tensor_type).copy()


@pytest.mark.parametrize("kinds", [SLIDING * 4, [*SLIDING * 2, *FULL, *SLIDING]], ids=["all", "two of three"])
def test_windows_of_a_gpt_oss_in_other_blocks(kinds: list[str], tmp_path: Path) -> None:
    check_alike(saved(made("gpt_oss", layer_types=kinds), tmp_path / "model"), "gpt-oss")


def test_bounds_of_a_yarn_scaling_that_it_rounds_are_told(tmp_path: Path) -> None:
    """Its answers are those of the same model with whole bounds."""
    whole = {**BENT, "original_max_position_embeddings": 512}
    folder = saved(made("gpt_oss", rope_parameters={**whole, "truncate": False}), tmp_path / "model")
    rounded = saved(made("gpt_oss", rope_parameters=whole), tmp_path / "rounded")
    written = export(folder, tmp_path / "model.gguf", GgufFile(kind="f32"))
    [note] = written.notes
    assert "rounds the bounds of the yarn scaling to whole dimensions" in note
    assert apart(written.path, expected_of(rounded, PROMPT)[0], PROMPT) < 1e-4
    assert apart(written.path, expected_of(folder, PROMPT)[0], PROMPT) > 1e-3
    assert not export(rounded, tmp_path / "rounded.gguf", GgufFile(kind="f32")).notes


def test_biases_of_experts_stay_float32(tmp_path: Path) -> None:
    """Their units are filled up with zeros, whose answer is zero behind the clamped activation too."""
    folder = saved(cut(made("gpt_oss"), {Mlp(): 40}), tmp_path / "model")
    file = export(folder, tmp_path / "model.gguf", GgufFile(kind="q8_0")).path
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors if "_exps." in tensor.name}
    assert len(found) == 24
    for name, tensor in found.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name.endswith("weight") else gguf.GGMLQuantizationType.F32
        assert tensor.tensor_type == kind, name
    assert found["blk.0.ffn_gate_exps.bias"].data.shape == (3, 64)
    assert LlamaCpp(file).log_probabilities(PROMPT)


def test_windows_that_it_lacks_are_told(tmp_path: Path) -> None:
    """The answers are the same as far as a window goes."""
    folder = saved(made("mistral", sliding_window=8), tmp_path / "model")
    written = export(folder, tmp_path / "model.gguf", GgufFile(kind="f32"))
    [note] = written.notes
    assert "ignores the sliding windows of a llama model: its answers differ beyond 8 tokens" in note
    short = PROMPT[:8]
    assert apart(written.path, expected_of(folder, short)[0], short) < 1e-4
    assert apart(written.path, expected_of(folder, PROMPT)[0], PROMPT) > 1e-2


def test_a_router_stays_float32(tmp_path: Path) -> None:
    file = export(saved(made("qwen3_moe"), tmp_path / "model"), tmp_path / "model.gguf", GgufFile(kind="q8_0")).path
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_gate_inp.weight"] == gguf.GGMLQuantizationType.F32
    assert kinds["blk.0.ffn_up_exps.weight"] == gguf.GGMLQuantizationType.Q8_0


def test_a_file_of_the_model_without_its_head(tmp_path: Path) -> None:
    """As GPT-2's own is, which holds masks besides; a tensor that is missing is told."""
    folder = saved(made("gpt2"), tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, file, {"format": "pt"})
    check_alike(folder, "gpt2")
    save_file({name: tensor for name, tensor in tensors.items() if name != "ln_f.bias"}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"the weights of .* lack transformer.ln_f.bias"):
        export(folder, tmp_path / "x.gguf", GgufFile())


@pytest.mark.parametrize(
    ("family", "config", "sentence"),
    [
        (
            "deepseek_v2",
            {**GROUPS, "topk_group": 1, "topk_method": "group_limited_greedy"},
            "groups of experts that are",
        ),
        ("gemma2", {"attn_logit_softcapping": None}, "a Gemma 2 without soft caps of the scores and of the logits"),
        ("gemma2", {"final_logit_softcapping": None}, "a Gemma 2 without soft caps of the scores and of the logits"),
        ("deepseek_v2", {"mlp_bias": True}, "biases of linear layers, as model.layers.0.mlp.gate_proj.bias"),
        ("deepseek_v3", {"attention_bias": True}, "biases of linear layers, as model.layers.0.self_attn.q_a_proj.bias"),
        ("deepseek_v3", {"num_hidden_layers": 27}, "queries of low rank in a model with latent attention of 27 blocks"),
        ("deepseek_v3", {"rope_interleave": False}, "latent attention whose rotary embeddings rotate the halves"),
        (
            "deepseek_v3",
            {"rope_parameters": {**SCALED, "mscale": 1.0}},
            "a yarn scaling without mscale equal to mscale_",
        ),
        ("deepseek_v3", {"rope_parameters": {**SCALED, "truncate": False}}, "a yarn scaling without mscale equal to"),
        ("deepseek_v3", {"rope_parameters": {**SCALED, "beta_fast": 100}}, "a yarn scaling of latent attention with"),
        (
            "deepseek_v3",
            {"rope_parameters": {**SCALED, "rope_type": "linear"}},
            "rotary embeddings of latent attention",
        ),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse"] * 2}, "a dense MLP behind a block with experts"),
        ("exaone4", {"sliding_window": 8}, "sliding windows in an EXAONE 4 of another number of blocks than 64"),
        (
            "exaone4",
            {"num_hidden_layers": 64, "layer_types": ["full_attention"] * 64},
            "an EXAONE 4 of 64 blocks of which not every fourth sees all tokens",
        ),
        ("gemma2", {"query_pre_attn_scalar": 12}, "scores scaled by a query_pre_attn_scalar of 12 in place of 16"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "sliding windows in another order of blocks"),
        ("gemma3_text", {"final_logit_softcapping": 3.0}, "soft caps"),
        ("glm4_moe", {"n_group": 2, "topk_group": 1}, "2 groups of experts in a GLM 4.5"),
        ("glm4_moe", {"n_shared_experts": 2}, "n_shared_experts 2 in a GLM 4.5"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "a GLM 4.5 without experts"),
        ("gpt_oss", {"swiglu_alpha": 1.4}, "swiglu_alpha 1.4 in place of 1.702"),
        ("gpt_oss", {"swiglu_limit": 0.6}, "swiglu_limit 0.6 in place of 7"),
        ("gpt_oss", {"attention_bias": False}, "a GPT-OSS without biases in its attention"),
        ("gpt_oss", {"layer_types": [*FULL, *SLIDING, *SLIDING, *FULL]}, "sliding windows in another order of blocks"),
        ("gpt_oss", {"layer_types": FULL * 4}, "a GPT-OSS of which no block has a sliding window"),
        ("gpt_oss", {"rope_parameters": {**BENT, "attention_factor": 1.5}}, "a yarn scaling of a GPT-OSS with mscale"),
        (
            "gpt_oss",
            {"rope_parameters": {**BENT, "beta_slow": 2}},
            "a yarn scaling of a GPT-OSS with another",
        ),
        ("granite", {"attention_bias": True}, "biases of linear layers, as model.layers.0.self_attn.q_proj.bias"),
        ("granitemoehybrid", {"attention_bias": True}, "biases of linear layers, as model.layers.1.self_attn.q_proj"),
        (
            "granitemoehybrid",
            {"mamba_proj_bias": True},
            "biases of linear layers, as model.layers.0.mamba.in_proj.bias",
        ),
        ("granitemoehybrid", {"mamba_conv_bias": False}, "a Mamba 2 whose convolution has no bias"),
        ("granitemoehybrid", {**SOME_EXPERTS, "layer_types": FULL * 4}, "a Granite 4 with experts and without Mamba 2"),
        ("granitemoehybrid", {"mamba_expand": 1}, "a mamba_expand of 1 in a Granite 4"),
        ("nemotron_h", {"time_step_limit": (0.01, 0.1)}, "a Mamba 2 whose steps are limited to 0.01 to 0.1"),
        ("granitemoehybrid", {"time_step_limit": (0.0, 0.1)}, "a Mamba 2 whose steps are limited to 0 to 0.1"),
        ("lfm2", {"conv_bias": True}, "biases of linear layers, as model.layers.0.conv.in_proj.bias"),
        ("lfm2", {"layer_types": FULL * 4}, "an LFM2 without short convolutions"),
        ("mixtral", {"hidden_act": "gelu"}, "an MLP with the activation gelu"),
        ("ministral3", {"rope_parameters": {**YARN, "mscale": 0.5}}, "a yarn scaling without mscale 1"),
        ("ministral3", {"rope_parameters": {**YARN, "rope_type": "linear"}}, "rotary embeddings of a Ministral 3"),
        ("nemotron_h", {"layer_types": ["full_attention", "moe"] * 2}, "a Nemotron-H without Mamba 2"),
        ("nemotron_h", {"layer_types": [*MIXED[:3], "mlp"]}, "a Nemotron-H with experts in some blocks and an MLP in"),
        ("nemotron_h", {"use_conv_bias": False}, "a Mamba 2 whose convolution has no bias"),
        ("nemotron_h", {"mamba_hidden_act": "gelu"}, "a Mamba 2 with the activation gelu"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "an MLP with the activation silu"),
        ("nemotron_h", {"use_bias": True}, "biases of linear layers, as model.layers.0.mixer.in_proj.bias"),
        ("nemotron_h", {"norm_topk_prob": False}, "routers with norm_topk_prob False"),
        ("nemotron_h", {"n_group": 2, "topk_group": 1}, "2 groups of experts in a Nemotron-H"),
        ("olmoe", {"num_key_value_heads": 2}, "grouped-query attention in an OLMoE"),
        ("qwen3_moe", {"norm_topk_prob": False}, "routers with norm_topk_prob False"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias in a Seed-OSS"),
        ("seed_oss", {"mlp_bias": True}, "mlp_bias in a Seed-OSS"),
        ("smollm3", {"no_rope_layer_interval": 2}, "blocks without rotary embeddings that are not every fourth"),
    ],
)
def test_what_it_has_no_words_for(family: str, config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = saved(made(family, **config), tmp_path / "model")
    with pytest.raises(InputError, match=f"llama.cpp does not support {sentence}.*: the model cannot be exported"):
        export(folder, tmp_path / "model.gguf", GgufFile())
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("family", "counts", "blocks", "sentence"),
    [
        ("qwen3", {Mlp(): 96}, (0,), "blocks of a qwen3 model that differ in shape"),
        ("glm4_moe", {Mlp(): 96}, (0, 1), "blocks of a glm4moe model that differ in shape"),
        ("deepseek_v3", {KvGroups(): 3}, (0,), "blocks of a deepseek2 model that differ in shape"),
        ("gpt_oss", {Mlp(): 40}, (0,), "blocks of a gpt-oss model that differ in shape"),
        ("granitemoehybrid", {Mlp(): 96}, (0,), "blocks of a granitehybrid model that differ in shape"),
        ("lfm2", {Mlp(): 96}, (0,), "blocks of a lfm2 model that differ in shape"),
        ("lfm2", {KvGroups(): 1}, range(4), "heads of a lfm2 model that do not make up its hidden size of 64"),
        ("nemotron_h", {Mlp(): 40}, (1,), "blocks of a nemotron_h_moe model that differ in shape"),
        ("qwen3_moe", {Mlp(): 3}, (0,), "blocks of a qwen3moe model that differ in shape"),
        ("gpt2", {KvGroups(): 2}, range(4), "heads of a gpt2 model that do not make up its hidden size of 64"),
    ],
)
def test_shapes_that_it_has_no_words_for(
    family: str, counts: dict[LinkedUnits, int], blocks: Sequence[int], sentence: str, tmp_path: Path
) -> None:
    folder = saved(cut(made(family), counts, blocks), tmp_path / "model")
    with pytest.raises(InputError, match=f"llama.cpp does not support {sentence}"):
        export(folder, tmp_path / "model.gguf", GgufFile())


def test_a_target_is_refused_what_the_export_would_refuse() -> None:
    runtime, recipe = RUNTIMES["gguf"], load_recipe("depth", {"allocation.parts": "layers"})
    with pytest.raises(InputError, match="sets the attention of a smollm3 block by the block"):
        runtime.fitted(recipe, Decoder(made("smollm3")))
    runtime.fitted(recipe, Decoder(made("qwen3")))
    runtime.fitted(recipe, Decoder(tiny_llama()))
    with pytest.raises(InputError, match="models of the kind phi3 with fewer heads than the hidden size says"):
        runtime.fitted(Recipe(units="kv-groups", sparsity=0.1), Decoder(made("phi3")))
    with pytest.raises(InputError, match="blocks of different shapes, as the recipe structured_best makes them"):
        runtime.fitted(load_recipe("structured_best"), Decoder(made("qwen3")))
