"""optprune heal: from a folder to a checked one, after a kill too, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optprune import prune
from optprune.cli import main
from optprune.cli.run_folder import run_folder_of
from optprune.export import folder as folders
from optprune.export import save_model
from optprune.models import load_model
from optprune.recipe import load_recipe
from optprune.report import audit
from optprune.texts import demo_articles
from tests.helpers.attempts import Attempt
from tests.helpers.html_pages import parsed
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.token_batches import batches

ROOT = Path(__file__).parents[2]
SMALL = {"--tokens": "1024", "--seq-length": "32", "--batch-size": "4", "--held-out": "4", "--learning-rate": "1e-3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, one that was pruned to uneven widths and zeros, and a text of many documents."""
    place = tmp_path_factory.mktemp("healing")
    save_tiny(tiny_llama(num_hidden_layers=2), place / "dense")
    loaded = load_model(place / "dense")
    recipe = load_recipe("structured_best", {"sparsity": 0.3, "allocation.multiple": 1})
    report = prune(loaded.model, batches(), recipe)
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    save_model(loaded, place / "pruned", report=report, recipe=recipe, check_tokens=batches()[0][:1])
    rows = [json.dumps({"text": article}) for article in demo_articles("calibration")[:30]]
    (place / "text.jsonl").write_text("\n".join(rows))
    return place


def words(folder: Path, output: Path, *more: str, model: str = "pruned", **options: Any) -> list[str]:
    given = {"--teacher": folder / "dense", "--text": folder / "text.jsonl", "--output": output, **SMALL}
    given |= {"--" + name.replace("_", "-"): value for name, value in options.items()}
    return ["heal", str(folder / model), *(str(word) for pair in given.items() for word in pair), *more]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The folder of a run."""
    assert main(words(folder, folder / "healed", "--json", str(folder / "record.json"))) == 0
    return folder / "healed"


@pytest.mark.e2e
def test_the_folder_is_checked_and_tells_of_it(folder: Path, whole: Path) -> None:
    place = whole
    before, after = (load_file(each / "model.safetensors") for each in (folder / "pruned", place))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor != 0, before[name] != 0), name
        assert torch.equal(tensor, before[name]) is name.endswith("kept_pairs"), name
    assert (
        load_model(place, device="cpu").model.config.optprune_shapes
        == load_model(folder / "pruned", device="cpu").model.config.optprune_shapes
    )
    report, old = (json.loads((each / "report.json").read_text()) for each in (place, folder / "pruned"))
    healing = report.pop("healing")
    assert report == old
    record = json.loads((folder / "record.json").read_text())
    assert record.pop("generator") == "written by optprune"
    assert record.items() <= healing.items()
    assert (healing["steps"], healing["tokens"], healing["held_out_tokens"]) == (8, 1024, 4 * 32)
    assert healing["after"]["divergence"] < healing["before"]["divergence"]
    assert healing["held_out_documents"] >= 1
    root = parsed((place / "report.html").read_text())
    (section,) = (part for part in root.all("section") if part.attributes.get("aria-labelledby") == "healing")
    told = section.text
    assert "8 steps on 1,024 tokens" in told and f"{healing['zeros']:,} zeros" in told
    for when in ("before", "after"):
        assert f"{healing[when]['divergence']:.4f}" in told and f"{healing[when]['perplexity']:.2f}" in told
    card, pruned_card = ((each / "README.md").read_text() for each in (place, folder / "pruned"))
    assert card.startswith(pruned_card[: pruned_card.index("Pruning does not measure")])
    assert "reproduces the model before healing" in card and "reproduces the model before" not in pruned_card
    assert f"| {healing['before']['divergence']:.4f} | {healing['after']['divergence']:.4f} | 0 |" in card
    assert (place / "recipe.yaml").read_bytes() == (folder / "pruned" / "recipe.yaml").read_bytes()
    assert not audit(place).faults
    assert not run_folder_of(place).exists()


def test_the_page_is_there_when_the_folder_has_its_name(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healing, seen = json.loads((whole / "report.json").read_text())["healing"], list[bool]()
    monkeypatch.setattr(folders, "page", lambda *_, **__: seen.append((folder / "paged").exists()) or "a page")
    save_model(
        load_model(whole),
        folder / "paged",
        healing=healing,
        teacher=str(folder / "dense"),
        check_tokens=batches()[0][:1],
    )
    assert seen == [False] and (folder / "paged" / "report.html").read_text() == "a page"


def test_what_the_dense_model_wrote_is_told(folder: Path) -> None:
    assert main(words(folder, folder / "written", "--generated", "6")) == 0
    healing = json.loads((folder / "written" / "report.json").read_text())["healing"]
    assert (healing["generated_windows"], healing["tokens"], healing["steps"]) == (6, 1024 + 6 * 32, 10)
    card = (folder / "written" / "README.md").read_text()
    assert "for 10 steps on 1,216 tokens, of which that model generated 6 windows; all zeros and widths are" in card
    page = parsed((folder / "written" / "report.html").read_text()).text
    assert "10 steps on 1,216 tokens, 6 windows of them generated by the dense model" in page


def test_a_damaged_report_of_the_pruned_folder_is_refused(folder: Path, no_weights: None, capsys: Any) -> None:
    shutil.copytree(folder / "pruned", folder / "damaged")
    report = json.loads((folder / "pruned" / "report.json").read_text())
    for text in (json.dumps({**report, "seconds": "many"}), "{", "null"):
        (folder / "damaged" / "report.json").write_text(text)
        assert main(words(folder, folder / "none", model="damaged", tokens=128)) == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "report.json" in sentence
        assert not (folder / "none").exists() and not (folder / "none.run").exists()


@pytest.mark.slow
def test_a_plain_model_is_healed_too(folder: Path, capsys: Any) -> None:
    save_tiny(tiny_llama(5), folder / "other")
    assert main(words(folder, folder / "plain", model="other", tokens=128)) == 0
    told = capsys.readouterr()
    assert "all 0 zeros of the pruned model are still zero" in told.out and "reload check passed" in told.out
    assert "after 1 of 1 steps: divergence" in told.err
    assert json.loads((folder / "plain" / "report.json").read_text()).keys() == {"healing"}
    assert not (folder / "plain" / "report.html").exists(), "there is no run that a page would be about"
    assert not audit(folder / "plain").faults and not audit(folder / "plain").notes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokens": 8}, "--tokens cannot be 8: it is at least 32"),
        ({"tokens": 10**7}, "lower --tokens, or give a longer text"),
        ({"held_out": 0}, "--held-out cannot be 0"),
        ({"batch_size": 0}, "--batch-size cannot be 0"),
        ({"learning_rate": -1}, "the learning rate cannot be -1.0"),
        ({"dtype": "float16"}, "has too small a range for healing: use float32 or bfloat16"),
        ({"seq_length": 4096}, "windows of 4096 tokens are longer than the 512 positions"),
        ({"teacher": "missing"}, "there is no model folder 'missing'"),
        ({"text": "missing.txt"}, "there is no text 'missing.txt'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(
    options: dict[str, Any], sentence: str, folder: Path, attempt: Attempt, no_weights: None
) -> None:
    assert sentence in attempt.fails(words(folder, attempt.output, **options))


@pytest.mark.parametrize("column", ["", ":text"])
def test_results_are_not_written_over_the_text(column: str, folder: Path, attempt: Attempt, no_weights: None) -> None:
    text = folder / "text.jsonl"
    before = text.read_bytes()
    sentence = attempt.fails(words(folder, attempt.output, "--json", str(text), text=f"{text}{column}"))
    assert f"the JSON file {text} is an input too ({text}{column}): choose another" in sentence
    assert text.read_bytes() == before


def test_a_folder_of_others_is_not_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_weights: None
) -> None:
    foreign = save_tiny(tiny_llama(), tmp_path / "foreign")
    (foreign / "README.md").write_text("weeks of work")
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    assert main(words(folder, foreign, "--overwrite")) == 2
    assert "has no record of what optprune wrote there" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == before


def test_a_teacher_of_other_tokens_is_refused(folder: Path, attempt: Attempt, no_weights: None) -> None:
    teacher = save_tiny(tiny_llama(vocab_size=600), folder / "wider")
    sentence = attempt.fails(words(folder, attempt.output, teacher=teacher))
    assert "have different tokens, so their predictions cannot be compared" in sentence


@pytest.mark.slow
def test_two_processes_heal_as_one_does(folder: Path, whole: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "optprune"]
    done = subprocess.run(
        [*start, *words(folder, folder / "two", device="cpu")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reload check passed") == 1, "the first process alone speaks"
    one, two = (load_file(place / "model.safetensors") for place in (whole, folder / "two"))
    for name, weight in two.items():
        torch.testing.assert_close(weight, one[name], rtol=1e-3, atol=1e-4, msg=name)
    assert not run_folder_of(folder / "two").exists()
