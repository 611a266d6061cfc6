"""`optprune.prune_model` on a model in memory, and on texts and token batches that the caller holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import optprune
from optprune.errors import InputError
from tests.helpers.attempts import Attempt
from tests.helpers.short_runs import batches, same
from tests.helpers.tiny_models import tiny_llama

SIZE: dict[str, Any] = {"samples": 8, "seq_length": 64}


def opened(attempt: Attempt) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(attempt.model), AutoTokenizer.from_pretrained(attempt.model)


def test_a_model_with_its_tokenizer_gives_the_folder_that_its_folder_gives(attempt: Attempt) -> None:
    model, tokenizer = opened(attempt)
    theirs, ours = attempt.folder / "theirs", attempt.folder / "ours"
    texts = [attempt.text.read_text()]
    optprune.prune_model(attempt.model, "osscar", sparsity=0.25, calibration=texts, output=theirs, **SIZE)
    report = optprune.prune_model(
        model, "osscar", tokenizer=tokenizer, sparsity=0.25, calibration=texts, output=ours, **SIZE
    )
    for name in ("model.safetensors", "config.json", "tokenizer.json", "recipe.yaml"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert report is not None and report.calibration.startswith("1 text of the caller, 8 windows of 64 tokens")
    assert optprune.load_model(ours).model.num_parameters() == model.num_parameters() < tiny_llama().num_parameters()


@pytest.mark.parametrize("bars", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_saving_prints_nothing_and_leaves_the_progress_bars_as_they_were(
    attempt: Attempt, bars: tuple[bool, bool]
) -> None:
    model, _ = opened(attempt)
    of_transformers, of_hub = bars
    before = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        set_bars(of_transformers, of_hub)
        attempt.capsys.readouterr()
        optprune.prune_model(model, "magnitude", calibration=batches(), output=attempt.output)
        assert attempt.capsys.readouterr() == ("", "")
        assert (logging.is_progress_bar_enabled(), not are_progress_bars_disabled()) == bars
    finally:
        set_bars(*before)


def set_bars(of_transformers: bool, of_hub: bool) -> None:
    logging.enable_progress_bar() if of_transformers else logging.disable_progress_bar()
    enable_progress_bars() if of_hub else disable_progress_bars()


def test_a_text_by_its_name_is_the_same_text(attempt: Attempt) -> None:
    loaded = optprune.load_model(attempt.model)
    model, tokenizer = opened(attempt)
    optprune.prune_model(loaded, "magnitude", calibration=str(attempt.text), **SIZE)
    before = sorted(attempt.folder.iterdir())
    optprune.prune_model(model, "magnitude", tokenizer=tokenizer, calibration=[attempt.text.read_text()], **SIZE)
    assert same(loaded.model, model)
    assert sorted(attempt.folder.iterdir()) == before, "without an output nothing is written"


def as_tensors(ids: list[Tensor]) -> Any:
    return ids


def as_loader(ids: list[Tensor]) -> Any:
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for batch in ids for row in batch]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [as_tensors, as_loader])
def test_token_batches_need_no_tokenizer(form: Callable[[list[Tensor]], Any]) -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    report = optprune.prune_model(ours, "fasp", calibration=form(batches()), sparsity=0.3, units="mlp")
    optprune.prune(theirs, batches(), "fasp", sparsity=0.3, units="mlp")
    assert same(ours, theirs)
    assert report is not None and report.calibration == "8 sequences of the caller, 256 tokens"


def test_a_folder_takes_token_batches_too(attempt: Attempt) -> None:
    model, _ = opened(attempt)
    ids = {
        "input_ids": [[5, 6, 7, 8] * 12, [9, 10, 11] * 8 + [0] * 24],
        "attention_mask": [[1] * 48, [1] * 24 + [0] * 24],
    }
    report = optprune.prune_model(attempt.model, "wanda", sparsity=0.5, calibration=[ids], output=attempt.output)
    optprune.prune(model, [ids], "wanda", sparsity=0.5)
    assert report is not None and report.tokens == 72
    assert same(optprune.load_model(attempt.output).model, model)
    again = optprune.prune_model(
        attempt.model, "wanda", sparsity=0.5, calibration=[ids], output=attempt.output, resume=True
    )
    assert again == report


def test_a_target_decides_the_shapes(attempt: Attempt) -> None:
    loaded = optprune.load_model(attempt.model)
    report = optprune.prune_model(
        loaded, "structured_best", units="mlp", target="transformers", calibration=batches(), output=attempt.output
    )
    assert report is not None and report.recipe["allocation"]["kind"] == "uniform"
    assert AutoModelForCausalLM.from_pretrained(attempt.output).num_parameters() == loaded.model.num_parameters()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": nn.Linear(4, 4)}, "the model cannot be of type Linear: give a folder, a name, or a model of"),
        ({"model": 7}, "the model cannot be 7: give a folder"),
        ({"calibration": ["some text"]}, "texts are read by the model's tokenizer: give it as `tokenizer`"),
        ({"calibration": 7}, "the calibration cannot be of type int: name a text, or give a list of texts"),
        ({"calibration": [{"text": "some text"}]}, r"batch 0 has no input_ids \(it has text\)"),
        ({"calibration": []}, "there are no calibration batches"),
        ({"calibration": "some text"}, "there is no text 'some text'"),
        ({"calibration": "images:records.jsonl"}, "records with images are read by the model's own folder"),
        ({"tokenizer": "demo"}, "the tokenizer cannot be 'demo': give the tokenizer itself"),
        ({"device": "cpu"}, "device cannot be 'cpu' for a model in memory"),
        ({"resume": True}, "resume cannot be True for a model in memory"),
        ({"generated": 2}, "generated windows need the dense model's own folder"),
        ({"save_dtype": "int3"}, "int3"),
        ({"recipe": "fsap"}, "fsap"),
        ({"sparsty": 0.2}, r"a recipe has no field 'sparsty' \(did you mean sparsity\?\)"),
        ({"recipe": "vocabulary"}, "a smaller vocabulary needs the text"),
        ({"calibration": [torch.full((2, 8), 512)]}, "batch 0 holds the token 512"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value)[:40],
)
def test_a_refusal_changes_nothing(changed: dict, sentence: str, tmp_path: Path) -> None:
    model = tiny_llama()
    words = {"model": model, "calibration": batches(), "output": tmp_path / "out"} | changed
    with pytest.raises(InputError, match=sentence) as caught:
        optprune.prune_model(**words)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert same(model, tiny_llama())


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"output": None}, "is written to a folder: name it by output, or give a model in memory"),
        ({"tokenizer": object()}, "brings its tokenizer: leave it out"),
        ({"calibration": batches(), "recipe": "vocabulary"}, "a smaller vocabulary is chosen by a text"),
        ({"calibration": batches(), "generated": 2}, "generated windows continue a text, and the calibration is token"),
        ({"calibration": [torch.full((2, 8), 10**6)]}, "batch 0 holds the token 1000000"),
        ({"units": "mpl"}, "mlp"),
        ({"fields": {"units": "mlp"}, "units": "vo"}, "the recipe field 'units' is given twice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value)[:40],
)
def test_a_folder_that_is_refused_leaves_nothing(attempt: Attempt, changed: dict, sentence: str) -> None:
    before = sorted(attempt.folder.iterdir())
    words = {"model": attempt.model, "calibration": str(attempt.text), "output": attempt.output, **SIZE} | changed
    with pytest.raises(InputError, match=sentence):
        optprune.prune_model(**words)
    assert sorted(attempt.folder.iterdir()) == before


def test_an_existing_output_is_refused_before_the_model_changes(attempt: Attempt) -> None:
    model = tiny_llama()
    attempt.output.mkdir(parents=True)
    with pytest.raises(InputError, match="exists"):
        optprune.prune_model(model, calibration=batches(), output=attempt.output)
    assert same(model, tiny_llama())


def test_the_folder_that_a_model_came_from_is_not_written_over(attempt: Attempt) -> None:
    model, tokenizer = opened(attempt)
    before = (attempt.model / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="would replace the model that is read"):
        optprune.prune_model(
            model, tokenizer=tokenizer, calibration=batches(), output=attempt.model, overwrite=True, sparsity=0.3
        )
    assert (attempt.model / "model.safetensors").read_bytes() == before
