"""The demo's model, pruned, in llama.cpp: the greedy text and the perplexity that transformers gives.

Both say how likely each token of a text is, so that what differs is seen token by token: the mean of the differences is
known to its standard error, which is much smaller than that of either perplexity. Under q8_0 tokens differ by a tenth
of a nat, since llama.cpp rounds what enters each product to 8 bits too, and 1600 of them tell a third of a percent.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import optprune
from optprune.export import GgufFile, export
from optprune.models import load_tokenizer, need_tokenizer
from optprune.models.sources import demo_model_file
from optprune.texts import evaluation_windows, read_documents, tokenise
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.pruned_demo import PrunedDemo

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "The president said on Tuesday that",
    "In the second half of the game",
    "Once upon a time there was",
)
WINDOWS, LENGTH, CONTINUED = 8, 400, 24
WITHIN = math.log(1.01)
"""the difference in nats a token that is a percent of the perplexity"""
TELLING = 3.0
"""the standard errors that a percent must be, for as many tokens to tell it from none"""
TIED = 4.0
"""how many times the error of a token two tokens may be apart that are as good as tied: each has its own"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fasp", "structured_best"])
def test_llama_cpp_says_what_transformers_says(recipe: str, pruned_demo: PrunedDemo, tmp_path: Path) -> None:
    folder = pruned_demo.by(recipe)
    model, tokenizer = (
        optprune.load_model(folder, device="cpu").model.float(),
        need_tokenizer(load_tokenizer(folder), str(folder)),
    )
    tokens = tokenise(tokenizer, read_documents("demo:evaluation"), WINDOWS * LENGTH)
    windows = evaluation_windows(tokens, LENGTH, WINDOWS)
    expected = log_likelihoods(model, windows)
    for kind in ("f32", "f16", "q8_0"):
        other = LlamaCpp(export(folder, tmp_path / f"{kind}.gguf", GgufFile(kind=kind)).path, WINDOWS)
        differences = (other.log_likelihoods(windows) - expected).flatten()
        mean, noise = float(differences.mean()), float(differences.std())
        print(recipe, kind, f"{math.exp(mean):.6f} ± {noise / math.sqrt(differences.numel()):.6f}")  # shown by -s
        assert TELLING * noise / math.sqrt(differences.numel()) <= WITHIN, "the tokens are too few"
        assert abs(mean) <= WITHIN, kind
        for prompt in PROMPTS:
            check_greedy(model, tokenizer, other, prompt, TIED * noise)


@pytest.mark.slow
def test_the_dense_file_differs_too() -> None:
    """Its weights are the same in both: llama.cpp rounds what enters their products to 8 bits."""
    model, other = optprune.load_model("demo", device="cpu").model.float(), LlamaCpp(demo_model_file(), WINDOWS)
    tokenizer = need_tokenizer(load_tokenizer("demo"), "demo")
    windows = evaluation_windows(tokenise(tokenizer, read_documents("demo:evaluation"), 1024), 256, WINDOWS)
    noise = float((other.log_likelihoods(windows) - log_likelihoods(model, windows)).std())
    assert noise > 0.01, "8 bits of what enters a product are not seen"
    for prompt in PROMPTS:
        check_greedy(model, tokenizer, other, prompt, TIED * noise)


def log_likelihoods(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """The log-probability of each token of windows [n, length] behind those before it: [n, length - 1]."""
    with torch.no_grad():
        scores = [model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1) for window in windows]
    pairs = zip(scores, windows, strict=True)
    return torch.stack([score.gather(1, window[1:, None])[:, 0] for score, window in pairs])


def check_greedy(model: PreTrainedModel, tokenizer: Tokenizer, other: LlamaCpp, prompt: str, tied: float) -> None:
    """The text is the same, or goes on otherwise where the model holds two tokens for as likely, in nats."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=CONTINUED, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    expected = whole[ids.shape[1] :].tolist()
    text, found = other.greedy(ids[0], CONTINUED)
    if text == tokenizer.decode(expected):
        return
    place = next(number for number, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1])
    with torch.no_grad():
        scores = model(input_ids=whole[None, : ids.shape[1] + place]).logits[0, -1].double().log_softmax(-1)
    apart = float(scores[expected[place]] - scores[found[place]])
    assert apart <= tied, (prompt, text, tokenizer.decode(expected), apart, tied)
