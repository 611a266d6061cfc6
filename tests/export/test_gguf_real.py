"""The demo's model, pruned, in llama.cpp: the greedy text and the perplexity that transformers gives."""

import math
from pathlib import Path

import pytest
import torch

import optprune
from optprune.cli import main
from optprune.export import export_gguf
from optprune.models import load_tokenizer, need_tokenizer
from optprune.texts import read_documents
from tests.helpers.llama_cpp import LlamaCpp

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "The president said on Tuesday that",
    "In the second half of the game",
    "Once upon a time there was",
)
PREDICTED = 96


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fasp", "structured_best"])
def test_llama_cpp_says_what_transformers_says(recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    words = ["prune", "demo", "--calibration", "demo:calibration", "--samples", "16", "--seq-length", "128"]
    assert main([*words, "--recipe", recipe, "--sparsity", "0.2", "--output", str(folder)]) == 0
    model, tokenizer = optprune.load(folder).float(), need_tokenizer(load_tokenizer(folder), str(folder))
    window = torch.tensor(tokenizer(read_documents("demo:evaluation")[0])["input_ids"])[: PREDICTED + 1]
    with torch.no_grad():
        scores = model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)
    expected = -float(scores.gather(1, window[1:, None]).mean())
    for kind in ("f32", "f16", "q8_0"):
        other = LlamaCpp(export_gguf(folder, tmp_path / f"{kind}.gguf", kind=kind).file)
        vocabulary = model.config.vocab_size
        found = [
            -other.log_probabilities(window[:seen], vocabulary)[int(window[seen])] for seen in range(1, len(window))
        ]
        assert math.exp(sum(found) / len(found) - expected) == pytest.approx(1.0, abs=0.01)
        if kind == "f32":
            for prompt in PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
                text = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
                assert other.greedy(ids[0], 24) == tokenizer.decode(text[0, ids.shape[1] :]), prompt
