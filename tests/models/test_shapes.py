"""Models whose blocks differ in shape: their folders, loading, caches, generation and training."""

import ast
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import optprune
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import ARCHITECTURES, BlockShape, Decoder, KvGroups, Mlp, load_model
from optprune.models.architecture import Classes
from optprune.models.surgery import write
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.report import model_patterns
from tests.helpers.mixed_models import PROMPT, generated, mixed, mixer_first
from tests.helpers.sub_blocks import block_with
from tests.helpers.tiny_models import ALL_MODELS, SLIDING, TINY_MODELS, tiny_llama, tiny_opt, tiny_qwen2, tiny_tokenizer
from tests.helpers.token_batches import batches

CHECK_TOKENS = torch.arange(10, 42)[None]


def heads_go(name: str) -> bool:
    """Return whether single heads of a family can be removed."""
    return "kv_heads" not in ARCHITECTURES[name].indivisible


def units_of(name: str) -> str:
    """Return the units of a family that recipes remove by default, or those of its MLPs where values stay."""
    return "mlp" if values_stay(name) else "all"


def values_stay(name: str) -> bool:
    """Return whether all value dimensions of a family stay."""
    return "value_dim" in ARCHITECTURES[name].indivisible


def experts_in(name: str) -> bool:
    """Return whether a family has experts; separate experts add up in another order than fused ones."""
    return ARCHITECTURES[name].mixture is not None


OTHERS = {name: make for name, make in ALL_MODELS.items() if name not in TINY_MODELS and heads_go(name)}
"""the other families whose heads can be removed"""


def classes(name: str, which: str = "pruned") -> Classes:
    """Return the pruned classes of an architecture, or the stock ones."""
    found = getattr(ARCHITECTURES[name], which)
    assert isinstance(found, Classes)
    return found


PROGRAM = """
import json, sys
sys.modules["optprune"] = None  # importing it is an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt = torch.arange(10, 20)[None]
result = []
for folder in sys.argv[1:]:
    refusal = ""
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        refusal = str(error)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a word").input_ids
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)[0]
    states = model(prompt, output_hidden_states=True).hidden_states
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimiser = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model(prompt, labels=prompt).loss.backward()
    unmoved = [name for name, value in model.named_parameters() if value.grad is None]
    optimiser.step()
    moved = sum(float((value - before[name]).abs().max()) > 0 for name, value in model.named_parameters())
    model.save_pretrained(folder + "-again")
    result.append({"refusal": refusal, "text": text.tolist(), "words": len(words), "states": len(states),
                   "unmoved": unmoved, "moved": moved, "parameters": len(before)})
print()  # after the question whether to run custom code
print(json.dumps(result))
"""


@pytest.mark.e2e
def test_mixed_folders_load_generate_and_train_without_optprune(tmp_path: Path) -> None:
    models = {name: mixed(build(num_hidden_layers=4, **mixer_first(name))) for name, build in ALL_MODELS.items()}
    assert Decoder(models["qwen3_moe"]).shape(1).experts == 3
    models["qwen3_moe"] = Decoder(models["qwen3_moe"]).joined()
    for name, model in models.items():
        assert not save_model(model, tmp_path / name, tokenizer=tiny_tokenizer()).stock
    folders = [str(tmp_path / name) for name in models]
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, *folders],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
    for (name, model), outside in zip(models.items(), json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert "trust_remote_code=True" in outside["refusal"]
        assert outside["text"] == generated(model)
        assert outside["words"] > 0
        assert outside["states"] == len(Decoder(model).blocks) + 1
        assert outside["unmoved"] == []
        # A ReLU that is off everywhere, or an untouched position, may leave a whole bias without a gradient.
        assert outside["moved"] >= outside["parameters"] - 2
        # Saved again from there, the folder still carries its file.
        again = tmp_path / f"{name}-again"
        assert (again / f"modeling_pruned_{name}.py").is_file()
        assert Decoder(load_model(str(again)).model).shapes() == Decoder(model).shapes()


@pytest.mark.parametrize("name", ALL_MODELS)
def test_optprune_loads_what_it_saved_and_never_runs_the_file_in_the_folder(name: str, tmp_path: Path) -> None:
    model = mixed(ALL_MODELS[name](num_hidden_layers=4))
    save_model(model, tmp_path / "out")
    (tmp_path / "out" / f"modeling_pruned_{name}.py").write_text("raise SystemExit('the folder ran its own code')")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(CHECK_TOKENS).logits, model(CHECK_TOKENS).logits)
    assert len(model_patterns(Decoder(again))) == sum(
        len(Decoder(model).paths(block)) for block in range(len(Decoder(model).blocks))
    )


def test_the_fresh_process_checks_a_mixed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_model(mixed(tiny_llama(num_hidden_layers=4)), tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert not saved.stock and saved.logits_difference is not None
    # A file that needs optprune would be of no use to anybody else.
    source = Path(sys.modules[classes("llama").model.__module__].__file__)  # type: ignore[arg-type]
    leaning = tmp_path / source.name
    leaning.write_text("import optprune\n" + source.read_text())
    for beside in ("pruned_decoder.py", "pruned_cache.py"):
        shutil.copy(source.with_name(beside), tmp_path)
    monkeypatch.setattr(sys.modules[classes("llama").model.__module__], "__file__", str(leaning))
    with pytest.raises(optprune.errors.OptpruneError, match="cannot be reloaded in a fresh process"):
        save_model(mixed(tiny_llama(num_hidden_layers=4)), tmp_path / "leaning", check_tokens=CHECK_TOKENS)
    assert not (tmp_path / "leaning").exists()


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_file_is_short_and_imports_torch_and_transformers_only(name: str) -> None:
    file = Path(sys.modules[classes(name).model.__module__].__file__)  # type: ignore[arg-type]
    lengths, beside = [], {home for home in imported(file) if home.startswith(".")}
    for part in (file, *(file.with_name(f"{home[1:]}.py") for home in beside)):
        # transformers 4 copies the files that the first one names, and not those that they name.
        assert {home for home in imported(part) if home.startswith(".")} <= beside
        homes = {home.partition(".")[0] for home in imported(part)}
        assert homes <= {"copy", "torch", "transformers", ""} and (part != file or "transformers" in homes)
        lengths.append(len(part.read_text().splitlines()))
    assert max(lengths) < 205 and lengths[0] < (120 if name in ("opt", "gpt_neox", "gpt2", "gemma4_text") else 65)


def imported(file: Path) -> set[str]:
    """Return the modules that a file imports, with a dot before relative ones."""
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    homes = {"." * node.level + (node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
    return homes | {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_mixed_folder_can_be_pruned_again(name: str, tmp_path: Path) -> None:
    save_model(mixed(ALL_MODELS[name](num_hidden_layers=4)), tmp_path / "once")
    model = load_model(str(tmp_path / "once")).model
    before = Decoder(model).shapes()
    multiple = 8 if experts_in(name) else 1
    report = prune(
        model,
        batches(3),
        load_recipe("fasp", {"units": units_of(name), "sparsity": 0.2, "allocation.multiple": multiple}),
    )
    assert report.sparsity_reached == pytest.approx(0.2, abs=0.02 * multiple)
    after = Decoder(model).shapes()
    assert [shape.kv_heads for shape in after] == [shape.kv_heads for shape in before]
    assert [shape.experts for shape in after] == [shape.experts for shape in before]
    for new, old in zip(after, before, strict=True):
        assert new.value_dim < old.value_dim or not old.value_dim or values_stay(name)
        assert new.mlp_width < old.mlp_width or not old.mlp_width
    assert model.config.optprune_shapes == [shape.counts() for shape in after]
    Decoder(model).joined()
    save_model(model, tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(
            optprune.load_model(tmp_path / "twice", device="cpu").model(CHECK_TOKENS).logits, model(CHECK_TOKENS).logits
        )


@pytest.mark.parametrize("recipe", ["sparse_best", "structured_best"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_blocks_without_a_part_are_pruned_under_a_metric(name: str, recipe: str) -> None:
    model = mixed(ALL_MODELS[name](num_hidden_layers=4))
    settings = {"refit.held_out": 0.25} if recipe == "structured_best" else {}
    report = prune(model, batches(), load_recipe(recipe, {"sparsity": 0.2, **settings}))
    assert report.sparsity_reached == pytest.approx(0.2, abs=0.02)


CACHED = {
    "llama": lambda: tiny_llama(num_hidden_layers=4),
    "opt": lambda: tiny_opt(num_hidden_layers=4),
    "qwen2": lambda: tiny_qwen2(num_hidden_layers=4),
    "qwen2, full then sliding": lambda: tiny_qwen2(
        num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2, **SLIDING
    ),
    "qwen2, sliding then full": lambda: tiny_qwen2(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, **SLIDING
    ),
}


@pytest.mark.parametrize("variant", CACHED)
def test_a_cache_is_as_small_as_the_blocks_and_changes_nothing(variant: str, tmp_path: Path) -> None:
    model = mixed(CACHED[variant]())
    save_model(model, tmp_path / "out")
    for each in (model, optprune.load_model(tmp_path / "out", device="cpu").model):
        with torch.no_grad():
            cache = each(CHECK_TOKENS, use_cache=True).past_key_values
            assert cache.get_seq_length() == CHECK_TOKENS.shape[1]
            step = each(PROMPT[:, :3], cache=cache).logits
            whole = each(torch.cat([CHECK_TOKENS, PROMPT[:, :3]], 1), use_cache=False).logits[:, -3:]
        assert (step - whole).abs().max() <= 1e-5 * whole.abs().max()
        narrow = Decoder(each).shape(1)
        values = [layer.values for layer in cache.layers if layer.is_initialized]
        assert sorted(value.shape[-1] for value in values) == [5, 16, 16]
        assert sorted(value.shape[1] for value in values)[0] == narrow.kv_heads
        assert generated(each) == generated(each, use_cache=False)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_removing_a_sub_block_equals_zeroing_its_last_layer(name: str, part: str) -> None:
    removed, zeroed = ALL_MODELS[name](), ALL_MODELS[name]()
    decoder, block = Decoder(zeroed), block_with(Decoder(zeroed), 1, part)
    Decoder(removed).remove(block, part)
    last = [decoder.architecture.output if part == "attention" else decoder.architecture.mlp_consumer]
    if part == "mlp" and experts_in(name):
        last = [path for path in decoder.paths(block) if path.endswith(".down_proj")]
    for layer in (decoder.layer(block, path) for path in last):
        write(layer, torch.zeros_like(layer.weight), None if layer.bias is None else torch.zeros_like(layer.bias))
    with torch.no_grad():
        small, full = removed(CHECK_TOKENS).logits, zeroed(CHECK_TOKENS).logits
    assert (small - full).abs().max() <= 1e-6 * full.abs().max()
    # A block's class alone must not change it, nor what is put back.
    whole = ALL_MODELS[name]()
    decoder = Decoder(whole)
    with torch.no_grad():
        expected = whole(CHECK_TOKENS).logits
        with decoder.without([(block, part), (block_with(decoder, 0, "mlp"), "mlp")]):
            assert not torch.equal(whole(CHECK_TOKENS).logits, expected)
        assert torch.equal(whole(CHECK_TOKENS).logits, expected)
        assert all(parameter.grad is None for parameter in whole.parameters())


@pytest.mark.parametrize("name", [name for name in ALL_MODELS if not ARCHITECTURES[name].stays])
def test_a_block_without_anything_is_dropped_and_the_rest_is_stock(name: str, tmp_path: Path) -> None:
    extra = {} if name != "qwen2" else {"layer_types": ["full_attention", "sliding_attention"] * 2, **SLIDING}
    model = ALL_MODELS[name](num_hidden_layers=4, **extra)
    decoder = Decoder(model)
    before = len(decoder.blocks)
    for part in decoder.shape(1).parts:
        decoder.remove(1, part)
    with torch.no_grad():
        expected = model(CHECK_TOKENS).logits
    decoder.record_shapes()
    assert type(model) is classes(name, "stock").model
    assert model.config.num_hidden_layers == before - 1 == len(decoder.blocks)
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for each in (model, again):
        with torch.no_grad():
            apart = (each(CHECK_TOKENS).logits - expected).abs().max()
        assert apart <= (1e-5 if experts_in(name) else 0) * expected.abs().max()
        assert generated(each) == generated(each, use_cache=False)


def keep_heads(model: PreTrainedModel, count: int) -> PreTrainedModel:
    decoder = Decoder(model)
    for block in range(len(decoder.blocks)):
        for units in KvGroups().layers(decoder, block):
            decoder.keep_units(block, units, torch.arange(units.channels.units) < count)
    decoder.record_shapes()
    return model


@pytest.mark.parametrize(
    ("build", "count", "stock"),
    [
        (lambda: tiny_llama(num_key_value_heads=2), 1, True),
        (lambda: tiny_qwen2(num_key_value_heads=2), 1, True),
        (lambda: tiny_llama(num_key_value_heads=4), 2, True),
        (lambda: tiny_llama(num_key_value_heads=4), 3, False),  # 3 heads do not divide a hidden size of 64
        (tiny_opt, 2, False),  # OPT's head_dim is hidden_size / heads
        *((make, 1, ARCHITECTURES[name].head_dim_is_free) for name, make in OTHERS.items()),
    ],
    ids=["llama", "qwen2", "llama, 2 of 4", "llama, 3 of 4", "opt", *OTHERS],
)
def test_fewer_kv_heads_are_stock_where_the_stock_class_can_say_so(
    build: Any, count: int, stock: bool, tmp_path: Path
) -> None:
    model = keep_heads(build(), count)
    assert save_model(model, tmp_path / "out").stock is stock
    assert ("auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())) is not stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__module__.startswith("transformers.") is stock
    with torch.no_grad():
        assert torch.equal(again(CHECK_TOKENS).logits, model(CHECK_TOKENS).logits)
        cache = again(CHECK_TOKENS, use_cache=True).past_key_values
    held = [(layer.keys.shape[1], layer.values.shape[1]) for layer in cache.layers if isinstance(layer, DynamicLayer)]
    assert set(held) == {(count, count)}
    assert generated(again) == generated(model, use_cache=False)
    again.train()(CHECK_TOKENS, labels=CHECK_TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters() if parameter.requires_grad)


def test_shapes_that_become_even_again_are_stock_again(tmp_path: Path) -> None:
    model = tiny_llama()
    for block in range(2):
        decoder = Decoder(model)
        [units] = Mlp().layers(decoder, block)
        decoder.keep_units(block, units, torch.arange(units.channels.units) < 64)
        decoder.record_shapes()
        save_model(model, tmp_path / f"{block}")
    assert not (tmp_path / "1" / "modeling_pruned_llama.py").exists()
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["intermediate_size"] == 64
    assert not {"optprune_shapes", "auto_map"} & set(config)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "1")) is type(model) is classes("llama", "stock").model


@pytest.mark.parametrize("name", ALL_MODELS)
def test_weights_of_a_shape_are_those_of_its_layers(name: str) -> None:
    decoder = Decoder(mixed(ALL_MODELS[name](num_hidden_layers=4)))
    for block, shape in enumerate(decoder.shapes()):
        assert decoder.weights_of(shape) == sum(
            decoder.layer(block, path).weight.numel() for path in decoder.paths(block)
        )
    dense_first = not experts_in(name) or len(decoder.architecture.mlp_kinds) > 1
    beside = ALL_MODELS[name]().config.mamba_n_groups if name == "falcon_h1" else 0
    assert decoder.shape(0) == (BlockShape(128, 0, 0, 0, beside) if dense_first else BlockShape(48, 0, 0, 4))
    assert sum(shape.mlp_width > 0 for shape in decoder.shapes()) == 3


def test_a_model_without_attention_is_refused() -> None:
    decoder = Decoder(tiny_llama())
    for block in range(2):
        decoder.remove(block, "attention")
    with pytest.raises(InputError, match="no block has attention left"):
        decoder.record_shapes()


def test_a_deep_copy_of_a_mixed_model_is_of_its_own() -> None:
    model = mixed(tiny_llama(num_hidden_layers=4))
    other = copy.deepcopy(model)
    Decoder(other).remove(3, "mlp")
    Decoder(other).record_shapes()
    assert Decoder(model).shape(3).mlp_width == 128
    assert model.config.optprune_shapes[3]["mlp_width"] == 128
