"""Vision-language folders whose language part is pruned: the rest byte for byte, and what stock transformers loads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

import optprune
from optprune.cli import main
from optprune.errors import InputError, OptpruneError
from optprune.export import GgufFile, OnnxFolder, export, save_model
from optprune.models import Decoder, KvGroups, LoadedModel, Mlp, load_config, load_model, load_shapes, open_model
from optprune.models.vision import language_name
from optprune.program import Request, resolve
from optprune.program.memory import output_bytes
from optprune.program.plan import planned_memory
from optprune.program.resolve import places_of
from optprune.recipe import load_recipe
from optprune.texts import demo_articles
from tests.helpers.mixed_models import mixed
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.tiny_vision import CONFIGS, answer, by_vision_family, save_vision, stock, tiny_vision, with_image
from tests.helpers.token_batches import batches

CHECK_TOKENS = torch.arange(10, 42)[None]
EPSILON = torch.finfo(torch.float32).eps
TAKEN = ("preprocessor_config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json")
MIXED = torch.arange(128) % 3 != 1
"""the MLP units that stay"""


def rounding(logits: Tensor, terms: int = 128, blocks: int = 2) -> float:
    """The largest difference of logits that another order of summation causes, with four for the norms between."""
    return 4 * blocks * terms * EPSILON * float(logits.abs().max())


def raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The dtype, the shape and the bytes of the tensors of all files of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            assert name not in found
            found[name] = entry["dtype"], tuple(entry["shape"]), data[begin:end]
    return found


def fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(params=["gemma3", "gemma4", "llava", "mistral3", "qwen3_vl"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of each family."""
    return save_vision(tiny_vision(request.param), tmp_path / request.param)


def sliced(loaded: LoadedModel, units: Any, kept: Tensor) -> LoadedModel:
    """The model with these units of every block."""
    decoder = loaded.decoder()
    for index in range(len(decoder.blocks)):
        with decoder.resident(index, keep=True):
            for layers in units.layers(decoder, index):
                decoder.keep_units(index, layers, kept)
    decoder.record_shapes()
    return loaded


def test_where_nothing_is_removed_all_bytes_stay_and_an_image_is_answered_the_same(source: Path) -> None:
    saved = save_model(load_model(source), out := source.parent / "out", check_tokens=CHECK_TOKENS)
    assert saved.stock and saved.logits_difference == 0
    assert raw(out) == raw(source) and fields(out) == fields(source)
    for name in TAKEN:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    for seed in (0, 1):
        (before, words), (after, again) = answer(stock(source), seed), answer(stock(out), seed)
        assert torch.equal(before, after) and words == again
    assert not torch.equal(answer(stock(out), 0)[0][:, -1], answer(stock(out), 1)[0][:, -1])


def test_removed_mlp_units_are_zeroed_columns_for_an_image_too(source: Path) -> None:
    save_model(sliced(load_model(source), Mlp(), MIXED), out := source.parent / "out", check_tokens=CHECK_TOKENS)
    zeroed = stock(source)
    for block in zeroed.model.language_model.layers:
        block.mlp.down_proj.weight.data[:, ~MIXED] = 0
    inputs = with_image(zeroed.config)
    with torch.no_grad():
        expected, found = zeroed(**inputs).logits, stock(out)(**inputs).logits
        dense = stock(source)(**inputs).logits
    assert (found - expected).abs().max() <= rounding(expected)
    assert (dense - expected).abs().max() > 100 * rounding(expected)
    assert fields(out)["text_config"].pop("intermediate_size") == int(MIXED.sum())
    for each in (before := fields(source), after := fields(out)):
        del each["text_config"]["intermediate_size"]
    assert before == after
    assert answer(stock(out))[1] == answer(zeroed)[1]
    check_rest(source, out)


def check_rest(source: Path, out: Path) -> None:
    """Tensors beside the language part have the names and bytes that they had."""
    before, after = raw(source), raw(out)
    rest = {name for name in before if not language_name(name)}
    assert rest == {name for name in after if not language_name(name)} and len(rest) > 10
    assert all(before[name] == after[name] for name in rest)
    assert {name for name in after if not name.endswith(".kept_pairs")} <= set(before)


def test_removed_heads_are_zeroed_columns_for_an_image_too(source: Path) -> None:
    loaded = load_model(source)
    kept = torch.tensor([True, False])
    if "gemma4" in source.name:
        with pytest.raises(InputError, match=r"^units kv-groups remove kv_heads, but gemma4_text models must keep all"):
            sliced(loaded, KvGroups(), kept)
        return
    save_model(sliced(loaded, KvGroups(), kept), out := source.parent / "out", check_tokens=CHECK_TOKENS)
    zeroed, width = stock(source), 16
    for block in zeroed.model.language_model.layers:
        block.self_attn.o_proj.weight.data[:, 2 * width :] = 0
    inputs = with_image(zeroed.config)
    with torch.no_grad():
        expected, found = zeroed(**inputs).logits, stock(out)(**inputs).logits
    assert (found - expected).abs().max() <= rounding(expected)
    assert fields(out)["text_config"]["num_key_value_heads"] == 1
    check_rest(source, out)


def test_the_language_part_is_pruned_as_the_text_model_alone(source: Path) -> None:
    """Bit for bit, in memory, and read block by block."""
    recipe = load_recipe("structured_uniform_best", {"sparsity": 0.2})
    load_model(source).model.save_pretrained(text := source.parent / "text")
    folders = []
    for where, read in ((source, load_model), (source, open_model), (text, load_model)):
        loaded = read(where)
        report = optprune.prune(loaded.model, batches(), recipe, store=loaded.store)
        folders.append(source.parent / f"out{len(folders)}")
        save_model(loaded, folders[-1], report=report, recipe=recipe, check_tokens=CHECK_TOKENS)
    first, streamed, alone = map(raw, folders)
    assert first == streamed
    assert {language_name(name): data for name, data in first.items() if language_name(name)} == alone
    assert folders[0].joinpath("config.json").read_bytes() == folders[1].joinpath("config.json").read_bytes()
    check_rest(source, folders[0])


@pytest.mark.parametrize("family", ["gemma3", "llava", "mistral3"])
def test_whole_blocks_go(family: str, tmp_path: Path) -> None:
    folder = save_vision(tiny_vision(family, num_hidden_layers=4), tmp_path / "model")
    loaded, recipe = load_model(folder), load_recipe("depth", {"sparsity": 0.4, "allocation.parts": "layers"})
    report = optprune.prune(loaded.model, batches(), recipe)
    save_model(loaded, out := tmp_path / "out", report=report, recipe=recipe, check_tokens=CHECK_TOKENS)
    left, gone = stock(out), [at for at, block in enumerate(report.blocks) if not block.after.parts]
    assert len(left.model.language_model.layers) == 4 - len(gone) < 4
    skipped = stock(folder)
    for index in gone:
        block = skipped.model.language_model.layers[index]
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    inputs = with_image(left.config)
    with torch.no_grad():
        expected, found = skipped(**inputs).logits, left(**inputs).logits
    assert (found - expected).abs().max() <= rounding(expected, blocks=4)
    check_rest(folder, out)


def test_features_of_an_image_keep_the_blocks_that_they_are_added_to(tmp_path: Path) -> None:
    loaded = load_model(save_vision(tiny_vision("qwen3_vl"), tmp_path / "model"))
    recipe = load_recipe("depth", {"sparsity": 0.4, "allocation.parts": "layers"})
    with pytest.raises(InputError, match="no block of the language part of a qwen3_vl model can be removed, because"):
        optprune.prune(loaded.model, batches(), recipe)


def test_tensors_lie_in_shards_of_both_parts(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    stock(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    save_model(open_model(folder), out := tmp_path / "out", check_tokens=CHECK_TOKENS, max_shard_size="150KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2 and raw(out) == raw(folder)
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in raw(out).values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            assert name in set(shard.keys())
    assert torch.equal(answer(stock(out))[0], answer(stock(folder))[0])


def test_numbers_of_any_kind_are_copied(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    name = "vision_tower.encoder.layers.0.mlp.fc1.bias"
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: tensors[name].bfloat16(), "vision_tower.embeddings.position_ids": torch.arange(17)[None]}
    tensors[name][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_model(load_model(folder), out := tmp_path / "out")
    assert raw(out) == raw(folder)


def test_a_model_without_its_folder_is_saved_as_text(tmp_path: Path) -> None:
    loaded = load_model(save_vision(tiny_vision("llava"), tmp_path / "model"))
    save_model(loaded.model, out := tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert fields(out)["model_type"] == "llama" and "optprune_part_of" not in fields(out)
    assert load_model(out).whole is None


def test_code_elsewhere_is_not_named(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    for name in ("config.json", "preprocessor_config.json"):
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(found | {"auto_map": {"AutoConfig": "a/b--c.D"}}), encoding="utf-8")
    save_model(load_model(folder), out := tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert "auto_map" not in fields(out)
    assert json.loads((out / "preprocessor_config.json").read_text(encoding="utf-8")) == {"size": 16}


def test_further_chat_templates_are_taken_too(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}", encoding="utf-8")
    save_model(load_model(folder), out := tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert (out / "additional_chat_templates" / "tools.jinja").read_text(encoding="utf-8") == "{{ tools }}"


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    (tmp_path / "secret").write_text("{}", encoding="utf-8")
    (folder / "processor_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"processor_config\.json of .* is a link"):
        save_model(load_model(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exporter", [GgufFile(), OnnxFolder()], ids=lambda one: one.name)
def test_other_formats_hold_no_vision_part(exporter: Any, tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    for model in (folder, load_model(folder)):
        with pytest.raises(InputError, match="cannot hold its vision part: save the language part alone"):
            export(model, tmp_path / "out", exporter)
    assert not (tmp_path / "out").exists()


def test_the_vision_part_keeps_its_dtype(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    for loaded, dtype in ((load_model(folder), "bfloat16"), (load_model(folder, dtype="bfloat16"), "auto")):
        with pytest.raises(InputError, match="stays float32, so its language part is not written as bfloat16"):
            save_model(loaded, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_blocks_of_different_shapes_are_refused_where_no_class_takes_them(tmp_path: Path) -> None:
    loaded = load_model(save_vision(tiny_vision("llava", model_type="qwen3"), tmp_path / "model"))
    with pytest.raises(InputError, match="stay alike in the language part of a llava model, and the recipe"):
        optprune.prune(loaded.model, batches(), load_recipe("structured_best", {"sparsity": 0.2, "units": "mlp"}))
    decoder = Decoder(loaded.model)
    [layers] = Mlp().layers(decoder, 1)
    decoder.keep_units(1, layers, MIXED)
    with pytest.raises(InputError, match="the blocks of a qwen3 model must have one shape in the language part of a"):
        decoder.record_shapes()


# -- blocks of different shapes

PROGRAM = """
import sys
sys.modules["optprune"] = None  # importing it is an error
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    try:
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
        sys.exit("it loads without its code")
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    given = load_file(folder + "-inputs.safetensors")
    with torch.no_grad():
        logits = model(**given).logits
        ids = model.generate(**given, max_new_tokens=6, do_sample=False)
        slow = model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=False)
    save_file({"logits": logits.contiguous(), "ids": ids, "slow": slow}, folder + "-outputs.safetensors")
"""


@pytest.fixture(scope="module")
def without_optprune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family, pruned to blocks of different shapes, and what one process without optprune answers."""
    place = tmp_path_factory.mktemp("without")
    for family in CONFIGS:
        folder = save_vision(tiny_vision(family, num_hidden_layers=4), place / f"{family}-model")
        loaded = load_model(folder)
        mixed(loaded.model)
        saved = save_model(loaded, place / family, check_tokens=CHECK_TOKENS)
        assert not saved.stock and saved.logits_difference == 0
        inputs = {name: value.contiguous() for name, value in with_image(stock(folder).config).items()}
        save_file(inputs, place / f"{family}-inputs.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules"), "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, "-c", PROGRAM, *(str(place / family) for family in CONFIGS)]
    subprocess.run(words, check=True, env=environment, capture_output=True)
    return place


def mixed_by_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """The model of `mixed` with columns of zeros."""
    blocks = model.model.language_model.layers
    blocks[0].self_attn.o_proj.weight.data.zero_()
    if model.config.model_type != "gemma4":  # of which heads and values stay
        heads = blocks[1].self_attn.o_proj.weight.data.view(64, 4, 16)
        heads[:, :2] = heads[:, :, 5:] = 0
    if not hasattr(blocks[1].self_attn, "k_norm"):  # with norms all pairs stay
        blocks[1].self_attn.k_proj.weight.data.view(2, 2, 8, 64)[:, :, 5:] = 0
    blocks[1].mlp.down_proj.weight.data[:, 50:] = 0
    blocks[2].mlp.down_proj.weight.data.zero_()
    return model


@by_vision_family
def test_blocks_of_different_shapes_are_zeroed_columns_without_optprune(
    family: str, without_optprune: Path, tmp_path: Path
) -> None:
    folder, out = without_optprune / f"{family}-model", without_optprune / family
    found = load_file(without_optprune / f"{family}-outputs.safetensors")
    loaded, zeroed = load_model(folder), mixed_by_zeros(stock(folder))
    mixed(loaded.model)
    with torch.no_grad():
        expected = zeroed(**with_image(stock(folder).config)).logits
    assert (found["logits"] - expected).abs().max() <= rounding(expected, blocks=4)
    assert torch.equal(found["ids"], found["slow"]) and found["ids"][0].tolist() == answer(zeroed)[1]
    check_rest(folder, out)
    again = load_model(out)
    with torch.no_grad():
        assert torch.equal(again.model(CHECK_TOKENS).logits, loaded.model(CHECK_TOKENS).logits)
    save_model(again, tmp_path / "again", check_tokens=CHECK_TOKENS)
    assert raw(tmp_path / "again") == raw(out) and fields(tmp_path / "again") == fields(out)


@pytest.mark.parametrize(
    ("family", "part"),
    [("llava", "mistral"), ("llava", "qwen2"), ("mistral3", "ministral3"), ("gemma3", "gemma3_text")],
)
def test_parts_of_other_families_differ_too(family: str, part: str, tmp_path: Path) -> None:
    folder = save_vision(tiny_vision(family, model_type=part), tmp_path / "model")
    loaded, recipe = open_model(folder), load_recipe("structured_best", {"sparsity": 0.2})
    report = optprune.prune(loaded.model, batches(), recipe, store=loaded.store)
    saved = save_model(loaded, out := tmp_path / "out", report=report, recipe=recipe, check_tokens=CHECK_TOKENS)
    assert not saved.stock and saved.logits_difference == 0
    assert fields(out)["model_type"] == f"pruned_{family}"
    check_rest(folder, out)
    with torch.no_grad():
        model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
        assert torch.equal(model(CHECK_TOKENS).logits, load_model(out).model(CHECK_TOKENS).logits)


def test_a_folder_of_different_shapes_becomes_stock_again(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    loaded = load_model(folder)
    decoder = loaded.decoder()
    [layers] = Mlp().layers(decoder, 1)
    decoder.keep_units(1, layers, torch.arange(128) < 100)
    decoder.record_shapes()
    save_model(loaded, uneven := tmp_path / "uneven", check_tokens=CHECK_TOKENS)
    loaded = load_model(uneven)
    decoder = loaded.decoder()
    [layers] = Mlp().layers(decoder, 0)
    decoder.keep_units(0, layers, torch.arange(128) < 100)
    decoder.record_shapes()
    assert save_model(loaded, out := tmp_path / "out", check_tokens=CHECK_TOKENS).stock
    expected = fields(folder)
    expected["text_config"]["intermediate_size"] = 100
    assert fields(out) == expected and not list(out.glob("*.py"))
    assert stock(out).config.text_config.intermediate_size == 100


# -- the commands


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(demo_articles("calibration")[:6]), encoding="utf-8")
    return file


def command(folder: Path, text: Path, out: Path, *more: str) -> list[str]:
    words = ("--calibration", str(text), "--samples", "8", "--seq-length", "32", "--output", str(out))
    asked = () if "--to" in more else ("--sparsity", "0.2")
    return ["prune", str(folder), *words, "--recipe", "structured_uniform_best", *asked, *more]


@pytest.mark.parametrize("recipe", ["structured_uniform_best", "structured_best"])
def test_the_commands_take_the_folder(
    recipe: str, source: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = source.parent / "out", source.parent / "text"
    words = ("--recipe", recipe, *(("--units", "mlp") if "gemma4" in source.name else ()))
    assert main(command(source, text, out, *words)) == 0
    assert "loads with AutoModelForImageTextToText.from_pretrained(" in capsys.readouterr().out
    check_rest(source, out)
    if recipe == "structured_uniform_best":
        assert stock(out).config.text_config.intermediate_size == 88
    else:
        shapes = {(block["mlp_width"], block["value_dim"]) for block in fields(out)["text_config"]["optprune_shapes"]}
        assert min(shapes) < (128, 16)
    load_model(out).model.save_pretrained(part)
    load_model(out).tokenizer.save_pretrained(part)
    found = []
    for folder in (out, part):
        measured = folder.parent / f"{folder.name}.json"
        asked = ("--text", str(text), "--seq-length", "32", "--windows", "4", "--json", str(measured))
        assert main(["evaluate", str(folder), *asked]) == 0
        found.append(json.loads(measured.read_text(encoding="utf-8"))["perplexity"])
    assert found[0] == found[1]
    assert main(["audit", str(out), "--against", str(source)]) == 0
    assert main(["report", str(out)]) == 0
    assert main(["plan", str(source), "--no-probe", "--seq-length", "64", *words]) == 0
    assert "AutoModelForImageTextToText" in (out / "report.html").read_text(encoding="utf-8")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageTextToText" in card and "byte for byte" in card
    assert (
        main(command(source, text, out, *words, "--overwrite")) == 0
    )  # it holds the files of a model and nothing else


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--recipe", "structured_best"), "--recipe structured_uniform_best"),
        (("--units", "vo", "--sparsity", "0.1"), "fewer value dimensions"),
        (("--recipe", "depth"), "remove whole layers"),
        (("--vocabulary", "256"), "its vocabulary is not pruned"),
        (("--save-dtype", "bfloat16"), "--save-dtype float32"),
        (("--dtype", "bfloat16"), "--save-dtype float32"),
        (("--target", "vllm"), "does not take llava models"),
        (("--target", "gguf"), "does not take llava models"),
        (("--to", "0.4MiB"), "whose vision part is not pruned: give --sparsity"),
    ],
)
def test_what_the_folder_cannot_hold_is_refused_before_any_work(
    more: tuple[str, ...], sentence: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_vision(tiny_vision("llava", model_type="qwen3"), tmp_path / "model")
    capsys.readouterr()  # what making the folder has said
    assert main(command(folder, text, tmp_path / "out", *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and sentence in lines[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_a_run_goes_on_where_it_was_stopped(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    assert main(command(folder, text, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr("optprune.export.folder.write_weights", stop)
        assert main(command(folder, text, tmp_path / "out")) != 0
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run").exists()
    assert main(command(folder, text, tmp_path / "out", "--resume")) == 0
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


def stop(*_: Any, **__: Any) -> None:
    raise OptpruneError("stopped")


@pytest.mark.parametrize("recipe", ["structured_uniform_best", "structured_best"])
def test_a_part_is_healed_in_its_folder(recipe: str, tmp_path: Path, text: Path) -> None:
    folder, out, healed = (tmp_path / name for name in ("model", "out", "healed"))
    save_vision(tiny_vision("llava"), folder)
    assert main(command(folder, text, out, "--recipe", recipe, "--sparsity", "0.35")) == 0
    words = ("--text", str(text), "--seq-length", "32", "--tokens", "2048", "--output", str(healed))
    assert main(["heal", str(out), "--teacher", str(folder), *words]) == 0
    check_rest(folder, healed)
    assert raw(healed) != raw(out) and fields(healed) == fields(out)
    assert {name: data[1] for name, data in raw(healed).items()} == {name: data[1] for name, data in raw(out).items()}


def test_the_plan_counts_the_vision_part(tmp_path: Path) -> None:
    """The output as it is written, and the memory of the process that reloads it."""
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    load_model(folder).model.save_pretrained(text := tmp_path / "text")
    around = sum(len(data) for name, (_, _, data) in raw(folder).items() if not language_name(name))
    programs = []
    for where in (folder, text):
        shapes = load_shapes(where, load_config(where))
        request = Request(recipe=load_recipe("wanda"), seq_length=32, **places_of(str(where), shapes, "cpu", "auto"))
        programs.append(resolve(shapes, request))
    whole, alone = ({phase.name: phase for phase in planned_memory(one, 0).phases} for one in programs)
    assert whole["saving"].disk_bytes - alone["saving"].disk_bytes == around > 10_000
    assert whole["checking"].host_bytes - alone["checking"].host_bytes == around
    save_model(load_model(folder), out := tmp_path / "out")
    assert sum(len(data) for _, _, data in raw(out).values()) == output_bytes(programs[0])


def test_recipes_are_compared_on_the_language_part(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_vision(tiny_vision("llava"), tmp_path / "model"), tmp_path / "out"
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(demo_articles("calibration")[20:24]), encoding="utf-8")
    words = ("--calibration", str(text), "--text", str(other), "--samples", "8", "--seq-length", "32")
    recipes = ("--recipes", "structured_uniform_best", "--sparsities", "0.2", "--keep-models")
    assert main(["compare", str(folder), *words, *recipes, "--output", str(out)]) == 0
    [model] = (out / "models").iterdir()
    check_rest(folder, model)
    assert stock(model).config.text_config.intermediate_size == 88
    capsys.readouterr()
    assert main(["frontier", str(folder), "--text", str(other), "--seq-length", "32", "--output", str(out)]) == 2
    assert "which hold no vision part: save the language part alone" in capsys.readouterr().err


def test_a_text_model_is_no_part(tmp_path: Path) -> None:
    assert not hasattr(load_config(save_tiny(tiny_llama(), tmp_path / "text")), "optprune_part_of")


@by_vision_family
def test_single_weights_go(family: str, tmp_path: Path) -> None:
    folder = save_vision(tiny_vision(family), tmp_path / "model")
    loaded, recipe = open_model(folder), load_recipe("wanda", {"sparsity": 0.5})
    report = optprune.prune(loaded.model, batches(), recipe, store=loaded.store)
    save_model(loaded, out := tmp_path / "out", report=report, recipe=recipe, check_tokens=CHECK_TOKENS)
    assert fields(out) == fields(folder)
    for block in stock(out).model.language_model.layers:
        assert float((block.mlp.up_proj.weight == 0).float().mean()) == 0.5
    check_rest(folder, out)
