"""How far a model's predictions are from those of the dense model, which perplexity alone does not say."""

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
from optprune.numerics.kullback_leibler import divergence_terms

STRETCHES = 8
"""into how many parts a window's predictions are cut at most, to see what grows along the context"""
POSITIONS_AT_ONCE = 256
"""how many predictions over the whole vocabulary are held at once, of each model"""


@dataclass(frozen=True)
class Stretch:
    """A part of every window, and the means over the predictions made there."""

    first: int
    """how many tokens the first of these predictions sees"""
    last: int
    """how many tokens the last of them sees"""
    perplexity: float
    divergence: float
    agreement: float


@dataclass(frozen=True)
class StandardErrors:
    """The standard errors of means over windows; both models predict the same windows, so differences are paired."""

    surprise: float
    """the standard error of the difference of the two models' mean surprise, which is the logarithm of the ratio of
    their perplexities, in nats a prediction"""
    divergence: float
    """the standard error of the divergence, in nats a prediction"""
    agreement: float
    windows: int
    """over how many windows: a standard deviation of few says little"""


@dataclass(frozen=True)
class Divergence:
    """A model beside the dense one, over all next-token predictions of some windows."""

    divergence: float
    """KL(dense || model), in nats a prediction"""
    agreement: float
    """the share of predictions in which both hold the same token for the most likely"""
    perplexity: float
    dense_perplexity: float
    along: tuple[Stretch, ...]
    """the same along the context"""
    standard_errors: StandardErrors | None = None
    """how far the means are known; None of a single window, or where they are beyond the largest number"""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


@torch.no_grad()
def divergence_from(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Tensor,
    *,
    on_window: Callable[[int, int], None] | None = None,
) -> Divergence:
    """The divergence of a model from the dense one on windows of token ids [n, length], which do not see each other.

    Means are over the length - 1 predictions of each window, as for `perplexity`; log-probabilities in float32, sums
    in float64. `on_window(done, n)` is called after each pass. InputError when the vocabularies differ in size,
    NumericalError when a model gives NaN.
    """
    check_windows(windows)
    own, other = model.config.get_text_config().vocab_size, dense.config.get_text_config().vocab_size
    if own != other:
        raise InputError(
            f"the two models have vocabularies of {own} and {other} tokens, so that their predictions cannot be "
            "compared: name the model that this one was made from"
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
    """The divergence of logits from the dense model's, which come in pairs, each of the next few of some windows.

    Windows are token ids [n, length], logits [some, length, vocabulary]; the rest is as in `divergence_from`.
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
    """The standard errors of what [windows, 4] holds of each window: both surprises, the divergence, the agreement."""
    windows = len(means)
    if windows < 2:
        return None
    paired = torch.stack([means[:, 0] - means[:, 1], means[:, 2], means[:, 3]])
    found = (paired.std(1) / math.sqrt(windows)).tolist()
    return StandardErrors(*found, windows=windows) if all(map(math.isfinite, found)) else None


def _sums(window: Tensor, scores: Tensor, dense_scores: Tensor) -> Tensor:
    """By prediction of a window [length]: both models' surprise, the divergence, the agreement [4, length - 1]."""
    found = list[Tensor]()
    whole = (window[1:], scores[:-1], dense_scores[:-1])
    for following, part, dense_part in zip(*(x.split(POSITIONS_AT_ONCE) for x in whole), strict=True):
        log_q, log_p = part.float().log_softmax(-1), dense_part.float().log_softmax(-1)
        surprises = [-x.gather(1, following[:, None])[:, 0] for x in (log_q, log_p)]
        divergence = divergence_terms(log_p, log_q).sum(-1, dtype=torch.float64)
        agreement = log_q.argmax(-1) == log_p.argmax(-1)
        found.append(torch.stack([*(x.double() for x in surprises), divergence, agreement.double()]))
    return torch.cat(found, dim=1).cpu()


def _means(sums: Tensor, count: int) -> tuple[float, float, float]:
    """The perplexity, divergence and agreement of some predictions of so many windows."""
    surprise, _, divergence, agreement = (float(x) for x in sums.sum(1))
    predictions = count * sums.shape[1]
    return perplexity_from_nll(surprise, predictions), divergence / predictions, agreement / predictions


def _stretches(predictions: int) -> Iterator[tuple[int, int]]:
    parts = min(STRETCHES, predictions)
    edges = [math.floor(predictions * part / parts) for part in range(parts + 1)]
    return pairwise(edges)
