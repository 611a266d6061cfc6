"""report.html: prune writes it with the folder, and optprune report makes it again with what was measured since."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from optprune.cli import main
from optprune.measure import divergence_from, generate
from optprune.models import load_model
from optprune.report import page, read_report
from optprune.texts import evaluation_windows, read_documents, tokenise
from tests.helpers.html_pages import loaded, parsed
from tests.helpers.reports import evaluated, narrowed, speed
from tests.helpers.tiny_models import save_tiny, tiny_llama

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SMALL = ["--samples", "8", "--seq-length", "64"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def pruned(dense: Path, attempted_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run wrote: widths that only the modelling file knows."""
    output = tmp_path_factory.mktemp("pruned") / "out"
    words = ["prune", str(dense), "--calibration", str(attempted_text), "--output", str(output), *SMALL]
    assert main([*words, "--recipe", "fasp", "--sparsity", "0.3", "--width-multiple", "8"]) == 0
    return output


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(pruned, tmp_path / "out"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
        capsys.readouterr()
        assert main(["report", *words]) == 2
        assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
        told = capsys.readouterr()
        assert told.out == ""
        (sentence,) = [line for line in told.err.splitlines() if line.startswith("error: ")]
        return sentence

    return run


def test_a_run_writes_the_page_of_its_report(pruned: Path, dense: Path, attempted_text: Path) -> None:
    report = json.loads((pruned / "report.json").read_text())
    root = parsed((pruned / "report.html").read_text())
    assert loaded(root) == []
    assert [row[0] for row in root.tables()["Every layer that was solved"][1:]] == [
        layer["name"] for layer in report["layers"]
    ]
    phases = root.tables()["Time and largest memory of each phase"]
    every = [phase["name"] for phase in report["phases"]]
    assert [row[0] for row in phases[1:-1]] == [name for name in every if name not in ("metric", "budget")]
    assert {"saving", "checking"} <= {row[0] for row in phases}
    rows = {row[0]: row[1:3] for row in root.tables()["The model before and after"]}
    decoder, before = load_model(pruned).decoder(), load_model(dense).decoder()
    assert rows["linear weights of the blocks"] == [f"{one.linear_weights():,}" for one in (before, decoder)]
    counts = [sum(parameter.numel() for parameter in one.model.parameters()) for one in (before, decoder)]
    assert rows["parameters in all"] == [f"{count:,}" for count in counts]
    assert rows["size of the weights in float32"] == [f"{4 * count / 2**20:,.1f} MiB" for count in counts]
    assert "trust_remote_code=True" in root.all("code")[-1].text
    assert f"{attempted_text}, 8 windows of 64 tokens" in root.text
    assert (pruned / "report.html").stat().st_mode == (pruned / "config.json").stat().st_mode


def test_made_again_it_has_the_same_bytes(folder: Path, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the commands, which name the folder."""
    before = (folder / "report.html").read_bytes().replace(str(pruned).encode(), str(folder).encode())
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == before
    assert capsys.readouterr().out == f"{folder / 'report.html'}: {len(before) / 1024:.0f} KiB\n"


def test_other_commands_take_the_folder_as_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folder)]) == 0
    assert "fault" not in capsys.readouterr().out
    assert main(["export", str(folder), "--output", str(folder.parent / "x.gguf"), "--type", "f32"]) == 0


@pytest.mark.e2e
def test_beside_the_dense_model_it_has_what_was_measured(folder: Path, dense: Path, attempted_text: Path) -> None:
    words = ["--against", str(dense), "--text", str(attempted_text), "--seq-length", "64", "--windows", "2"]
    output = folder.parent / "page.html"
    before = (folder / "report.html").read_bytes()
    assert main(["report", str(folder), *words, "--output", str(output)]) == 0
    assert (folder / "report.html").read_bytes() == before
    root = parsed(output.read_text())
    model, other = load_model(folder), load_model(dense)
    windows = evaluation_windows(tokenise(model.tokenizer, read_documents(str(attempted_text))), 64, 2)  # type: ignore[arg-type]
    expected = divergence_from(model.model, other.model, windows)
    rows = {row[0]: row[1:3] for row in root.tables()["The model before and after"]}
    found = [float(cell) for cell in rows["perplexity"]]
    assert found == pytest.approx([expected.dense_perplexity, expected.perplexity], abs=1e-4, rel=1e-4)
    told = rows["divergence, nats a prediction"][1].split(" ± ")
    known = expected.standard_errors
    assert known is not None
    assert list(map(float, told)) == pytest.approx([expected.divergence, known.divergence], abs=1e-4)
    assert rows["first choice the same"][1] == f"{expected.agreement:.1%} ± {known.agreement:.1%}"
    assert rows["parameters in all"][0] == f"{sum(part.numel() for part in other.model.parameters()):,}"
    assert rows["files as they are stored"][0] == f"{(dense / 'model.safetensors').stat().st_size / 2**20:,.1f} MiB"
    # Two windows of 64 tokens have room for four prompts of 32.
    said = [part for part in root.all("div") if part.attributes.get("class") == "said"]
    prompts = list(windows.flatten().split(32))
    assert len(said) == len(prompts) == 4
    for name, one in (("before", other), ("after", model)):
        # A tiny model says characters that HTML does not allow.
        texts = [UNSEEN.sub("\ufffd", text) for text in generate(one.model, one.tokenizer, prompts)]  # type: ignore[arg-type]
        assert [
            pair.all("dd")[0].text for each in said for pair in each.all("div") if pair.all("dt")[0].text == name
        ] == texts


def test_with_figures_from_files_nothing_is_measured(folder: Path, no_weights: None) -> None:
    inner = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    digest = hashlib.sha256(inner).hexdigest()
    files = {"evaluation": evaluated(weights=digest), "speed": speed(digest)}
    words: list[str] = []
    for name, data in files.items():
        (folder.parent / f"{name}.json").write_text(json.dumps(data))
        words += [f"--{name}", str(folder.parent / f"{name}.json")]
    assert main(["report", str(folder), *words]) == 0
    root = parsed((folder / "report.html").read_text())
    rows = {row[0]: row[1:3] for row in root.tables()["The model before and after"]}
    assert rows["perplexity"] == ["29.4321", "35.0123"]
    assert rows["decoding, tokens a second"] == ["20.0", "30.0"]
    assert f"pruned (weights {digest[:12]}) on heldout.txt" in root.text
    assert f"Speed of pruned (weights {digest[:12]}) beside dense on cpu" in root.text


def test_figures_of_another_model_are_refused(
    folder: Path, dense: Path, attempted_text: Path, refused: Callable[..., str]
) -> None:
    files = {name: folder.parent / f"{name}.json" for name in ("own", "other", "fast", "slow")}
    words = ["--text", str(attempted_text), "--seq-length", "64", "--windows", "1", "--json"]
    times = ["--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--json"]
    for model, name, other in ((folder, "own", "fast"), (dense, "other", "slow")):
        assert main(["evaluate", str(model), *words, str(files[name])]) == 0
        assert main(["benchmark-model", str(model), *times, str(files[other])]) == 0
    for option, file in (("--evaluation", files["other"]), ("--speed", files["slow"])):
        told = refused(str(folder), option, str(file))
        assert f"has figures of other weights ({dense}) than those in {folder}: measure {folder} by optprune" in told
    for option, data in (("--evaluation", evaluated()), ("--speed", speed())):
        (file := folder.parent / "older.json").write_text(json.dumps(data))
        assert "does not say which weights were measured" in refused(str(folder), option, str(file))
    assert main(["report", str(folder), "--evaluation", str(files["own"]), "--speed", str(files["fast"])]) == 0


def test_a_dense_model_that_was_not_pruned_is_refused(
    folder: Path, dense: Path, attempted_text: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = save_tiny(tiny_llama(), tmp_path / "other")
    stored = {name: 2 * tensor for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    words = ["--text", str(attempted_text), "--seq-length", "64", "--windows", "1", "--generations", "0"]
    told = refused(str(folder), "--against", str(other), *words)
    assert f"{other} has other weights than the model that was pruned into {folder}, {dense}: name that model" in told
    shutil.copytree(dense, tmp_path / "moved")
    assert main(["report", str(folder), "--against", str(tmp_path / "moved"), *words]) == 0
    report = json.loads((folder / "report.json").read_text())
    for facts in ({}, report["run_facts"] | {"the model": "in memory 1f"}):
        (folder / "report.json").write_text(json.dumps(report | {"run_facts": facts}))
        assert main(["report", str(folder), "--against", str(other), *words]) == 0


def test_a_folder_with_only_a_report_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(narrowed().to_json())
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == page(narrowed(), folder=str(tmp_path))
    assert "there is nothing to load" in parsed((tmp_path / "report.html").read_text()).text


def test_a_report_of_other_weights_says_nothing_of_these(folder: Path) -> None:
    told = read_report(folder)
    changed = json.loads(told.to_json())
    changed["blocks"][0]["after"]["mlp_width"] += 8
    (folder / "report.json").write_text(json.dumps(changed))
    assert main(["report", str(folder)]) == 0
    text = parsed((folder / "report.html").read_text()).text
    assert "The folder has no model of these shapes" in text and "parameters in all" not in text


def test_a_healed_folder_tells_of_it_and_a_damaged_section_is_refused(folder: Path, capsys: Any) -> None:
    report = json.loads((folder / "report.json").read_text())
    state = {"divergence": 0.25, "perplexity": 30.5}
    healing = {"steps": 7, "tokens": 99, "held_out_tokens": 55, "seconds": 1.0, "dense_perplexity": 29.0}
    healing |= {"before": state, "after": {"divergence": 0.125, "perplexity": None}}
    (folder / "report.json").write_text(json.dumps({**report, "healing": healing}))
    assert main(["report", str(folder)]) == 0
    rows = parsed((folder / "report.html").read_text()).tables()["On 55 held-out tokens"]
    assert rows[1:] == [
        ["divergence, nats a prediction", "0.2500", "0.1250", "0"],
        ["perplexity", "30.50", "-", "29.00"],
    ]
    (folder / "report.json").write_text(json.dumps({**report, "healing": {**healing, "steps": "many"}}))
    assert main(["report", str(folder)]) == 2
    assert "the section healing of" in capsys.readouterr().err


def test_what_cannot_be_is_refused_in_a_sentence(
    folder: Path, refused: Callable[..., str], dense: Path, attempted_text: Path, no_weights: None
) -> None:
    page_file = folder / "report.html"
    assert "has no report.json: give a folder that optprune prune wrote" in refused(str(dense))
    assert "has no report.json" in refused(str(folder / "nowhere"))
    assert "--against compares predictions on a text: give one by --text" in refused(
        str(folder), "--against", str(dense)
    )
    assert "give one of them" in refused(
        str(folder), "--text", str(attempted_text), "--evaluation", str(folder / "report.json")
    )
    assert "--generations cannot be -1" in refused(str(folder), "--generations", "-1")
    assert "is not what optprune evaluate --json writes" in refused(
        str(folder), "--evaluation", str(folder / "report.json")
    )
    assert "is not what optprune benchmark-model --json writes" in refused(
        str(folder), "--speed", str(folder / "report.json")
    )
    assert "there is no text" in refused(str(folder), "--text", "missing.txt")
    for name in ("config.json", "report.json", "README.md"):
        assert "has a name that a file of the model" in refused(str(folder), "--output", str(folder / name))
    assert "is a folder: name a file" in refused(str(folder), "--output", str(folder))
    assert "there is no folder" in refused(str(folder), "--output", str(folder / "no" / "page.html"))
    assert page_file.is_file()


def test_a_page_replaces_only_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, other = tmp_path / "page.html", tmp_path / "thesis.tex"
    for _ in range(2):
        assert main(["report", str(folder), "--output", str(page)]) == 0
    other.write_text("weeks of work")
    assert main(["report", str(folder), "--output", str(other)]) == 2
    (folder / "report.html").unlink()
    (folder / "report.html").symlink_to(other)
    capsys.readouterr()
    assert main(["report", str(folder)]) == 2
    assert "is a link, so the page is not written there: name the file by --output" in capsys.readouterr().err
    assert other.read_text() == "weeks of work"


def test_the_page_is_a_file_of_the_model_for_other_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folder), "--json", str(folder / "report.html")]) == 2
    assert "has a name that a file of the model" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "report.html").read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    assert main(["report", str(folder)]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
