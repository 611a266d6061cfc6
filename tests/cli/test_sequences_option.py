"""--sequences: the commands read windows that begin with BOS where the tokenizer begins a text so, or without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optprune import compare, texts
from optprune.cli import main
from optprune.cli.evaluation import prompts_of
from optprune.comparison.frontier_session import FrontierSession, Wanted
from optprune.errors import InputError
from optprune.measure import bits_per_byte, perplexity
from optprune.models import load_model
from optprune.texts import demo_articles, evaluation_windows, read_documents, tokenise
from tests.helpers.begun_tokenizer import begun_tokenizer
from tests.helpers.tiny_models import tiny_llama

SIZES = ("--seq-length", "48", "--windows", "3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose tokenizer begins a text with BOS, and two texts."""
    folder = tmp_path_factory.mktemp("begun")
    tiny_llama(seed=4).save_pretrained(folder / "model")
    begun_tokenizer().save_pretrained(folder / "model")
    for name, part in (("fitted", "calibration"), ("held", "evaluation")):
        (folder / f"{name}.txt").write_text("\n\n".join(demo_articles(part)[:6]))
    return folder


def windows_of(place: Path, *, begun: bool) -> torch.Tensor:
    tokens = tokenise(begun_tokenizer(), read_documents(str(place / "held.txt")))
    return evaluation_windows(tokens, 48, 3, [begun_tokenizer().bos_token_id] if begun else [])


@pytest.mark.parametrize(("sequences", "begun"), [("packed", True), ("packed-no-bos", False)])
def test_an_evaluation(place: Path, sequences: str, begun: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, words = tmp_path / "a.json", () if sequences == "packed" else ("--sequences", sequences)
    text = ("--text", str(place / "held.txt"), *SIZES, "--generations", "5")
    assert main(["evaluate", str(place / "model"), *text, *words, "--json", str(file)]) == 0
    found, windows, model = json.loads(file.read_text()), windows_of(place, begun=begun), load_model(place / "model")
    expected = perplexity(model.model, windows)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert found["begin"] == ("<s>" if begun else "")
    assert ("3 windows of 48, each begun with <s>)" in capsys.readouterr().out) == begun
    # The same text has the same bytes: BOS is no part of it.
    own = windows[:, 1:] if begun else windows
    size = len(begun_tokenizer().decode(own.flatten(), clean_up_tokenization_spaces=False).encode())
    bits = torch.tensor(expected.perplexity).log2() * own.numel() / size
    assert found["bits_per_byte"] == pytest.approx(float(bits), rel=1e-5)
    assert all("<s>" not in row["prompt"] for row in found["generations"])


def test_two_kinds_of_windows_have_different_perplexities(place: Path) -> None:
    model = load_model(place / "model").model
    first, second = (perplexity(model, windows_of(place, begun=begun)).perplexity for begun in (True, False))
    assert abs(first / second - 1) > 1e-4


def test_whole_windows_cannot_be_evaluated(place: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("--text", str(place / "held.txt"), "--sequences", "whole")
    assert main(["evaluate", str(place / "model"), *words]) == 2
    assert "--sequences cannot be 'whole': use packed or packed-no-bos" in capsys.readouterr().err


def test_each_prompt_begins_with_bos_and_has_none_elsewhere() -> None:
    windows = torch.cat([torch.full((2, 1), 9), 100 + torch.arange(200).view(2, 100)], dim=1)
    for count, places in ((2, (100, 200)), (5, (100, 140, 180, 220, 260))):
        prompts = list(prompts_of(windows, count, 1))
        assert [prompt.tolist() for prompt in prompts] == [[9, *range(at, at + 32)] for at in places]


@pytest.mark.parametrize("sequences", ["packed", "packed-no-bos", "whole"])
def test_a_comparison_is_evaluated_as_it_is_calibrated(place: Path, sequences: str) -> None:
    """On windows with BOS, unless it is left out."""
    sizes = {"samples": 1, "seq_length": 48, "windows": 3, "sequences": sequences}
    given = {"calibration": str(place / "fitted.txt"), "text": str(place / "held.txt")}
    found = compare(str(place / "model"), recipes=["magnitude"], sparsities=[0.5], **given, **sizes)  # type: ignore[arg-type]
    windows = windows_of(place, begun=sequences != "packed-no-bos")
    assert found.dense.perplexity == pytest.approx(perplexity(load_model(place / "model").model, windows).perplexity)


def test_the_report_says_how_calibration_windows_begin(place: Path, tmp_path: Path) -> None:
    sizes = ("--samples", "4", "--seq-length", "48")
    words = ("--calibration", str(place / "fitted.txt"), "--recipe", "magnitude", "--sparsity", "0.5")
    for name, more in (("begun", ()), ("bare", ("--sequences", "packed-no-bos"))):
        assert main(["prune", str(place / "model"), *words, *sizes, *more, "--output", str(tmp_path / name)]) == 0
        told = json.loads((tmp_path / name / "report.json").read_text())["calibration"]
        assert ("each begun with <s>" in told) == (name == "begun")


def test_healing_learns_from_such_windows(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, honest = list[torch.Tensor](), texts.split_held_out

    def watched(*given: Any, **named: Any) -> texts.TrainingText:
        found = honest(*given, **named)
        seen.extend((*found.batches, found.held_out))
        raise InputError("that is enough")

    monkeypatch.setattr(texts, "split_held_out", watched)
    words = ("--text", str(place / "fitted.txt"), "--teacher", str(place / "model"), "--seq-length", "48")
    assert main(["heal", str(place / "model"), *words, "--held-out", "2", "--output", str(tmp_path / "healed")]) == 2
    assert (torch.cat(seen)[:, 0] == begun_tokenizer().bos_token_id).all()


def test_prompts_of_a_frontier_begin_with_bos_once(place: Path) -> None:
    """They are texts, which each model's own tokenizer begins."""
    wanted, windows = Wanted(runtime="transformers"), windows_of(place, begun=True)
    session = FrontierSession(None, {"dense": place / "model"}, wanted, windows, None, None, 2, print)  # type: ignore[arg-type]
    bos, tokenizer = begun_tokenizer().bos_token_id, begun_tokenizer()
    assert [text.count("<s>") for text in (*session.prompts, *session.chunks)] == [0] * 5
    assert session.chunks == [tokenizer.decode(window[1:]) for window in windows]
    assert [(ids[0], int((ids == bos).sum())) for ids in session.prompt_ids("dense")] == [(bos, 1)] * 2


def test_bits_per_byte_do_not_count_bos(place: Path) -> None:
    model, tokenizer = load_model(place / "model").model, begun_tokenizer()
    # transformers may replace the functions of torch.nn.init by some that leave loaded weights as they are.
    model.lm_head.weight.data.zero_()
    windows = windows_of(place, begun=True)
    text = tokenizer.decode(windows[:, 1:].flatten(), clean_up_tokenization_spaces=False)
    found = bits_per_byte(perplexity(model, windows), windows, tokenizer)
    assert found == pytest.approx(9 * windows[:, 1:].numel() / len(text.encode()), rel=1e-6)
