"""Multiple-choice questions from a file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError
from optprune.measure.evaluate import evaluating
from optprune.system.files import read_json_lines
from optprune.system.wording import shown

FORM = '{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'


@dataclass(frozen=True)
class Question:
    """Question, its choices, and the number of the correct choice from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answers:
    """Share of questions that a model answers correctly."""

    accuracy: float
    """the share of correct answers by the likelihood of the choice"""
    accuracy_by_byte: float
    """the share of correct answers by the log-likelihood over the bytes of the choice, fair to long choices"""
    questions: int


def read_questions(file: Path) -> list[Question]:
    """Return the questions of a .jsonl file, one on each line with the keys question, choices and answer (from 0).

    InputError when the file cannot be read or a line is not a question.
    """
    try:
        found = [_question(record, where) for where, record in read_json_lines(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the questions {file} cannot be read: {error}") from error
    if not found:
        raise InputError(f"there is no question in {file}: write one on each line, such as {FORM}")
    return found


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, dict) or not {"question", "choices", "answer"} <= set(record):
        raise InputError(f"{where} is not a question: write one such as {FORM}")
    text, choices, answer = record["question"], record["choices"], record["answer"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"the question in {where} is {shown(text)}, not a text: write one such as {FORM}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise InputError(f"the choices in {where} are {shown(choices)}: give two or more texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(
            f"the answer in {where} is {shown(answer)}: give the number of the right choice, 0 to {len(choices) - 1}"
        )
    return Question(text, tuple(choices), answer)


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    on_question: Callable[[int, int], None] | None = None,
) -> Answers:
    """Return the accuracy of a model, which answers with the most likely choice after a space, as in lm-eval.

    `on_question(done, n)` is called after each question. InputError when a question with a choice has more tokens than
    the model has positions.
    """
    right, right_by_byte = 0, 0
    with evaluating(model):
        for done, question in enumerate(questions, start=1):
            scores = [_likelihood(model, tokenizer, question.question, choice) for choice in question.choices]
            by_byte = [score / len(one.encode()) for score, one in zip(scores, question.choices, strict=True)]
            right += scores.index(max(scores)) == question.answer
            right_by_byte += by_byte.index(max(by_byte)) == question.answer
            if on_question is not None:
                on_question(done, len(questions))
    return Answers(right / len(questions), right_by_byte / len(questions), len(questions))


def _likelihood(model: PreTrainedModel, tokenizer: Tokenizer, question: str, choice: str) -> float:
    """Return the log-likelihood of a choice after its question."""
    whole = tokenizer(f"{question.rstrip()} {choice.strip()}", return_tensors="pt")["input_ids"]
    # The choice begins at the first token that differs from the question alone: a token may cross the border.
    alone = tokenizer(question.rstrip())["input_ids"]
    pairs = zip(whole[0].tolist(), alone, strict=False)
    shared = next((at for at, (one, other) in enumerate(pairs) if one != other), len(alone))
    shared = min(max(shared, 1), whole.shape[1] - 1)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and whole.shape[1] > limit:
        raise InputError(
            f"a question has {whole.shape[1]} tokens with a choice, more than the {limit} positions of the model "
            f"({shown(json.dumps(question[:40]))}...): shorten it"
        )
    ids = whole.to(model.device)
    scores = model(input_ids=ids, use_cache=False).logits[0, shared - 1 : -1].float().log_softmax(-1)
    return float(scores.gather(1, ids[0, shared:, None]).sum(dtype=torch.float64))
