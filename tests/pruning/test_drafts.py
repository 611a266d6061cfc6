"""Architectures that nobody described, pruned by the draft that was traced: asked for, checked, and never silently."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import optprune
from optprune.calibration.partial_sums import PartialSums
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import OnnxFolder, save_model
from optprune.export.exporter import ModelSource
from optprune.models import Decoder, Draft, load_model, open_model, trace
from optprune.models.draft import DRAFT_FIELD
from optprune.pruning import prune
from optprune.pruning.run import facts
from optprune.recipe import load_recipe
from tests.helpers.programs import program_of
from tests.helpers.streams import logits_block_by_block
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.token_batches import batches
from tests.helpers.unknown_models import UNKNOWN, config_of, unknown
from tests.helpers.weights import weights_of

TOKENS = torch.arange(10, 58)[None]


@functools.cache
def draft_of(name: str) -> Draft:
    return trace(config_of(name))


def saved(name: str, folder: Path) -> Path:
    unknown(name).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "MLP units": ("fasp", {"units": "mlp", "sparsity": 0.2}),
    "single weights": ("wanda", {"units.weights": "2:4", "sparsity": 0.5}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_pass_block_by_block_gives_the_models_own_logits(name: str) -> None:
    model = unknown(name)
    expected = logits(model)
    draft_of(name).put_into(model.config)
    assert torch.allclose(logits_block_by_block(Decoder(model), TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["starcoder2", "cohere", "glm4", "persimmon"])
def test_what_a_run_leaves_loads_with_plain_transformers(name: str, run: str, tmp_path: Path) -> None:
    loaded = load_model(saved(name, tmp_path / "dense"), architecture=draft_of(name))
    before = loaded.decoder().linear_weights()
    recipe, settings = RUNS[run]
    report = prune(loaded.model, batches(), load_recipe(recipe, settings))
    assert report.sparsity_reached == pytest.approx(settings["sparsity"], abs=0.1)
    saved_model = save_model(loaded.model, tmp_path / "out")
    assert saved_model.stock and loaded.decoder().linear_weights() <= before
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(stock), logits(loaded.model), atol=1e-5)
    # The folder says what it was read by, so that optprune reads it again.
    assert json.loads((tmp_path / "out" / "config.json").read_text())[DRAFT_FIELD] == draft_of(name).to_dict()
    assert torch.equal(logits(optprune.load_model(tmp_path / "out", device="cpu").model), logits(loaded.model))
    assert optprune.audit(tmp_path / "out").passed


def test_heads_go_where_the_stock_class_holds_fewer(tmp_path: Path) -> None:
    loaded = load_model(saved("starcoder2", tmp_path / "dense"), architecture=draft_of("starcoder2"))
    prune(loaded.model, batches(), load_recipe("osscar", {"units": "kv-groups", "sparsity": 0.2}))
    assert {shape.kv_heads for shape in loaded.decoder().shapes()} == {1}
    save_model(loaded.model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(stock), logits(loaded.model), atol=1e-5)


def test_blocks_from_files_are_pruned_as_those_in_memory(tmp_path: Path) -> None:
    folder, draft = saved("glm4", tmp_path), draft_of("glm4")
    whole, opened = load_model(folder, architecture=draft), open_model(folder, architecture=draft)
    recipe = load_recipe("wanda", {"units.weights": "2:4"})
    prune(whole.model, batches(), recipe)
    prune(opened.model, batches(), recipe, store=opened.store)
    left, there = weights_of(whole.decoder()), weights_of(opened.decoder())
    assert all(torch.equal(there[name], value) for name, value in left.items())


# -- never silently


def test_without_the_draft_the_refusal_stays_and_names_the_command(tmp_path: Path) -> None:
    folder = saved("starcoder2", tmp_path)
    for read in (load_model, open_model):
        with pytest.raises(InputError, match=r"'starcoder2' is not known.*optprune inspect MODEL drafts one"):
            read(folder)


def test_a_draft_that_breaks_a_law_is_refused_when_it_is_given(tmp_path: Path) -> None:
    data = draft_of("starcoder2").to_dict() | {"after_blocks": []}
    with pytest.raises(InputError, match="logits do not follow from the output of the last block; see"):
        load_model(saved("starcoder2", tmp_path), architecture=Draft.from_dict(data, "a draft"))


@pytest.mark.parametrize(
    ("recipe", "changed", "sentence"),
    [
        ("fasp", {}, "keep all or none of them: the stock class cannot hold fewer"),
        ("osscar", {"units": "vo"}, "keep all or none of them: the stock class cannot hold fewer"),
        (
            "structured_best",
            {"units": "mlp"},
            "stay alike under a draft, and the recipe structured_best lets them differ",
        ),
        ("depth", {}, "no sub-block of a starcoder2 model can be removed under a draft"),
        ("depth", {"allocation.parts": "layers"}, "no sub-block of a starcoder2 model can be removed under a draft"),
    ],
)
def test_what_a_stock_class_cannot_hold_is_refused_beforehand(
    recipe: str, changed: dict[str, Any], sentence: str
) -> None:
    model = unknown("starcoder2")
    draft_of("starcoder2").put_into(model.config)
    with pytest.raises(InputError, match=sentence):
        program_of(recipe, decoder=Decoder(model), fields=changed)


def test_a_division_that_is_uneven_is_refused(tmp_path: Path) -> None:
    model = unknown("starcoder2")
    draft_of("starcoder2").put_into(model.config)
    whole, narrow = ({"mlp_width": width, "kv_heads": 2, "value_dim": 16} for width in (128, 64))
    for other, sentence in ((narrow, "different shapes"), (whole | {"mlp_width": 0}, "no sub-block")):
        allocation = optprune.Allocation.from_dict({"sparsity": 0.1, "blocks": [whole, other]})
        with pytest.raises(InputError, match=sentence):
            prune(model, batches(), load_recipe("fasp", {"units": "mlp"}), allocation=allocation)


def test_a_run_is_of_its_draft() -> None:
    """So that it is not taken up again with another one."""
    model = unknown("starcoder2")
    draft_of("starcoder2").put_into(model.config)
    program = program_of("wanda", decoder=Decoder(model))
    found = facts(program, Decoder(model), batches(), PartialSums(), lambda event: None)
    assert found["its architecture"] == draft_of("starcoder2").to_dict()


# -- the commands


def test_inspect_writes_a_draft_or_says_what_it_does_not_understand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of("starcoder2").save_pretrained(tmp_path / "known")
    config_of("bloom").save_pretrained(tmp_path / "odd")
    file = tmp_path / "draft.yaml"
    assert main(["inspect", str(tmp_path / "known"), "--output", str(file)]) == 0
    assert Draft.read(file) == draft_of("starcoder2")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "known")]) == 0
    assert capsys.readouterr().out == file.read_text()
    file.write_text("an edited draft")
    assert main(["inspect", str(tmp_path / "odd"), "--output", str(file)]) == 2
    assert f"the draft {file} exists, and you may have edited it: choose another" in capsys.readouterr().err
    assert file.read_text() == "an edited draft"
    assert main(["inspect", str(tmp_path / "odd"), "--output", str(file), "--overwrite"]) == 1
    assert not file.read_text().startswith("an edited")
    assert main(["inspect", str(tmp_path / "odd"), "--output", str(tmp_path / "other.yaml")]) == 1
    assert "transformer.h.0.mlp.dense_4h_to_h (Linear): no field of the config" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2


def test_inspect_audits_what_is_known_as_it_always_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "llama")
    said = []
    for name in ("audit", "inspect"):
        assert main([name, str(folder)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    assert main(["inspect", str(folder), "--expect", "2:4"]) == 1
    assert main(["inspect", str(folder), "--output", str(tmp_path / "draft.yaml")]) == 0
    assert Draft.read(tmp_path / "draft.yaml").model_type == "llama"


def test_plan_takes_a_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of("starcoder2").save_pretrained(tmp_path)
    (tmp_path / "draft.yaml").write_text(draft_of("starcoder2").to_yaml())
    options = ["--recipe", "fasp", "--units", "mlp", "--no-probe", "--seq-length", "64"]
    assert main(["plan", str(tmp_path), *options]) == 2
    assert "--architecture" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), *options, "--architecture", str(tmp_path / "draft.yaml")]) == 0


def test_the_dense_model_is_read_by_the_draft_that_the_pruned_one_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it in evaluate and audit; by itself it takes an --architecture."""
    monkeypatch.setattr("optprune.export.onnx_folder.PACKAGES", ())
    dense, out, text = save_tiny(unknown("starcoder2"), tmp_path / "dense"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The committee met on Monday and talked about prices. " * 40)
    draft = tmp_path / "draft.yaml"
    draft.write_text(draft_of("starcoder2").to_yaml())
    loaded = optprune.load_model(dense, architecture=draft)
    save_model(loaded.model, out, tokenizer=loaded.tokenizer)
    refusal = OnnxFolder().unsupported(ModelSource(out))
    assert refusal is not None and "its architecture is known from a draft only" in refusal
    options = ["--text", str(text), "--seq-length", "64", "--json"]
    assert main(["evaluate", str(out), "--against", str(dense), *options, str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["divergence"] == pytest.approx(0, abs=1e-6) and found["agreement"] == 1
    assert main(["audit", str(out), "--against", str(dense)]) == 0
    assert main(["evaluate", str(dense), *options, str(tmp_path / "alone.json")]) == 2
    assert main(["evaluate", str(dense), *options, str(tmp_path / "alone.json"), "--architecture", str(draft)]) == 0
    assert json.loads((tmp_path / "alone.json").read_text())["perplexity"] == pytest.approx(found["perplexity"])


@pytest.mark.slow
def test_the_story_of_a_model_that_nobody_described(tmp_path: Path) -> None:
    save_tiny(unknown("starcoder2"), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("The committee met on Monday and talked about prices. " * 200)
    draft, out = tmp_path / "draft.yaml", tmp_path / "out"
    assert main(["inspect", str(tmp_path / "dense"), "--output", str(draft)]) == 0
    command = ["prune", str(tmp_path / "dense"), "--calibration", str(tmp_path / "text.txt"), "--output", str(out)]
    command += ["--recipe", "structured_best", "--units", "mlp", "--samples", "4", "--seq-length", "64"]
    assert main(command) == 2 and not out.exists()
    assert main([*command, "--architecture", str(draft)]) == 0
    assert main(["audit", str(out), "--expect", "sparsity=0.15..0.3"]) == 0
    shapes = Decoder(optprune.load_model(out, device="cpu").model).shapes()
    assert len(set(shapes)) == 1 and shapes[0].mlp_width < 128
    words = ["--text", str(tmp_path / "text.txt"), "--seq-length", "64"]
    asked = ["heal", str(out), "--teacher", str(tmp_path / "dense"), "--output", str(tmp_path / "healed"), *words]
    assert main([*asked, "--tokens", "512", "--batch-size", "2", "--held-out", "1"]) == 0
    (tmp_path / "other.txt").write_text("Rain fell on the hills for a week, and the river rose. " * 100)
    asked = ["compare", str(tmp_path / "dense"), "--recipes", "fasp", "--sparsities", "0.2", "--samples", "2"]
    asked += ["--units", "mlp", "--calibration", str(tmp_path / "other.txt"), *words, "--output", str(tmp_path / "c")]
    assert main(asked) == 2
    assert main([*asked, "--architecture", str(draft)]) == 0
