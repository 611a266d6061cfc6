"""Runtimes: each rule refuses what breaks it, before a weight is there, and what is pruned for one loads there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.tiny_models import tiny
from optprune.allocation import Allocation
from optprune.errors import InputError, OptpruneError
from optprune.export import GgufFile, OnnxFolder, export, save_model
from optprune.models import BlockAllocation, BlockShape, Decoder
from optprune.program import RUNTIMES
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.mixed_models import mixed
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama, tiny_opt, tiny_qwen2, tiny_tokenizer

STOCK = ("transformers", "vllm")
OF_HEADS = (
    "heads with fewer value dimensions than key dimensions: prune with --units mlp, as --recipe structured_uniform"
)


def without_weights(model: PreTrainedModel) -> Decoder:
    return Decoder(model.to("meta"))  # type: ignore[arg-type]


def refused(runtime: str, recipe: Recipe, model: PreTrainedModel, allocation: Allocation | None = None) -> str:
    with pytest.raises(InputError) as caught:
        RUNTIMES[runtime].fitted(recipe, without_weights(model), allocation)
    sentence = str(caught.value)
    assert sentence.startswith(f"the target {runtime} does not take ")
    return sentence


def taken(runtime: str, recipe: Recipe, model: PreTrainedModel) -> tuple[Recipe, str]:
    fitted, told = RUNTIMES[runtime].fitted(recipe, without_weights(model))
    return fitted, "; ".join(told)


def test_a_family_that_it_does_not_know() -> None:
    assert refused("gguf", Recipe(units="mlp"), tiny_opt()).endswith("smollm3")
    for runtime in ("transformers", "vllm", "onnx"):
        taken(runtime, Recipe(units="mlp", allocation={"multiple": 64}), tiny_opt())


@pytest.mark.parametrize(
    ("runtime", "kind", "known"),
    [("gguf", "yarn", "llama3"), ("onnx", "dynamic", "yarn"), ("onnx", "longrope", "yarn")],
)
def test_a_rotary_scaling_that_it_does_not_know(runtime: str, kind: str, known: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    scaled = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 256, **factors}
    model = tiny_llama(rope_parameters=scaled)
    sentence = refused(runtime, Recipe(units="mlp"), model)
    assert f"rotary embeddings scaled by {kind}: it takes default, linear, llama3" in sentence and known in sentence
    taken("transformers", Recipe(units="mlp"), model)


def test_a_scaling_of_one_kind_of_attention_only() -> None:
    rotary = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    rotary["full_attention"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    assert "rotary embeddings scaled by dynamic" in refused(
        "onnx", Recipe(units="mlp"), tiny("gemma3_text", **{"rope_parameters": rotary})
    )


@pytest.mark.parametrize("runtime", STOCK)
def test_a_budget_that_gives_every_block_its_own_width(runtime: str) -> None:
    sentence = refused(runtime, load_recipe("structured_best"), tiny_llama())
    assert "blocks of different shapes, as the recipe structured_best makes them" in sentence
    assert sentence.endswith("prune with --units mlp, as --recipe structured_uniform_best does")
    _, told = taken(runtime, load_recipe("structured_uniform_best"), tiny_llama())
    assert "uniform" not in told
    timed = load_recipe("structured_best", {"units": "mlp", "allocation.currency": "flops"})
    assert "for a budget of flops: let all blocks keep the same" in refused(runtime, timed, tiny_llama())
    # Where only widths would differ, they are made alike.
    asked = load_recipe("structured_best", {"units": "mlp", "allocation.multiple": 64})
    fitted, told = taken(runtime, asked, tiny_llama())
    assert fitted.allocation.kind == "uniform" and fitted.allocation.multiple == 64
    assert "the allocation is uniform in place of global" in told
    assert fitted.solver == asked.solver and fitted.metric == asked.metric
    # Zeros change no shape.
    sparse = load_recipe("sparse_best")
    assert taken(runtime, sparse, tiny_llama())[0] == sparse


@pytest.mark.parametrize("runtime", STOCK)
def test_value_dimensions(runtime: str) -> None:
    assert OF_HEADS in refused(runtime, load_recipe("fasp"), tiny_llama(intermediate_size=640))
    taken(runtime, load_recipe("fasp", {"units": "mlp"}), tiny_llama(intermediate_size=640))


@pytest.mark.parametrize("runtime", STOCK)
def test_single_sub_blocks(runtime: str) -> None:
    sentence = refused(runtime, load_recipe("depth"), tiny_llama())
    assert sentence.endswith(
        "blocks without attention or without an MLP: remove whole layers, --recipe depth --set allocation.parts=layers"
    )
    taken(runtime, load_recipe("depth", {"allocation.parts": "layers"}), tiny_llama())
    assert taken("gguf", load_recipe("depth"), tiny_llama())[0] == load_recipe("depth")


def test_widths_for_vllm_are_multiples_of_64_where_the_recipe_leaves_them_open() -> None:
    model = tiny_llama(intermediate_size=256)
    fitted, told = taken("vllm", load_recipe("fasp", {"units": "mlp"}), model)
    assert fitted.allocation.multiple == 64 and told == "MLP widths are multiples of 64"
    # Those of a wide MLP are by default, and others are taken as they are asked for.
    assert taken("vllm", load_recipe("fasp", {"units": "mlp"}), tiny_llama(intermediate_size=4096))[1] == ""
    for runtime in STOCK:
        for multiple in (8, 128):
            asked = load_recipe("fasp", {"units": "mlp", "allocation.multiple": multiple, "sparsity": 0.4})
            assert taken(runtime, asked, model) == (asked, "")


def test_the_widths_of_gguf_fit_its_blocks_of_numbers() -> None:
    fitted, told = taken("gguf", load_recipe("fasp", {"units": "mlp"}), tiny_llama())
    assert fitted.allocation.multiple == 32 and told == "MLP widths are multiples of 32"
    # Of a wide MLP they are multiples of 64 anyway.
    assert taken("gguf", load_recipe("fasp", {"units": "mlp"}), tiny_llama(intermediate_size=4096))[1] == ""
    best = load_recipe("structured_best")
    fitted, told = taken("gguf", best, tiny_llama())
    assert fitted == best and told.startswith("value dimensions that go are zeros in a GGUF file")


@pytest.mark.parametrize(
    ("runtime", "make", "sentence"),
    [
        ("transformers", tiny_llama, None),
        ("transformers", tiny_qwen2, None),
        ("transformers", tiny_opt, "models of the kind opt with fewer heads"),
        ("vllm", tiny_llama, None),
        ("vllm", tiny_qwen2, "models of the kind qwen2 with fewer heads"),
        ("vllm", tiny_opt, "models of the kind opt with fewer heads"),
        ("gguf", tiny_qwen2, None),
        ("onnx", tiny_opt, None),
    ],
)
def test_fewer_heads(runtime: str, make: Any, sentence: str | None) -> None:
    recipe = Recipe(units="kv-groups", sparsity=0.1)
    if sentence is None:
        assert taken(runtime, recipe, make())[0] == recipe
    else:
        assert sentence in refused(runtime, recipe, make())


def test_heads_that_do_not_divide_the_hidden_size() -> None:
    recipe, model = Recipe(units="kv-groups", sparsity=0.1), tiny_llama(num_key_value_heads=4)
    for runtime in STOCK:
        assert "3 heads, which do not divide the hidden size of 64: ask for another" in refused(runtime, recipe, model)


def test_an_allocation_that_is_given() -> None:
    model = tiny_llama()
    shapes = (BlockShape(64, 2, 16), BlockShape(128, 2, 16))
    uneven, even = (Allocation.of(Decoder(model), map(BlockAllocation, each)) for each in (shapes, shapes[:1] * 2))
    gone = Allocation.of(Decoder(model), map(BlockAllocation, (shapes[1], BlockShape(0, 0, 0))))
    for runtime in STOCK:
        assert "blocks of different shapes: let all" in refused(runtime, Recipe(units="mlp"), tiny_llama(), uneven)
        for fine in (even, gone):
            assert RUNTIMES[runtime].fitted(Recipe(units="mlp"), without_weights(tiny_llama()), fine)[1] == ()
    for runtime in ("gguf", "onnx"):
        RUNTIMES[runtime].fitted(Recipe(units="mlp"), without_weights(tiny_llama()), uneven)


@pytest.mark.parametrize("runtime", STOCK)
def test_a_model_that_is_uneven_already(runtime: str) -> None:
    sentence = refused(runtime, load_recipe("magnitude"), mixed(tiny_llama(num_hidden_layers=4)))
    assert "blocks without attention or without an MLP" in sentence


@pytest.mark.parametrize(("runtime", "who"), [("vllm", "vLLM"), ("gguf", "llama.cpp"), ("onnx", "ONNX Runtime")])
def test_zeros_are_told_to_bring_no_speed(runtime: str, who: str) -> None:
    fitted, told = taken(runtime, load_recipe("magnitude", {"units.weights": "2:4"}), tiny_llama())
    assert fitted.units.family is not None and told.startswith(f"{who} has no kernel for zeros")


@pytest.mark.parametrize("runtime", STOCK)
def test_a_folder_that_is_something_else_is_told(runtime: str, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=4)
    folder = save_model(mixed(model), tmp_path / "uneven").folder
    with pytest.raises(OptpruneError, match=f"the pruned model is in .*uneven, but the target {runtime} does not take"):
        RUNTIMES[runtime].check_folder(Decoder(tiny_llama(num_hidden_layers=4)), folder)
    RUNTIMES["onnx"].check_folder(Decoder(tiny_llama(num_hidden_layers=4)), folder)


def pruned(runtime: str, recipe: Recipe, model: PreTrainedModel, folder: Path) -> Path:
    fitted, _ = RUNTIMES[runtime].fitted(recipe, Decoder(model))
    before = type(model)(model.config)
    prune(model, batches(), fitted)
    save_model(model, folder, tokenizer=tiny_tokenizer())
    RUNTIMES[runtime].check_folder(Decoder(before), folder)
    return folder


FASP, DEPTH = (
    {"units": "mlp", "sparsity": 0.3},
    {"allocation.parts": "layers", "sparsity": 0.5, "allocation.score": "influence"},
)


@pytest.mark.parametrize(
    ("name", "recipe", "settings"),
    [
        ("llama", "structured_uniform_best", {}),
        ("llama", "structured_best", {"units": "mlp"}),
        *((name, "fasp", FASP) for name in TINY_MODELS),
        *((name, "depth", DEPTH) for name in TINY_MODELS),
        ("llama", "magnitude", {}),
        ("llama", "fasp", {"units": "kv-groups", "sparsity": 0.1}),
    ],
)
def test_what_is_pruned_for_vllm_is_of_a_class_of_transformers(
    name: str, recipe: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    width = {"ffn_dim" if name == "opt" else "intermediate_size": 256}
    folder = pruned("vllm", load_recipe(recipe, settings), TINY_MODELS[name](**width), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(model).__module__.startswith("transformers.")
    assert not list(folder.glob("*.py"))
    shape, layers = Decoder(model).shape(0), model.config.num_hidden_layers
    assert shape.mlp_width % 64 == 0
    assert ((shape.mlp_width, shape.kv_heads, layers) < (256, {"opt": 4}.get(name, 2), 2)) == (recipe != "magnitude")
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())


def test_what_is_pruned_for_llama_cpp_is_read_there(tmp_path: Path) -> None:
    folder = pruned("gguf", load_recipe("structured_best"), tiny_llama(), tmp_path / "out")
    written = export(folder, tmp_path / "out.gguf", GgufFile(kind="f32"))
    prompt = torch.arange(20, 40)
    found = LlamaCpp(written.path).log_probabilities(prompt)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = model(prompt[None]).logits[0, -1].double().log_softmax(-1)
    assert max(abs(found[token] - float(expected[token])) for token in found) < 1e-4


@pytest.mark.slow
def test_what_is_pruned_for_onnx_is_exported(tmp_path: Path) -> None:
    folder = pruned("onnx", load_recipe("structured_best"), tiny_opt(), tmp_path / "out")
    assert export(folder, tmp_path / "onnx", OnnxFolder()).logits_difference < 1e-3
