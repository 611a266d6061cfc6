"""Distillation loss: the divergence of a model's predictions from the dense model's, and its gradient.

The loss is the mean over predictions of KL(dense || model) in nats, at temperature 1. Logits are computed from the last
hidden states for some positions at a time, and their gradient is taken at once. The logits of a whole window, the
largest tensors where the vocabulary is large, are never in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.measure.teacher import Teacher
from optprune.models import scale_logits
from optprune.numerics.tensors import divergence_terms

POSITIONS_AT_ONCE = 256
"""number of positions whose logits are in memory at once, for each model"""
ROUNDING = 1e-2
"""tolerance for logits computed in parts, relative to the largest log-probability: bfloat16 rounds to 0.004"""

Precision = Callable[[], AbstractContextManager]
"""a function that returns the context in which a model is run, such as torch.autocast"""


@dataclass(frozen=True, eq=False)
class Reader(Teacher):
    """Causal language model, split into the part that computes hidden states and the head."""

    precision: Precision

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states [windows, length, hidden] for token ids [windows, length]."""
        with self.precision():
            return self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities [..., vocabulary] of the next token in float32, for hidden states [..., hidden]."""
        head: Any = self.model.get_output_embeddings()
        with self.precision():
            logits = scale_logits(self.model.config, head(hidden))
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Raise InputError where the model's logits differ from its head applied to its last hidden states."""
        ids = ids[:1, :8]
        with self.precision():
            expected = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits.float().log_softmax(-1)
        difference = float((self.log_probabilities(self.hidden(ids)) - expected).abs().max())
        if difference > ROUNDING * float(expected.abs().max()):
            raise InputError(
                f"the logits of a {self.model.config.model_type} model differ from its head applied to its last hidden "
                "states, which healing requires: train it with your own code and optprune.keep_zeros"
            )


def add_gradient(student: Reader, teacher: Teacher, ids: Tensor, predictions: int) -> float:
    """Add the gradients of windows [n, length] to the student's, and return their part of the mean divergence.

    The mean is over `predictions`, which may include those of further calls: so a step can have more windows than fit
    in memory. A window has length - 1 predictions, those that a token follows.
    """
    with torch.no_grad():
        expected = _predicting(teacher.hidden(ids))
    hidden = _predicting(student.hidden(ids))
    # The backward pass below the head runs once, when the gradient at all hidden states is known.
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
    """Return the sum over predictions of KL(p || q), from log-probabilities [predictions, vocabulary]."""
    return divergence_terms(log_p, log_q).sum()


@torch.no_grad()
def surprise_and_divergence(student: Reader, teacher: Teacher, ids: Tensor, expected: Tensor) -> Tensor:
    """Return float64 sums [3] over the predictions of windows [n, length]: both models' surprise, and the divergence.

    `expected` [n, length, hidden] are the teacher's hidden states for the windows.
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
    """Return the hidden states [predictions, hidden] of windows [n, length, hidden] that a token follows."""
    return hidden[:, :-1].flatten(0, 1)


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """Yield the rows in parts."""
    return (rows[first : first + POSITIONS_AT_ONCE] for first in range(0, len(rows), POSITIONS_AT_ONCE))
