"""Perplexity of a model as in the pruning papers, over consecutive windows, and its greedy continuations."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError, NumericalError

TOKENS_AT_ONCE = 2048
"""the number of tokens in a forward pass"""

NAN_MESSAGE = "the model gives NaN within {}: look for damaged weights, or load it with --dtype float32"


@dataclass(frozen=True)
class Evaluation:
    """Perplexity, and the amount of text that it was measured on."""

    perplexity: float
    tokens: int
    """the number of next-token predictions: for each window its length minus one"""
    windows: int
    seconds: float

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields as plain data."""
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Tensor, *, on_window: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Return the perplexity of a model on windows of token ids [n, length].

    It is the exponential of the mean negative log-likelihood over all length - 1 predictions of each window; no
    context crosses windows. `on_window(done, n)` is called after each pass. NumericalError when the model gives NaN.
    """
    check_windows(windows)
    began = time.perf_counter()
    count, length = windows.shape
    total = 0.0
    done = 0
    with evaluating(model):
        for ids, logits in passes(model, windows):
            total = negative_log_likelihood(ids, logits, total)
            done += len(ids)
            if math.isnan(total):
                raise NumericalError(NAN_MESSAGE.format(f"the first {done} windows"))
            if on_window is not None:
                on_window(done, count)
    tokens = count * (length - 1)
    return Evaluation(
        perplexity=perplexity_from_nll(total, tokens),
        tokens=tokens,
        windows=count,
        seconds=time.perf_counter() - began,
    )


def check_windows(windows: Tensor) -> None:
    """Raise InputError unless windows have the shape [n, length >= 2]."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"windows are token ids [n, length >= 2], not a tensor of shape {list(windows.shape)}")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model in evaluation mode within this context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def passes(model: PreTrainedModel, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of windows on the model's device, and the logits [batch, length, vocabulary]."""
    for batch in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
        ids = batch.to(model.device)
        yield ids, model(input_ids=ids, use_cache=False).logits


def without_begin(windows: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Return windows [n, length] without the special tokens that all of them begin with, such as BOS."""
    special, begin = tokenizer.all_special_ids, 0
    while begin < windows.shape[1] and int(windows[0, begin]) in special and windows[:, begin].unique().numel() == 1:
        begin += 1
    return windows[:, begin:]


def bits_per_byte(evaluation: Evaluation, windows: Tensor, tokenizer: Tokenizer) -> float:
    """Return the mean negative log-likelihood of windows [n, length] in bits for each byte of their UTF-8 text.

    Unlike perplexity it can be compared between models with different tokenizers. Special tokens that all windows
    begin with, such as BOS, are no part of the text.
    """
    own = without_begin(windows, tokenizer)
    (text,) = tokenizer.batch_decode(own.flatten()[None], clean_up_tokenization_spaces=False)
    return math.log2(evaluation.perplexity) * own.numel() / max(len(text.encode()), 1)


def negative_log_likelihood(ids: Tensor, logits: Tensor, total: float = 0.0) -> float:
    """Return the negative log-likelihood of windows of token ids [n, length], added to a total."""
    # One window at a time: the float32 logits of a large vocabulary are the largest tensors here.
    for window, scores in zip(ids, logits, strict=True):
        log_probabilities = scores[:-1].float().log_softmax(dim=-1)
        total -= float(log_probabilities.gather(1, window[1:, None]).double().sum())
    return total


def perplexity_from_nll(total: float, tokens: int) -> float:
    """Return the perplexity for a total negative log-likelihood of so many predictions."""
    mean = total / tokens
    # The perplexity of a broken model may overflow.
    return math.exp(mean) if mean < 700 else math.inf


NEW_TOKENS = 48


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Tensor], *, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """Return the greedy continuation of each prompt of token ids [length], as text without special tokens."""
    greedy = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    found = list[str]()
    with evaluating(model):
        for prompt in prompts:
            ids = prompt[None].to(model.device)
            # A method of transformers' generation mixin, which all causal models have.
            ids_out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)  # type: ignore[operator]
            found += tokenizer.batch_decode(ids_out[:, prompt.shape[0] :], skip_special_tokens=True)
    return found
