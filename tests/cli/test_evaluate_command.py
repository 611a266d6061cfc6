"""optprune evaluate beside the dense model: divergence, questions, continuations."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from optprune.cli import main
from optprune.measure import divergence_from, generate, perplexity
from optprune.models import load_model
from optprune.texts import evaluation_windows, read_documents, tokenise
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import save_tiny, tiny_llama

QUESTIONS = [
    {"question": "The minister said", "choices": ["on Monday", "blue"], "answer": 0},
    {"question": "They won", "choices": ["the", "a game of cards"], "answer": 1},
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_llama(seed=3), tmp_path_factory.mktemp("dense") / "model")


def test_beside_the_dense_model(attempt: Attempt, dense: Path) -> None:
    questions, record = attempt.folder / "questions.jsonl", attempt.folder / "record.json"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    more = ("--against", str(dense), "--questions", str(questions), "--generations", "2", "--json", str(record))
    assert main(attempt.evaluate(*more)) == 0
    told = attempt.capsys.readouterr().out
    result = json.loads(record.read_text())
    model, other = load_model(attempt.model), load_model(dense)
    windows = evaluation_windows(tokenise(model.tokenizer, read_documents(str(attempt.text))), 64, 2)  # type: ignore[arg-type]
    expected = divergence_from(model.model, other.model, windows)
    assert result["divergence"] == pytest.approx(expected.divergence, rel=1e-5)
    assert result["perplexity"] == pytest.approx(perplexity(model.model, windows).perplexity, rel=1e-5)
    assert (result["tokens"], result["windows"]) == (2 * 63, 2)
    assert result["agreement"] == expected.agreement
    assert result["dense_perplexity"] == pytest.approx(expected.dense_perplexity, rel=1e-5)
    assert len(result["along"]) == 8
    assert result["against"] == str(dense)
    assert result["questions"]["questions"] == result["dense_questions"]["questions"] == 2
    for key, one in (("text", model), ("dense_text", other)):
        texts = generate(one.model, one.tokenizer, [window[:32] for window in windows])  # type: ignore[arg-type]
        assert [row[key] for row in result["generations"]] == texts
    known = expected.standard_errors
    assert known is not None
    assert f"divergence {expected.divergence:.4f} ± {known.divergence:.4f} nats" in told
    assert f"first choice the same in {expected.agreement:.1%} ± {known.agreement:.1%}" in told
    assert result["standard_errors"] == pytest.approx(asdict(known), rel=1e-4)
    ratio = math.log(expected.dense_perplexity) / math.log(expected.perplexity)
    assert result["dense_bits_per_byte"] == pytest.approx(ratio * result["bits_per_byte"], rel=1e-5)
    assert "of 2 questions right" in told
    assert told.count("dense_text: ") == 2


def test_a_model_beside_itself(attempt: Attempt) -> None:
    assert main(attempt.evaluate("--against", str(attempt.model))) == 0
    told = attempt.capsys.readouterr().out
    assert "(+0.0% ± 0.0%); divergence 0.0000 ± 0.0000 nats, first choice the same in 100.0% ± 0.0%" in told


def test_models_with_other_tokens_are_refused(attempt: Attempt, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = save_tiny(tiny_llama(vocab_size=600), tmp_path_factory.mktemp("other") / "model")
    sentence = attempt.fails(attempt.evaluate("--against", str(other)))
    assert "have different tokens, so their predictions cannot be compared" in sentence


def test_bad_options(attempt: Attempt) -> None:
    assert "--generations cannot be -1" in attempt.fails(attempt.evaluate("--generations", "-1"))
    assert "cannot be read" in attempt.fails(attempt.evaluate("--questions", str(attempt.folder / "none.jsonl")))
    assert "there is no" in attempt.fails(attempt.evaluate("--against", str(attempt.folder / "missing")))
