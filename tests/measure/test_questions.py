"""Multiple-choice questions: accepted files, and the likelihoods that decide."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from optprune.errors import InputError
from optprune.measure import Question, answer_questions, read_questions
from optprune.measure.questions import _likelihood
from tests.helpers.tiny_models import tiny_llama, tiny_tokenizer

GOOD = {"question": "The colour of the sky is", "choices": ["blue", "a loud green"], "answer": 0}


def written(folder: Path, *records: object) -> Path:
    file = folder / "questions.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    file.write_text("".join([*lines, "\n"]), encoding="utf-8")
    return file


def test_a_file_is_read(tmp_path: Path) -> None:
    separated = GOOD | {"question": "A line\u2028and\x85more is"}
    assert read_questions(written(tmp_path, GOOD, separated)) == [
        Question("The colour of the sky is", ("blue", "a loud green"), 0),
        Question("A line\u2028and\x85more is", ("blue", "a loud green"), 0),
    ]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ([1], "line 2 of .* is not a question"),
        ({"question": "Why?", "choices": ["a", "b"]}, "line 2 of .* is not a question"),
        (GOOD | {"question": " "}, "the question in line 2 of .* is ' ', not a text"),
        (GOOD | {"choices": ["only"]}, "give two or more texts"),
        (GOOD | {"choices": ["one", ""]}, "give two or more texts"),
        (GOOD | {"answer": 2}, "give the number of the right choice, 0 to 1"),
        (GOOD | {"answer": True}, "give the number of the right choice, 0 to 1"),
    ],
)
def test_what_is_no_question(tmp_path: Path, record: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_questions(written(tmp_path, GOOD, record))


def test_a_file_without_questions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no question in"):
        read_questions(written(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(tmp_path / "missing.jsonl")


def test_the_likelihood_of_the_choice_decides() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    texts = ["The minister said", "They won the"]
    choices = (" on Monday that", " game", " a long and winding road to the north")
    asked, expected = [], [0, 0]
    for text in texts:
        likelihoods = []
        for choice in choices:
            # The same by cross entropy over the tokens behind those of the question; here no token crosses the border.
            before, ids = len(tokenizer(text)["input_ids"]), torch.tensor([tokenizer(text + choice)["input_ids"]])
            assert ids[0, :before].tolist() == tokenizer(text)["input_ids"]
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, before - 1 : -1].double()
            loss = torch.nn.functional.cross_entropy(scores, ids[0, before:], reduction="sum")
            likelihoods.append(-float(loss))
        by_byte = [one / len(choice.strip()) for one, choice in zip(likelihoods, choices, strict=True)]
        asked.append(Question(text, tuple(choice.strip() for choice in choices), likelihoods.index(max(likelihoods))))
        expected[0] += 1
        expected[1] += by_byte.index(max(by_byte)) == asked[-1].answer
    steps: list[tuple[int, int]] = []
    found = answer_questions(model, tokenizer, asked, on_question=lambda *step: steps.append(step))
    assert (found.accuracy, found.accuracy_by_byte) == (expected[0] / 2, expected[1] / 2)
    assert (found.questions, steps) == (2, [(1, 2), (2, 2)])
    wrong = [Question(one.question, one.choices, (one.answer + 1) % 3) for one in asked]
    assert answer_questions(model, tokenizer, wrong).accuracy == 0.0


def test_a_question_longer_than_the_model_can_read() -> None:
    with pytest.raises(InputError, match="more than the 16 positions of the model"):
        answer_questions(
            tiny_llama(max_position_embeddings=16), tiny_tokenizer(), [Question("a b c d e f g h " * 9, ("x", "y"), 0)]
        )


class Merging:
    """A tokenizer by letters that merges a full stop with the space behind it, as word pieces may."""

    def __call__(self, text: str, return_tensors: str | None = None) -> dict[str, Any]:
        ids = [400 if part == ". " else ord(part) for part in re.findall(r"\. |.", text)]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


def test_a_token_across_the_border_of_question_and_choice_belongs_to_the_choice() -> None:
    model = tiny_llama()
    ids = [*map(ord, "Yes"), 400, *map(ord, "ab")]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found = _likelihood(model, Merging(), "Yes.", "ab")  # type: ignore[arg-type]
    # The full stop with its space, then the letters of the choice: three tokens behind those of "Yes".
    expected = sum(float(scores[place - 1, ids[place]]) for place in (3, 4, 5))
    assert found == pytest.approx(expected, rel=1e-5)
