"""A model with the rows of fewer tokens: the same logits for these, and the ids of its configs moved along."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from optprune.errors import InputError
from optprune.models import LoadedModel
from optprune.tokens import SmallerVocabulary, keep_rows
from optprune.tokens.rows import TokenRows, config_ids
from tests.helpers.tiny_models import ALL_MODELS, TINY_MODELS, tiny_llama, tiny_qwen2, tiny_tokenizer

KEPT = [*range(262), *range(300, 500, 3), 510]
"""special tokens and bytes, and then some tokens whose parts may be removed"""


def vocabulary() -> SmallerVocabulary:
    return SmallerVocabulary.of(tiny_tokenizer(), KEPT)


def loaded(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model.eval(), tiny_tokenizer(), "tiny")


@pytest.mark.parametrize("name", [name for name in ALL_MODELS if name != "gemma4_text"])
@torch.no_grad()
def test_logits_of_kept_tokens_stay(name: str) -> None:
    model = ALL_MODELS[name]().eval()
    ids, kept = torch.tensor([[3, 5, 1, 8, 70, 260]]), torch.tensor(KEPT)
    expected = model(input_ids=kept[ids]).logits[..., kept]
    tied = TokenRows.of(model).tied
    smaller = keep_rows(loaded(model), vocabulary())
    assert torch.equal(smaller.model(input_ids=ids).logits, expected)
    assert smaller.model.config.vocab_size == len(KEPT)
    assert TokenRows.of(model).tied == tied
    assert smaller.tokenizer is not None and len(smaller.tokenizer) == len(KEPT)


def test_a_bias_of_the_head_keeps_its_entries() -> None:
    model = tiny_llama()
    head = model.lm_head
    model.lm_head = nn.Linear(head.in_features, head.out_features)
    bias = model.lm_head.bias.detach().clone()
    keep_rows(loaded(model), vocabulary())
    assert torch.equal(model.lm_head.bias, bias[KEPT])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_ids_of_the_configs_move(name: str) -> None:
    model = TINY_MODELS[name]()
    model.config.eos_token_id, model.config.pad_token_id = 510, 600
    model.config.bos_token_id = None
    model.generation_config = GenerationConfig(eos_token_id=[303, 510], pad_token_id=-1, suppress_tokens=[1, 301])
    assert config_ids(model.config) >= {510, 600}
    keep_rows(loaded(model), vocabulary())
    place = {old: new for new, old in enumerate(KEPT)}
    assert model.config.eos_token_id == place[510]
    assert model.config.pad_token_id is None, "no token of the tokenizer"
    assert model.config.bos_token_id is None
    assert model.generation_config.eos_token_id == [place[303], place[510]]
    assert model.generation_config.pad_token_id == -1
    assert model.generation_config.suppress_tokens == [1], "a removed token is not written anyway"


def test_a_padding_row_moves() -> None:
    model = tiny_qwen2(pad_token_id=303)
    assert model.get_input_embeddings().padding_idx == 303
    keep_rows(loaded(model), vocabulary())
    assert model.get_input_embeddings().padding_idx == KEPT.index(303)


def _without_head(model: PreTrainedModel) -> None:
    model.lm_head = nn.Identity()  # type: ignore[assignment]


def _with_larger_head(model: PreTrainedModel) -> None:
    model.lm_head = nn.Linear(64, 600, bias=False)  # type: ignore[assignment]


def _with_more_rows(model: PreTrainedModel) -> None:
    model.model.embed_tokens_per_layer = nn.Embedding(512, 8)


def _ending_with_a_removed_token(model: PreTrainedModel) -> None:
    model.generation_config = GenerationConfig(eos_token_id=[303, 301])


def _with_bad_words(model: PreTrainedModel) -> None:
    model.generation_config = GenerationConfig(bad_words_ids=[[301, 302]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_head, "no embedding and head"),
        (_with_larger_head, "has 600 rows and its embedding 512"),
        (_with_more_rows, "embed_tokens_per_layer.weight has a row for each token too"),
        (_ending_with_a_removed_token, "eos_token_id 301, a token that the smaller vocabulary does not have"),
        (_with_bad_words, r"bad_words_ids \[\[301, 302\]\], whose tokens may be removed"),
    ],
)
def test_models_that_are_refused(change: Callable[[PreTrainedModel], None], words: str) -> None:
    model = tiny_llama()
    change(model)
    with pytest.raises(InputError, match=words):
        keep_rows(loaded(model), vocabulary())
    assert model.get_input_embeddings().weight.shape == (512, 64), "a refusal changes nothing"
