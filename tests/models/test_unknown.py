"""Models of other kinds: the sentence says which of their modules are not understood."""

from typing import Any

import pytest
from transformers import AutoConfig

from optprune.errors import InputError
from optprune.models import architecture_of
from optprune.models.registry import architecture_called

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 48, "vocab_size": 64, "pad_token_id": None}


def refused(family: str, **fields: Any) -> str:
    config = AutoConfig.for_model(family, **{**SMALL, **fields})
    with pytest.raises(InputError) as caught:
        architecture_of(config)
    sentence = str(caught.value)
    # What config.json holds says as much.
    with pytest.raises(InputError) as again:
        architecture_called(family, {**config.to_dict(), "auto_map": {"AutoConfig": "foo.Foo"}})
    assert str(again.value) == sentence
    assert sentence.startswith(f"the architecture '{family}' is not known: optprune prunes gemma2, gemma3_text, ")
    assert sentence.endswith("; optprune inspect MODEL drafts one for --architecture, where that is safe")
    return sentence


def test_experts_and_their_router_are_named() -> None:
    sentence = refused("flex_olmo", num_experts=4)
    assert "of model.layers.0 the nearest, gemma2, does not account for mlp.gate (" in sentence
    assert "mlp.experts (FlexOlmoExperts)" in sentence
    assert "and asks for mlp.gate_proj, mlp.up_proj, mlp.down_proj;" in sentence


def test_fused_layers_are_named() -> None:
    assert "self_attention.query_key_value (Linear), self_attention.dense (Linear)" in refused("bloom")


def test_a_block_of_a_known_kind_says_so() -> None:
    words = "; the linear layers of model.layers.0 are where gemma2 has them, so that the file may be short; optprune"
    assert words in refused("cohere")


@pytest.mark.parametrize(
    "config",
    [None, {}, {"model_type": "foo"}, {"model_type": ["flex_olmo"]}, {"model_type": "flex_olmo", "hidden_size": -1}],
)
def test_where_there_is_no_model_there_is_nothing_to_say(config: Any) -> None:
    kind = None if config is None else config.get("model_type")
    with pytest.raises(InputError, match=r"is not known: optprune prunes .* in optprune/models\); optprune inspect"):
        architecture_called(kind, config)
