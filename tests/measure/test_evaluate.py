"""Perplexity against its definition, by torch's cross entropy in float64, and greedy continuations."""

import math

import pytest
import torch

from optprune.errors import InputError, NumericalError
from optprune.measure import bits_per_byte, generate, perplexity
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama, tiny_tokenizer


def literal(model: torch.nn.Module, windows: torch.Tensor) -> float:
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


def some_windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", TINY_MODELS)
def test_it_is_the_definition(architecture: str) -> None:
    model, windows = TINY_MODELS[architecture](), some_windows(5, 33)
    evaluation = perplexity(model, windows)
    assert evaluation.perplexity == pytest.approx(literal(model, windows), rel=1e-6)
    assert (evaluation.tokens, evaluation.windows) == (5 * 32, 5)
    assert set(evaluation.to_dict()) == {"perplexity", "tokens", "windows", "seconds"}


def test_batches_do_not_matter_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_llama(), some_windows(5, 40)
    together = perplexity(model, windows).perplexity
    monkeypatch.setattr("optprune.measure.evaluate.TOKENS_AT_ONCE", 80)
    calls: list[tuple[int, int]] = []
    apart = perplexity(model, windows, on_window=lambda done, total: calls.append((done, total)))
    assert apart.perplexity == pytest.approx(together, rel=1e-6)
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, some_windows(2, 20)).perplexity == pytest.approx(512, rel=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    perplexity(model, some_windows(1, 8))
    assert model.training


def test_bfloat16_scores_are_summed_in_higher_precision() -> None:
    model = tiny_llama().to(torch.bfloat16)
    windows = some_windows(4, 64)
    assert perplexity(model, windows).perplexity == pytest.approx(literal(model, windows), rel=1e-5)


def test_nan_is_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match="gives NaN within the first 2 windows"):
        perplexity(model, some_windows(2, 8))


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_windows_without_predictions(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="windows are token ids"):
        perplexity(tiny_llama(), torch.zeros(shape, dtype=torch.long))


def test_bits_per_byte_do_not_depend_on_how_the_text_is_cut_into_tokens() -> None:
    """A uniform model over V tokens needs log2 V bits a token, and the bytes are those of the text."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    torch.nn.init.zeros_(model.lm_head.weight)
    text = "Der Minister läuft über die Brücke, naïve façade. " * 4
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    bits = bits_per_byte(perplexity(model, ids), ids, tokenizer)
    assert bits == pytest.approx(9 * ids.numel() / len(text.encode()), rel=1e-6)


def test_each_token_is_the_most_likely_one() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("The minister", "They won the game of")]
    expected = []
    for prompt in prompts:
        ids = prompt
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
            if int(ids[-1]) == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert generate(model, tokenizer, prompts, new_tokens=6) == expected
