"""The demo's model, pruned, in llama.cpp: the greedy text and the perplexity that transformers gives.

Both say how likely each token of a text is, so that what differs is seen token by token: the mean of the differences is
known to its standard error, which is much smaller than that of either perplexity.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import optprune
from optprune.export import export_gguf
from optprune.models import load_tokenizer, need_tokenizer
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
WINDOWS, LENGTH, CONTINUED = 4, 400, 24
WITHIN = math.log(1.01)
"""the difference in nats a token that is a percent of the perplexity"""
CERTAIN = 2.0
"""the standard errors beyond the mean that the true difference may be at"""


def test_one_percent_is_told_from_more() -> None:
    """By as many tokens as there are, where single ones differ as q8_0 lets them."""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fasp", "structured_best"])
def test_llama_cpp_says_what_transformers_says(recipe: str, pruned_demo: PrunedDemo, tmp_path: Path) -> None:
    folder = pruned_demo.by(recipe)
    model, tokenizer = optprune.load(folder).float(), need_tokenizer(load_tokenizer(folder), str(folder))
    tokens = tokenise(tokenizer, read_documents("demo:evaluation"), WINDOWS * LENGTH)
    windows = evaluation_windows(tokens, LENGTH, WINDOWS)
    expected = log_likelihoods(model, windows)
    for kind in ("f32", "f16", "q8_0"):
        other = LlamaCpp(export_gguf(folder, tmp_path / f"{kind}.gguf", kind=kind).file, WINDOWS)
        differences = (other.log_likelihoods(windows) - expected).flatten()
        mean, error = float(differences.mean()), float(differences.std()) / math.sqrt(differences.numel())
        print(
            recipe,
            kind,
            "ratio of perplexities",
            math.exp(-mean),
            "standard error",
            error,
            float(differences.abs().max()),
        )
        assert abs(mean) + CERTAIN * error <= WITHIN, kind
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            print(kind, repr(other.greedy(ids[0], CONTINUED)), repr(greedy(model, tokenizer, ids)))


def log_likelihoods(model: PreTrainedModel, windows: Tensor) -> Tensor:
    with torch.no_grad():
        scores = [model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1) for window in windows]
    pairs = zip(scores, windows, strict=True)
    return torch.stack([score.gather(1, window[1:, None])[:, 0] for score, window in pairs])


def greedy(model: PreTrainedModel, tokenizer: Tokenizer, ids: Tensor) -> str:
    text = model.generate(ids, max_new_tokens=CONTINUED, do_sample=False, eos_token_id=None, pad_token_id=0)
    return str(tokenizer.decode(text[0, ids.shape[1] :]))
