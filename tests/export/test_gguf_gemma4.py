"""Gemma 4 as a GGUF file: heads of two sizes, shared keys and values, inputs of each token, MLPs of any width."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

import optprune
from optprune.errors import InputError
from optprune.export import GgufExperts, GgufFile, export, importance_of, save_model
from optprune.models import Decoder, Mlp, load_model
from optprune.program import RUNTIMES
from optprune.recipe import Recipe, load_recipe
from optprune.texts import demo_articles
from tests.helpers.gguf_models import PROMPT, apart, cut, expected_of, made, saved
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.token_batches import batches

NEAR, FAR = "sliding_attention", "full_attention"
OTHERS = {NEAR: {"rope_type": "default", "rope_theta": 50.0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "one block reads keys of another": {},
    "the last blocks read keys of both kinds": {
        **{"layer_types": [NEAR, NEAR, FAR, NEAR, FAR], "num_kv_shared_layers": 2, "num_hidden_layers": 5},
    },
    "keys are values": {
        **{"layer_types": [NEAR, NEAR, FAR, FAR], "num_kv_shared_layers": 0, "attention_k_eq_v": True},
        **{"num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False},
    },
    "a head of its own": {"tie_word_embeddings": False, "final_logit_softcapping": None},
    "all dimensions turned": {
        "rope_parameters": {FAR: {"rope_type": "default", "rope_theta": 500.0}, **OTHERS},
    },
    "half of the dimensions turned": {
        "rope_parameters": {FAR: {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
        | OTHERS,
    },
}
SHARING = "the last blocks read keys of both kinds"


def difference(model: PreTrainedModel, folder: Path) -> tuple[float, float]:
    """How far llama.cpp is off in a log-probability, and how far it may be."""
    written = export(saved(model, folder / "model"), folder / "model.gguf", GgufFile(kind="f32"))
    assert written.summary == "architecture gemma4" and not written.notes
    expected, tolerance = expected_of(folder / "model", PROMPT)
    return apart(written.path, expected, PROMPT), tolerance


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "of several widths"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_transformers(variant: str, pruned: bool, tmp_path: Path) -> None:
    model = made("gemma4_text", **VARIANTS[variant])
    found, tolerance = difference(cut(model, {Mlp(): 96}, range(1, 3)) if pruned else model, tmp_path)
    assert found < tolerance


def test_single_weights_that_are_zero(tmp_path: Path) -> None:
    model = made("gemma4_text", **VARIANTS[SHARING])
    decoder = Decoder(model)
    with torch.no_grad():
        for block in range(5):
            for path in decoder.paths(block):
                weight = decoder.layer(block, path).weight
                weight[weight.abs() < weight.abs().median()] = 0
    found, tolerance = difference(decoder.joined(), tmp_path)
    assert found < tolerance


def test_a_block_without_an_mlp_gets_one_of_zeros(tmp_path: Path) -> None:
    decoder = Decoder(made("gemma4_text"))
    decoder.remove(1, "mlp")
    decoder.record_shapes()
    found, tolerance = difference(decoder.joined(), tmp_path)
    assert found < tolerance
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["gemma4.feed_forward_length"].contents() == [128, 32, 128, 256]


def test_the_metadata_name_each_kind_of_block(tmp_path: Path) -> None:
    export(saved(made("gemma4_text", **VARIANTS[SHARING]), tmp_path / "m"), tmp_path / "m.gguf", GgufFile())
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        **{"attention.key_length": 32, "attention.key_length_swa": 16, "attention.shared_kv_layers": 2},
        **{"attention.head_count": 4, "attention.head_count_kv": [2] * 5, "embedding_length_per_layer_input": 8},
        **{"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, True, False, True, False]},
    }
    assert {name: fields[f"gemma4.{name}"] for name in expected} == expected


def test_small_types_load(tmp_path: Path) -> None:
    file = export(saved(made("gemma4_text"), tmp_path / "m"), tmp_path / "m.gguf", GgufFile(kind="q8_0")).path
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == kinds["per_layer_token_embd.weight"] == "Q8_0"
    assert kinds["per_layer_model_proj.weight"] == "F16" and kinds["blk.0.layer_output_scale.weight"] == "F32"
    assert LlamaCpp(file).log_probabilities(PROMPT)


EXPERTS: dict[str, Any] = {
    **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    **{"use_double_wide_mlp": False, "layer_types": [NEAR, FAR, NEAR, FAR], "num_kv_shared_layers": 0},
}
LARGE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}


def with_experts(**more: Any) -> PreTrainedModel:
    """A model whose experts have factors of their own, and whose routers weigh each input otherwise."""
    model = made("gemma4_text", **EXPERTS, **more)
    with torch.no_grad():
        for name, numbers in model.named_parameters():
            if name.endswith(("per_expert_scale", "router.scale")):
                numbers.copy_(torch.linspace(0.5, 2, len(numbers)))
    return model


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("more", [{}, LARGE], ids=["inputs of tokens", "large"])
def test_experts_beside_the_mlp(more: dict[str, Any], pruned: bool, tmp_path: Path) -> None:
    """One fewer in each block, of fewer units; one block has no MLP then."""
    model = with_experts(**more)
    if pruned:
        decoder = Decoder(cut(model, {Mlp(): 40}))
        decoder.remove(2, "mlp")
        decoder.record_shapes()
        model = decoder.joined()
    found, tolerance = difference(model, tmp_path)
    assert found < 2 * tolerance  # the MLP and the experts both have a GELU from a table


def test_experts_that_differ_are_refused(tmp_path: Path) -> None:
    decoder = Decoder(with_experts())
    decoder.keep_experts(1, torch.tensor([True, True, False, True]))
    decoder.record_shapes()
    folder = saved(decoder.joined(), tmp_path / "model")
    with pytest.raises(InputError, match="does not support blocks of a gemma4 model whose experts differ"):
        export(folder, tmp_path / "model.gguf", GgufFile())
    target, dense = RUNTIMES["gguf"], Decoder(with_experts().to("meta"))  # type: ignore[arg-type]
    assert "blocks of different shapes" in str(target.refuses(dense, Decoder(load_model(folder).model).shapes()))
    recipe, _ = target.fitted(load_recipe("structured_best", {"units": "mlp"}), dense)
    assert recipe.allocation.kind == "uniform"


def test_experts_out_of_a_file_in_few_bits(tmp_path: Path) -> None:
    """What stays is copied, the factors of the experts and of the router's inputs too."""
    dense = saved(with_experts(), tmp_path / "dense")
    original = export(dense, tmp_path / "dense.gguf", GgufFile(kind="f32")).path
    loaded = load_model(dense, device="cpu")
    report = optprune.prune(loaded.model, batches(), recipe := load_recipe("reap", {"sparsity": 0.1}))
    save_model(loaded, tmp_path / "pruned", report=report, recipe=recipe)
    written = export(tmp_path / "pruned", tmp_path / "small.gguf", GgufExperts(original))
    expected, tolerance = expected_of(tmp_path / "pruned", PROMPT)
    assert apart(written.path, expected, PROMPT) < tolerance
    shapes = {tensor.name: list(tensor.shape) for tensor in gguf.GGUFReader(written.path).tensors}
    assert shapes["blk.0.ffn_down_exps.scale"] == [3] and shapes["blk.0.ffn_gate_inp.scale"] == [64]
    assert shapes["blk.0.ffn_gate_up_exps.weight"] == [64, 96, 3]


def test_small_experts_load_by_importance(tmp_path: Path) -> None:
    """The two layers of an expert that are one in the file have one importance."""
    folder = saved(with_experts(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(demo_articles("calibration")[:5]))
    importance = importance_of(folder, str(tmp_path / "text.txt"), samples=2, seq_length=32)
    file = export(folder, tmp_path / "model.gguf", GgufFile(kind="q4_0", importance=importance)).path
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_gate_up_exps.weight"] == "Q4_0" and kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    assert LlamaCpp(file).log_probabilities(PROMPT)


ORDER = {"layer_types": [NEAR, FAR, NEAR, NEAR, FAR], "num_hidden_layers": 5}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"layer_types": [FAR] * 4}, "a Gemma 4 without blocks with a window"),
        ({**ORDER, "num_kv_shared_layers": 1}, "a Gemma 4 in which the two blocks before those that read keys"),
        ({"vocab_size_per_layer_input": 600}, "a vocab_size_per_layer_input of 600 in place of 512"),
        ({"attention_bias": True}, "biases of linear layers, as model.layers.0.self_attn.q_proj.bias"),
        ({"hidden_activation": "silu"}, "an MLP with the activation silu"),
        (
            {"rope_parameters": {FAR: OTHERS[NEAR], NEAR: {"rope_type": "proportional", "rope_theta": 50.0}}},
            "scaled rotary embeddings in blocks of a Gemma 4 with a window",
        ),
    ],
)
def test_other_models_are_refused_by_name(fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = saved(made("gemma4_text", **fields), tmp_path / "model")
    with pytest.raises(InputError, match=f"^llama.cpp does not support {sentence}"):
        export(folder, tmp_path / "model.gguf", GgufFile())
    assert not (tmp_path / "model.gguf").exists()


def test_blocks_without_attention_are_refused(tmp_path: Path) -> None:
    decoder = Decoder(made("gemma4_text"))
    decoder.remove(0, "attention")
    decoder.record_shapes()
    with pytest.raises(InputError, match="does not support blocks of a gemma4 model without attention"):
        export(saved(decoder.joined(), tmp_path / "model"), tmp_path / "model.gguf", GgufFile())


def test_the_target_takes_widths_that_differ_and_all_attention() -> None:
    decoder, target = Decoder(made("gemma4_text").to("meta")), RUNTIMES["gguf"]  # type: ignore[arg-type]
    recipe, _ = target.fitted(
        load_recipe("structured_best").model_copy(update={"units": Recipe(units="mlp").units}), decoder
    )
    assert recipe.allocation.kind == "global"
    depth = load_recipe("depth")
    with pytest.raises(InputError, match=r"does not take gemma4_text blocks without attention: remove MLPs alone"):
        target.fitted(depth, decoder)
    assert depth.allocation is not None
    target.fitted(load_recipe("depth", {"allocation.parts": "mlp"}), decoder)
    shapes = decoder.shapes()
    assert "without attention" in str(target.refuses(decoder, (shapes[0].without("attention"), *shapes[1:])))
