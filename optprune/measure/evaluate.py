"""Perplexity of a model, and its greedy continuations."""

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
"""how many tokens go through the model together"""

NAN_MESSAGE = "the model gives NaN within {}: look for damaged weights, or load it with --dtype float32"


@dataclass(frozen=True)
class Evaluation:
    """A perplexity, and on how much it was measured."""

    perplexity: float
    tokens: int
    """the number of next-token predictions: one fewer than its length for each window"""
    windows: int
    seconds: float

    def to_dict(self) -> dict[str, float | int]:
        """The fields as plain data."""
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Tensor, *, on_window: Callable[[int, int], None] | None = None
) -> Evaluation:
    """The perplexity of a model on windows of token ids [n, length].

    It is the exponential of the mean negative log-likelihood of all length - 1 predictions of each window; windows do
    not see each other. `on_window(done, n)` is called after each pass. NumericalError when the model gives NaN.
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
    """Raise InputError when these are no windows of token ids in which something is predicted."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"windows are token ids [n, length >= 2], not a tensor of shape {list(windows.shape)}")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, for as long as the context lasts."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def passes(model: PreTrainedModel, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows on the model's device, some at once, and the model's logits [some, length, vocabulary]."""
    for batch in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
        ids = batch.to(model.device)
        yield ids, model(input_ids=ids, use_cache=False).logits


def bits_per_byte(evaluation: Evaluation, windows: Tensor, tokenizer: Tokenizer) -> float:
    """The mean surprise in bits for each byte of UTF-8 that the windows [n, length] stand for.

    Unlike perplexity it can be compared between models with different tokenizers.
    """
    (text,) = tokenizer.batch_decode(windows.flatten()[None], clean_up_tokenization_spaces=False)
    return math.log2(evaluation.perplexity) * windows.numel() / max(len(text.encode()), 1)


def negative_log_likelihood(ids: Tensor, logits: Tensor, total: float = 0.0) -> float:
    """A total and the negative log-likelihood of the predictions of windows of token ids [n, length]."""
    # One window at a time: the float32 logits of a large vocabulary are the largest tensors here.
    for window, scores in zip(ids, logits, strict=True):
        log_probabilities = scores[:-1].float().log_softmax(dim=-1)
        total -= float(log_probabilities.gather(1, window[1:, None]).double().sum())
    return total


def perplexity_from_nll(total: float, tokens: int) -> float:
    """The perplexity of a total over so many predictions."""
    mean = total / tokens
    # A hopeless model's may be beyond the largest float.
    return math.exp(mean) if mean < 700 else math.inf


NEW_TOKENS = 48


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Tensor], *, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """The greedy continuation of each prompt of token ids [length], as text without special tokens."""
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
