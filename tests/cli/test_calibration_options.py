"""Calibration and evaluation from the shell: chat data, several texts with shares, whole documents."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from optprune.cli import main
from optprune.errors import InputError
from optprune.models import load_tokenizer
from optprune.texts import demo_articles, read_documents, tokenise
from tests.helpers.attempts import Attempt
from tests.helpers.numbers_tokenizer import TEMPLATE


@pytest.fixture
def chats(attempt: Attempt) -> Path:
    """Conversations of two messages."""
    file = attempt.folder / "chats.jsonl"
    articles = demo_articles("calibration")[10:30]
    records = [
        {"messages": [{"role": "user", "content": article[:60]}, {"role": "assistant", "content": article[60:600]}]}
        for article in articles
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.fixture
def template(attempt: Attempt):
    """The model's folder has a chat template meanwhile."""
    file = attempt.model / "chat_template.jinja"
    file.write_text(TEMPLATE)
    yield
    file.unlink()


@pytest.mark.usefixtures("template")
def test_chats_and_speeches_with_shares_each_from_its_start(attempt: Attempt, chats: Path) -> None:
    text = f"{chats}:messages=0.7,demo:speeches=0.3"
    assert main(attempt.command("--recipe", "magnitude", "--sequences", "whole", calibration=text)) == 0
    report = json.loads((attempt.output / "report.json").read_text())
    assert report["calibration"] == (
        f"{chats}:messages (share 0.7, 6 windows); demo:speeches (share 0.3, 2 windows); "
        "8 windows of 64 tokens, each from the start of a document, seed 0"
    )
    assert report["tokens"] == 8 * 64
    assert "chats.jsonl" not in (attempt.output / "README.md").read_text()


@pytest.mark.usefixtures("template")
def test_evaluation_on_chats(attempt: Attempt, chats: Path) -> None:
    assert main(["evaluate", str(attempt.model), "--text", str(chats), "--seq-length", "64", "--windows", "3"]) == 0
    assert attempt.capsys.readouterr().out.startswith("perplexity ")


@pytest.mark.usefixtures("template")
def test_a_plan_measures_the_tokens_of_all_texts(
    attempt: Attempt, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stop(work, model, measuring, *_):
        asked.append(measuring)
        raise InputError("that is enough")

    monkeypatch.setattr(import_module("optprune.pruning.measured_plan"), "timed", stop)
    words = ["--samples", "8", "--seq-length", "64", "--calibration", f"{chats}=0.5,{attempt.text}=0.5"]
    assert main(["plan", str(attempt.model), *words]) == 2
    tokenizer = load_tokenizer(attempt.model)
    assert tokenizer is not None
    both = [tokenise(tokenizer, read_documents(str(text))) for text in (chats, attempt.text)]
    assert torch.equal(asked[0].tokens, torch.cat(both))
    assert asked[0].tokenising > 0


def test_chats_without_a_template(attempt: Attempt, chats: Path) -> None:
    sentence = attempt.fails(attempt.command(calibration=chats))
    assert "the tokenizer has no chat template" in sentence and "put a chat_template.jinja into" in sentence


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("calibration", "more", "reason"),
    [
        ("TEXT=0.7,TEXT=0.3", (), "is given twice"),
        ("TEXT=0.7,demo:speeches=0.2", (), "with the sum 0.9"),
        ("TEXT=0.7,demo:speeches", (), "'demo:speeches' of the calibration has no share"),
        ("TEXT=0.7,no.txt=0.3", (), "there is no text 'no.txt'"),
        ("TEXT=0.99,demo:speeches=0.01", (), "the share of the text demo:speeches is less than one of 8 windows"),
        ("TEXT", ("--sequences", "padded"), "--sequences cannot be 'padded'"),
        (
            "TEXT",
            ("--sequences", "whole"),
            "has 1 document, 1 of them with the 64 tokens of a window, fewer than the 8",
        ),
    ],
)
def test_what_cannot_be_drawn(attempt: Attempt, calibration: str, more: tuple[str, ...], reason: str) -> None:
    text = calibration.replace("TEXT", str(attempt.text))
    assert reason in attempt.fails(attempt.command(*more, calibration=text))
