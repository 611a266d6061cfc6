"""Tokens are chosen by the counts of a text and by what the model expects there."""

import numpy as np
import pytest
import torch

from optprune.errors import InputError
from optprune.models import LoadedModel
from optprune.texts import Text, demo_articles, tokenise
from optprune.tokens import expected_counts
from optprune.tokens.prune import VocabularyPruning
from tests.helpers.fewer_tokens import KEEP, loaded
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches

TEXTS = [Text("news", demo_articles("calibration")[:1])]


def test_they_are_sums_of_the_models_probabilities() -> None:
    model, windows = tiny_llama(), torch.cat(batches())
    with torch.no_grad():
        expected = model(input_ids=windows).logits.double().softmax(-1).sum((0, 1))
    found = expected_counts(LoadedModel(model, None, "tiny"), windows)
    # Of sums of float32 numbers, and products over 64 inputs.
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)
    assert abs(found.sum() - windows.numel()) < 1e-4 * windows.numel()


def planned(model: LoadedModel, scores: np.ndarray | None) -> set[int]:
    seen = list[torch.Tensor]()

    def expected(windows: torch.Tensor) -> np.ndarray:
        seen.append(windows)
        assert scores is not None
        return scores * windows.numel()

    given = None if scores is None else expected
    config = model.model.config
    found = VocabularyPruning.planned(model.tokenizer, config, TEXTS, KEEP, tokens=0, predictions=512, expected=given)  # type: ignore[arg-type]
    assert [len(windows) * windows.shape[1] for windows in seen] == ([512] if scores is not None else [])
    return set(found.vocabulary.kept)


def test_of_tokens_that_the_text_lacks_those_that_the_model_expects_stay() -> None:
    model = loaded(tiny_llama(vocab_size=720))
    assert model.tokenizer is not None
    ids = tokenise(model.tokenizer, TEXTS[0].documents)
    rows = model.model.config.vocab_size
    counts = np.bincount(ids.numpy(), minlength=rows)
    plain = planned(model, None)
    absent = [token for token in range(len(model.tokenizer)) if token not in plain and counts[token] <= 1]
    assert len(absent) > 3
    wanted = absent[-3:]
    scores = np.zeros(rows)
    scores[wanted] = 0.01
    assert set(wanted) <= planned(model, scores)
    assert planned(model, np.full(rows, 1e-9)) == plain, "less than a hundredth of a token is no reason"


def test_a_text_without_a_whole_window_is_chosen_by_its_counts() -> None:
    model = loaded(tiny_llama(vocab_size=720))
    short = [Text("news", ["A short text."])]
    config = model.model.config
    unused = VocabularyPruning.planned(
        model.tokenizer, config, short, KEEP, tokens=0, predictions=512, expected=lambda _: 1 / 0
    )  # type: ignore[arg-type]
    assert len(unused.vocabulary.kept) == KEEP


@pytest.mark.parametrize(("keep", "sentence"), [(20, "is too small"), (100_000, "is larger than that of the model")])
def test_a_count_that_cannot_be_is_refused_before_the_model_is_asked(keep: int, sentence: str) -> None:
    model = loaded(tiny_llama(vocab_size=720))
    settings = {"tokens": 0, "predictions": 512, "expected": lambda _: 1 / 0}
    with pytest.raises(InputError, match=sentence):
        VocabularyPruning.planned(model.tokenizer, model.model.config, TEXTS, keep, **settings)  # type: ignore[arg-type]


def test_the_windows_that_are_done_are_told() -> None:
    told = list[tuple[int, int]]()
    windows = torch.zeros(9, 512, dtype=torch.long)
    expected_counts(LoadedModel(tiny_llama(), None, "tiny"), windows, lambda *counts: told.append(counts))
    assert told == [(done, 9) for done in (0, 2, 4, 6, 8, 9)]
