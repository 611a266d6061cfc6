"""The tokens of a smaller vocabulary are chosen once: a run that goes on reads them in its folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optprune import tokens
from optprune.cli import main
from optprune.cli.run_folder import run_folder_of
from optprune.pruning import Journal
from optprune.pruning.run import Run
from optprune.tokens import VocabularyPruning
from tests.helpers.attempts import Attempt, snapshot
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.torture.moments import INTERRUPT, moments

KEPT = 400
FILE = "tokens.json"


def words(keep: int = KEPT, predictions: int = 2048) -> list[str]:
    settings = [f"vocabulary.predictions={predictions}", "vocabulary.tokens=1024"]
    chosen = [word for setting in settings for word in ("--set", setting)]
    return ["--recipe", "fasp", "--units", "mlp", "--vocabulary", str(keep), *chosen]


WORDS = words()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The windows behind which predictions are read, each time."""
    found, honest = list[Tensor](), tokens.expected_counts

    def counted(loaded, windows: Tensor, *more):
        found.append(windows)
        return honest(loaded, windows, *more)

    monkeypatch.setattr(tokens, "expected_counts", counted)
    return found


@pytest.fixture
def stopped(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], Path]:
    """Begin a run and interrupt it before a method is called; its folder."""

    def begun(of: type, method: str) -> Path:
        def stop(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(of, method, stop)
            assert main(attempt.command(*WORDS)) == 130
        return attempt.output.with_name("out.run")

    return begun


def weights(attempt: Attempt) -> dict[str, bytes]:
    return {name: (attempt.output / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")}


@pytest.mark.parametrize(
    ("of", "method", "progress"),
    [
        (VocabularyPruning, "apply", "the tokens of the smaller vocabulary are chosen, and kept in"),
        (Run, "prune_block", "the budget is divided, and kept in"),
    ],
)
def test_a_run_that_goes_on_reads_its_tokens(
    of: type, method: str, progress: str, attempt: Attempt, read: list[Tensor], stopped
) -> None:
    run = stopped(of, method)
    assert progress in attempt.capsys.readouterr().err
    kept = json.loads((run / FILE).read_text())["kept"]
    assert len(set(kept)) == KEPT
    assert main(attempt.command(*WORDS, "--resume")) == 0
    assert len(read) == 1
    first = weights(attempt)
    assert main(attempt.command(*WORDS, "--overwrite")) == 0
    assert len(read) == 2 and torch.equal(*read)
    assert weights(attempt) == first


@pytest.mark.e2e
def test_a_run_that_is_stopped_at_any_moment_ends_with_the_same_bytes(attempt: Attempt, read: list[Tensor]) -> None:
    with moments(None) as seen:
        assert main(attempt.command(*WORDS)) == 0
    first, chosen = weights(attempt), seen.index(f"before os.rename {FILE}")
    solved = next(n for n, name in enumerate(seen) if name == "after solve")
    for at in (chosen - 12, chosen - 3, chosen, chosen + 1, chosen + 3, solved, len(seen) - 24):
        shutil.rmtree(attempt.output.parent)  # so that the moments have the numbers of the first time
        with moments(at, INTERRUPT):
            assert main(attempt.command(*WORDS)) == 130, seen[at]
        read.clear()
        assert main(attempt.command(*WORDS, "--resume")) == 0, seen[at]
        assert weights(attempt) == first, seen[at]
        assert len(read) == (at <= chosen), seen[at]


def test_tokens_in_a_folder_without_facts_are_not_used(attempt: Attempt, read: list[Tensor]) -> None:
    """A run that was killed leaves them, and the next command may be another one."""
    run = Journal(run_folder_of(attempt.output))
    run.write(FILE, {"kept": list(range(KEPT)), "windows": None})
    run.release()
    assert main(attempt.command(*WORDS)) == 0
    assert len(read) == 1
    assert json.loads((attempt.output / "report.json").read_text())["vocabulary"]["tokens"] == 1024


def test_a_folder_without_facts_is_not_kept(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("optprune.cli.prune_run.calibration_of", stop)
    assert main(attempt.command(*WORDS)) == 130
    assert "and kept in" not in attempt.capsys.readouterr().err
    assert not attempt.output.parent.exists()


def test_a_restart_that_is_refused_keeps_the_run_and_its_tokens(attempt: Attempt, stopped, monkeypatch) -> None:
    run, text, chosen = stopped(Run, "prune_block"), attempt.folder / "short.txt", list[VocabularyPruning]()
    text.write_text("few tokens for windows of 64")
    before, planned = snapshot(run), VocabularyPruning.planned

    def noted(*arguments, **more):
        chosen.append(planned(*arguments, **more))
        return chosen[-1]

    monkeypatch.setattr(VocabularyPruning, "planned", noted)
    attempt.capsys.readouterr()
    settings = ["--set", "vocabulary.predictions=0", "--set", "vocabulary.tokens=0"]
    other = attempt.command(*WORDS[:6], *settings, "--restart", calibration=text)
    assert main(other) == 2
    assert "tokens" in attempt.capsys.readouterr().err
    assert snapshot(run) == before and len(chosen) == 1
    assert main(attempt.command(*WORDS, "--resume")) == 0
    assert len(chosen) == 1


def other_text(attempt: Attempt) -> Attempt:
    text = attempt.folder / "other.txt"
    text.write_text(attempt.text.read_text(encoding="utf-8") + "\n\nOne more.", encoding="utf-8")
    return replace(attempt, text=text)


def other_weights(attempt: Attempt) -> Attempt:
    return replace(attempt, model=save_tiny(tiny_llama(seed=1), attempt.folder / "other"))


def other_tokenizer(attempt: Attempt) -> Attempt:
    model = shutil.copytree(attempt.model, attempt.folder / "other")
    data = json.loads((model / "tokenizer.json").read_text())
    data["model"]["merges"][-2:] = reversed(data["model"]["merges"][-2:])
    (model / "tokenizer.json").write_text(json.dumps(data))
    return replace(attempt, model=model)


@pytest.mark.parametrize(
    ("other", "given", "reason"),
    [
        (replace, words(keep=390), "the recipe.vocabulary.keep was 400.0 and is 390.0"),
        (replace, words(predictions=1024), "the recipe.vocabulary.predictions was 2048 and is 1024"),
        (other_text, WORDS, "the text of the vocabulary was another one"),
        (other_tokenizer, WORDS, "the tokenizer was another one"),
        (other_weights, WORDS, "the model was another one"),
    ],
)
def test_another_choice_does_not_go_on(
    other: Callable[[Attempt], Attempt], given: list[str], reason: str, attempt: Attempt, read: list[Tensor], stopped
) -> None:
    run, changed = stopped(Run, "prune_block"), other(attempt)
    before = snapshot(run)
    attempt.capsys.readouterr()
    assert main(changed.command(*given, "--resume")) == 2
    assert reason in attempt.capsys.readouterr().err
    assert snapshot(run) == before and len(read) == 1, "nothing was changed or chosen again"
    assert main(attempt.command(*WORDS, "--resume")) == 0


def test_a_finished_output_is_of_one_text(attempt: Attempt) -> None:
    assert main(attempt.command(*WORDS)) == 0
    assert main(attempt.command(*WORDS, "--resume")) == 0
    assert "was already finished by this command" in attempt.capsys.readouterr().out
    changed = other_text(attempt)
    sentence = changed.fails(changed.command(*WORDS, "--resume"))
    assert "was finished by another command: the text of the vocabulary was" in sentence
