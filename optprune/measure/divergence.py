"""Divergence of a model's predictions from those of the dense model."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.errors import InputError, NumericalError
from optprune.measure.evaluate import NAN_MESSAGE, check_windows, evaluating, passes, perplexity_from_nll
from optprune.numerics.tensors import divergence_terms

STRETCHES = 8
"""the largest number of parts of a window, for figures by length of the context"""
POSITIONS_AT_ONCE = 256
"""the number of predictions over the whole vocabulary in memory at a time, for each model"""


@dataclass(frozen=True)
class Stretch:
    """Means over the predictions in one part of every window."""

    first: int
    """the number of tokens in the context of its first prediction"""
    last: int
    """the number of tokens in the context of its last prediction"""
    perplexity: float
    divergence: float
    agreement: float


@dataclass(frozen=True)
class StandardErrors:
    """Standard errors of means over windows; differences between the two models are paired by window."""

    surprise: float
    """the standard error of the difference of mean negative log-likelihoods, which is the logarithm of the ratio of
    perplexities, in nats a prediction"""
    divergence: float
    """the standard error of the divergence, in nats a prediction"""
    agreement: float
    windows: int
    """the number of windows; for few windows the errors are uncertain"""


@dataclass(frozen=True)
class Divergence:
    """Comparison of a model with the dense one, over all next-token predictions of some windows."""

    divergence: float
    """KL(dense || model), in nats a prediction"""
    agreement: float
    """the share of predictions with the same most likely token"""
    perplexity: float
    dense_perplexity: float
    along: tuple[Stretch, ...]
    """the same figures by length of the context"""
    standard_errors: StandardErrors | None = None
    """None for a single window, or where they overflow"""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


@torch.no_grad()
def divergence_from(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Tensor,
    *,
    on_window: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Return the divergence of a model from the dense one on windows of token ids [n, length].

    Means are over the length - 1 predictions of each window, as for `perplexity`; log-probabilities in float32, sums
    in float64. `on_window(done, n)` is called after each pass. InputError when the vocabularies differ in size,
    NumericalError when a model gives NaN.
    """
    check_windows(windows)
    own, other = model.config.get_text_config().vocab_size, dense.config.get_text_config().vocab_size
    if own != other:
        raise InputError(
            f"the two models have vocabularies of {own} and {other} tokens, so their predictions cannot be compared: "
            "name the model before pruning"
        )
    with ExitStack() as contexts:
        for one in (model, dense):
            contexts.enter_context(evaluating(one))
        pairs = zip(passes(model, windows), passes(dense, windows), strict=True)
        return divergence_of(windows, ((logits, expected) for (_, logits), (_, expected) in pairs), on_window)


@torch.no_grad()
def divergence_of(
    windows: Tensor,
    pairs: Iterable[tuple[Tensor, Tensor]],
    on_window: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Return the divergence of logits from the dense model's, given as pairs for consecutive batches of windows.

    Windows are token ids [n, length], logits [batch, length, vocabulary]; the rest is as in `divergence_from`.
    """
    count, length = windows.shape
    sums, done, by_window = torch.zeros(4, length - 1, dtype=torch.float64), 0, list[Tensor]()
    for logits, expected in pairs:
        ids = windows[done : done + len(logits)].to(logits.device)
        for window, scores, dense_scores in zip(ids, logits, expected.to(logits.device), strict=True):
            found = _sums(window, scores, dense_scores)
            sums += found
            by_window.append(found.mean(1))
        done += len(ids)
        if bool(sums.isnan().any()):
            raise NumericalError(NAN_MESSAGE.format(f"the first {done} windows"))
        if on_window is not None:
            on_window(done, count)
    total = Stretch(1, length - 1, *_means(sums, count))
    along = (Stretch(first + 1, last, *_means(sums[:, first:last], count)) for first, last in _stretches(length - 1))
    return Divergence(
        max(total.divergence, 0.0),
        total.agreement,
        total.perplexity,
        perplexity_from_nll(float(sums[1].sum()), count * (length - 1)),
        tuple(along),
        _standard_errors(torch.stack(by_window)),
    )


def _standard_errors(means: Tensor) -> StandardErrors | None:
    """Return the standard errors for the rows of `_sums`, averaged over each window, [windows, 4]."""
    windows = len(means)
    if windows < 2:
        return None
    paired = torch.stack([means[:, 0] - means[:, 1], means[:, 2], means[:, 3]])
    found = (paired.std(1) / math.sqrt(windows)).tolist()
    return StandardErrors(*found, windows=windows) if all(map(math.isfinite, found)) else None


def _sums(window: Tensor, scores: Tensor, dense_scores: Tensor) -> Tensor:
    """Return both losses, the divergence and the agreement of each prediction of a window [4, length - 1]."""
    found = list[Tensor]()
    whole = (window[1:], scores[:-1], dense_scores[:-1])
    for following, part, dense_part in zip(*(x.split(POSITIONS_AT_ONCE) for x in whole), strict=True):
        log_q, log_p = part.float().log_softmax(-1), dense_part.float().log_softmax(-1)
        losses = [-x.gather(1, following[:, None])[:, 0] for x in (log_q, log_p)]
        divergence = divergence_terms(log_p, log_q).sum(-1, dtype=torch.float64)
        agreement = log_q.argmax(-1) == log_p.argmax(-1)
        found.append(torch.stack([*(x.double() for x in losses), divergence, agreement.double()]))
    return torch.cat(found, dim=1).cpu()


def _means(sums: Tensor, count: int) -> tuple[float, float, float]:
    """Return the perplexity, divergence and agreement for sums over `count` windows."""
    loss, _, divergence, agreement = (float(x) for x in sums.sum(1))
    predictions = count * sums.shape[1]
    return perplexity_from_nll(loss, predictions), divergence / predictions, agreement / predictions


def _stretches(predictions: int) -> Iterator[tuple[int, int]]:
    parts = min(STRETCHES, predictions)
    edges = [math.floor(predictions * part / parts) for part in range(parts + 1)]
    return pairwise(edges)
