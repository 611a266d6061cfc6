"""Runs on records with images: from the command to a folder whose model answers an image."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor

import optprune
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import load_model, open_model
from optprune.models.vision import language_name
from optprune.recipe import load_recipe
from optprune.report import BlockFinished, BlockStarted, Event
from optprune.texts import draw_records, read_records
from tests.helpers.image_records import FAMILIES, save_with_processor, write_records
from tests.helpers.tiny_vision import stock

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")
by_family = pytest.mark.parametrize("family", FAMILIES)


def words_of(family: str, folder: Path, **changed: Any) -> dict[str, Any]:
    """The arguments of a run on six records."""
    model, file = save_with_processor(family, folder / "model"), write_records(folder / "data", **changed)
    words = {"model": str(model), "calibration": f"images:{file}", "samples": 6, "recipe": "structured_best"}
    return words | {"sparsity": 0.2, "output": folder / "out"}


def answer(folder: Path, processor: Any, record: Any) -> tuple[Tensor, list[int]]:
    """The logits for a record, and the tokens that follow."""
    inputs, model = record.inputs(processor), stock(folder)
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return logits, ids[0].tolist()


@by_family
def test_a_run_on_records_ends_in_a_folder_that_answers_an_image(family: str, tmp_path: Path) -> None:
    words = words_of(family, tmp_path) | {"recipe": "structured_uniform_best"}
    report = optprune.prune_model(**words)
    source, out = Path(words["model"]), words["output"]
    assert report is not None and report.sparsity_reached > 0.1
    records, processor = read_records(tmp_path / "data" / "records.jsonl"), AutoProcessor.from_pretrained(out)
    drawn = draw_records(source, records, 6, 0)
    assert report.calibration == f"{words['calibration']}, {drawn.description}"
    assert 0 < report.tokens <= sum(drawn.lengths)
    before, after = (load_file(folder / WEIGHTS) for folder in (source, out))
    assert all(language_name(name) or torch.equal(after[name], data) for name, data in before.items())
    dense, smaller = (answer(folder, processor, records[0]) for folder in (source, out))
    assert dense[0].shape == smaller[0].shape and len(smaller[1]) == len(dense[1]) and bool(smaller[0].isfinite().all())
    other = answer(out, processor, replace(records[0], images=records[1].images))
    assert not torch.equal(other[0][:, -1], smaller[0][:, -1])


@by_family
def test_streaming_is_memory_bit_for_bit(family: str, tmp_path: Path) -> None:
    words = words_of(family, tmp_path)
    drawn = draw_records(words["model"], read_records(tmp_path / "data" / "records.jsonl"), 6, 0)
    found = []
    for number, read in enumerate((load_model, open_model)):
        loaded, data = read(words["model"]), drawn.read(dtype=torch.float32, device=CPU)
        recipe = load_recipe("structured_best", {"sparsity": 0.2, "refit.held_out": 0.3})
        report = optprune.prune(loaded.model, data.batches, recipe, store=loaded.store, images=data.images)
        save_model(loaded, tmp_path / f"out{number}", report=report, check_tokens=data.first[None])
        found.append((tmp_path / f"out{number}" / WEIGHTS).read_bytes())
    assert found[0] == found[1]


def test_shared_statistics_of_records_give_the_same_weights(tmp_path: Path) -> None:
    words = words_of("llava", tmp_path)
    drawn = draw_records(words["model"], read_records(tmp_path / "data" / "records.jsonl"), 6, 0)
    data, recipe = drawn.read(dtype=torch.float32, device=CPU), load_recipe("structured_best", {"sparsity": 0.2})
    models = [load_model(words["model"]).model for _ in range(3)]
    statistics = optprune.collect(models[0], data.batches, recipes=[recipe], images=data.images)
    optprune.prune(models[1], data.batches, recipe, images=data.images, statistics=statistics)
    optprune.prune(models[2], data.batches, recipe, images=data.images)
    for one, other in zip(models[1].parameters(), models[2].parameters(), strict=True):
        assert torch.equal(one, other)
    images = type(data.images)(-data.images.rows, data.images.vocabulary)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="where the calibration images was"):
        optprune.prune(models[0], data.batches, recipe, images=images, statistics=statistics)
    with pytest.raises(InputError, match="embeddings for 0 to 519 only"):
        optprune.prune(models[0], data.batches, recipe)


def test_a_stopped_run_on_records_is_continued(tmp_path: Path) -> None:
    words = words_of("llava", tmp_path)
    optprune.prune_model(**words)
    whole = (words["output"] / WEIGHTS).read_bytes()

    def stop(event: Event) -> None:
        if isinstance(event, BlockStarted) and event.block == 1:
            raise RuntimeError("stopped")

    again = words | {"output": tmp_path / "again"}
    with pytest.raises(RuntimeError, match="stopped"):
        optprune.prune_model(**again, on_event=stop)
    # Other pixels are another calibration, though the tokens are the same.
    image = tmp_path / "data" / "0.png"
    before = image.read_bytes()
    image.write_bytes((tmp_path / "data" / "1.png").read_bytes())
    with pytest.raises(InputError, match="the calibration images"):
        optprune.prune_model(**again, resume=True)
    image.write_bytes(before)
    events = list[Event]()
    optprune.prune_model(**again, resume=True, on_event=events.append)
    assert (again["output"] / WEIGHTS).read_bytes() == whole
    assert [each.block for each in events if isinstance(each, BlockFinished)] == [1]


@pytest.mark.parametrize(
    ("record", "changed", "sentence"),
    [
        ({"images": ["absent.png"]}, {}, "the image 'absent.png' in line 2 of"),
        ({"pictures": []}, {}, "has the key 'pictures'"),
        ({}, {"calibration": "images:nowhere.jsonl"}, "the records nowhere.jsonl cannot be read"),
        ({}, {"samples": 9}, "there are 8 records, fewer than the 9 needed"),
        ({}, {"generated": 4}, "--generated continues a text, and the calibration is one of records"),
        ({}, {"recipe": "depth"}, "the perplexity that chooses sub-blocks to remove is one of windows of text"),
        ({}, {"calibration": "images:a.jsonl=0.5,b.txt=0.5"}, "the records a.jsonl=0.5,b.txt=0.5 cannot be read"),
    ],
)
def test_a_refusal_writes_nothing(
    record: dict[str, Any], changed: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    words = words_of("llava", tmp_path, **record) | changed
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=sentence):
        optprune.prune_model(**words)
    assert sorted(tmp_path.iterdir()) == before


def test_commands_that_read_text_alone_refuse_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of("llava", tmp_path)
    model, records, out = words["model"], words["calibration"], str(tmp_path / "out")
    (text := tmp_path / "text.txt").write_text("Some words. " * 400)
    words = ["--calibration", records, "--text", str(text), "--output", out]
    own = {
        "evaluate": ["evaluate", model, "--text", records],
        "heal": ["heal", model, "--teacher", model, "--text", records, "--output", out],
        "compare": ["compare", model, "--recipes", "fasp", "--sparsities", "0.3", *words],
        "quality": ["prune", model, "--to-quality", "1.1", "--samples", "6", *words],
    }
    for name, arguments in own.items():
        assert main(arguments) != 0, name
        assert "records with images" in capsys.readouterr().err.replace("\n", " "), name
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_the_tokens_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of("llava", tmp_path)
    given = ["plan", words["model"], "--calibration", words["calibration"], "--samples", "6", "--sparsity", "0.2"]
    assert main([*given, "--recipe", "structured_best", "--json", str(tmp_path / "plan.json")]) == 0
    drawn = draw_records(words["model"], read_records(tmp_path / "data" / "records.jsonl"), 6, 0)
    phases = {phase["name"]: phase for phase in json.loads((tmp_path / "plan.json").read_text())["phases"]}
    assert phases["tokenising"]["parts"]["token ids"] == 64 * sum(drawn.lengths)
    assert phases["tokenising"]["parts"]["vision part and embeddings"] > 0 < phases["tokenising"]["seconds"]
    assert phases["pruning"]["parts"]["features of images"] >= 6 * 16 * 64 * 4
    capsys.readouterr()
    assert main([*given, "--no-probe"]) == 0


def test_a_processor_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    words = words_of("llava", tmp_path)
    file = Path(words["model"]) / "processor_config.json"
    settings = json.loads(file.read_text())
    del settings["vision_feature_select_strategy"]
    file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"the images that its processor makes \(Image features .* fetch them again"):
        optprune.prune_model(**words)
    assert not words["output"].exists()
