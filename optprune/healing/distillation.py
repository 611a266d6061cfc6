"""Distillation: how far a model's predictions are from the dense model's, and the gradient of that.

The loss is the mean over predictions of KL(dense || model) in nats, at temperature 1: the cross entropy with the dense
model's whole distribution, less that distribution's own entropy. Logits are made from the last hidden states, some
positions at a time, and their gradient is taken at once: the logits of a window, which over a large vocabulary are the
largest tensors of all, are never held as a whole, of neither model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.errors import InputError
from optprune.models import scale_logits
from optprune.numerics.kullback_leibler import divergence_terms

POSITIONS_AT_ONCE = 256
"""how many predictions over the whole vocabulary are held at once, of each model"""
ROUNDING = 1e-2
"""how far logits made in parts may be from a model's own, relative to the largest: bfloat16 rounds to 0.004"""

Precision = Callable[[], AbstractContextManager]
"""what gives the context in which models are run, such as torch.autocast"""


@dataclass(frozen=True, eq=False)
class Reader:
    """A model as what gives hidden states, and a head that reads logits from them."""

    model: PreTrainedModel
    precision: Precision

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states [windows, length, hidden] on token ids [windows, length]."""
        with self.precision():
            return self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """The log-probabilities [..., vocabulary] in float32 of the next token at hidden states [..., hidden]."""
        head: Any = self.model.get_output_embeddings()
        with self.precision():
            logits = scale_logits(self.model.config, head(hidden))
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Raise InputError where the model's logits are not what its head makes of its last hidden states."""
        with self.precision():
            expected = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits.float().log_softmax(-1)
        difference = float((self.log_probabilities(self.hidden(ids)) - expected).abs().max())
        if difference > ROUNDING * float(expected.abs().max()):
            raise InputError(
                f"the logits of a {self.model.config.model_type} model are not what its head makes of its last hidden "
                "states, which healing builds on: train it in your own way, with optprune.keep_zeros"
            )


def add_gradient(student: Reader, teacher: Reader, ids: Tensor, predictions: int) -> float:
    """Add to the student's gradients those of windows [n, length] in the mean divergence of so many predictions.

    Returns their part of that mean. Predictions are the length - 1 that have a token following. With several calls a
    step can be of more windows than fit in memory.
    """
    with torch.no_grad():
        expected = _predicting(teacher.hidden(ids))
    hidden = _predicting(student.hidden(ids))
    # The graph below the head is walked once, when the gradient at the hidden states is whole.
    gradients, total = list[Tensor](), 0.0
    for part, dense in zip(_parts(hidden.detach()), _parts(expected), strict=True):
        with torch.no_grad():
            target = teacher.log_probabilities(dense).to(part.device)
        part.requires_grad_()
        loss = divergence(student.log_probabilities(part), target) / predictions
        loss.backward()
        assert part.grad is not None
        gradients.append(part.grad)
        total += float(loss.detach())
    hidden.backward(torch.cat(gradients))
    return total


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The sum over predictions of KL(p || q), of log-probabilities [predictions, vocabulary]."""
    return divergence_terms(log_p, log_q).sum()


@torch.no_grad()
def surprise_and_divergence(student: Reader, teacher: Reader, ids: Tensor, expected: Tensor) -> Tensor:
    """The sums over the predictions of windows [n, length]: both models' surprise and the divergence [3], in float64.

    `expected` [n, length, hidden] are the teacher's hidden states on them.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    hidden, following = _predicting(student.hidden(ids)), ids[:, 1:].flatten()
    for part, dense, tokens in zip(_parts(hidden), _parts(_predicting(expected)), _parts(following), strict=True):
        log_q = student.log_probabilities(part)
        log_p = teacher.log_probabilities(dense).to(log_q.device)
        surprises = [-float(x.gather(1, tokens.to(x.device)[:, None]).double().sum()) for x in (log_q, log_p)]
        exact = divergence_terms(log_p, log_q).sum(-1, dtype=torch.float64).sum()
        sums += torch.tensor([*surprises, float(exact)], dtype=torch.float64)
    return sums


def _predicting(hidden: Tensor) -> Tensor:
    """The hidden states [predictions, hidden] of windows [n, length, hidden] that a token follows."""
    return hidden[:, :-1].flatten(0, 1)


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """Rows, some at a time."""
    return (rows[first : first + POSITIONS_AT_ONCE] for first in range(0, len(rows), POSITIONS_AT_ONCE))
