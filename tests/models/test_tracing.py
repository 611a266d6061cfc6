"""Traced drafts compared with the descriptions by hand, and refusals."""

import functools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from optprune.errors import InputError
from optprune.models import ARCHITECTURES, Draft, registry, trace
from optprune.models.draft import OF_STOCK
from optprune.models.tracing import check_laws
from tests.helpers.tiny_models import ALL_MODELS, tiny_llama
from tests.helpers.unknown_models import UNKNOWN, config_of

BY_HAND = [each.name for each in fields(Draft) if each.name not in ("heads", "indivisible", "not_understood")]
MORE_CAREFUL = {"phi3": ("head_dim_is_free",)}
"""fields that the description by hand denies because of configs other than this one"""


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty the table of architectures."""
    monkeypatch.setattr(registry, "ARCHITECTURES", {})


@pytest.mark.usefixtures("hidden")
# Experts and recurrent mixers are refused: see REFUSED. Blocks of Gemma 4 differ in their heads, which no draft says.
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, one in ARCHITECTURES.items()
        if name in ALL_MODELS and not (one.mixture or one.recurrent or one.shared)
    ],
)
def test_a_draft_is_what_was_described_by_hand(name: str) -> None:
    config, hand = ALL_MODELS[name]().config, ARCHITECTURES[name]
    draft = trace(config)
    assert draft.not_understood == ()
    wanted: dict[str, Any] = {field: getattr(hand, field) for field in BY_HAND}
    wanted |= {field: getattr(draft, field) for field in MORE_CAREFUL.get(name, ())}
    wanted["ends_with_norm"] = hand.ends_with_norm(config)
    # Of modules and fields that some models have, those that this one has.
    wanted["after_blocks"] = tuple(path for path in hand.after_blocks if "project_out" not in path)
    wanted["logits_cap"] = hand.logits_cap if getattr(config, hand.logits_cap or "_", None) else ""
    assert {field: getattr(draft, field) for field in BY_HAND} == wanted
    assert draft.architecture().heads(config) == hand.heads(config)
    # A description by hand has classes of its own, so that more can go.
    assert {**hand.indivisible, **draft.indivisible} == dict(draft.indivisible)
    assert set(draft.indivisible.values()) <= {OF_STOCK, *hand.indivisible.values()}


@pytest.mark.parametrize("before", [True, False])
def test_a_norm_behind_the_block_is_seen(before: bool) -> None:
    config = ALL_MODELS["opt"](do_layer_norm_before=before).config
    assert trace(config).ends_with_norm is not before


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_architectures_of_these_layouts_are_understood(name: str) -> None:
    draft = trace(config_of(name))
    assert draft.not_understood == ()
    assert {field: getattr(draft, field) for field in UNKNOWN[name]} == UNKNOWN[name]


def test_a_draft_comes_back_from_its_file(tmp_path: Any) -> None:
    draft = trace(config_of("glm4"))
    (tmp_path / "draft.yaml").write_text(draft.to_yaml())
    assert Draft.read(tmp_path / "draft.yaml") == draft
    assert draft.architecture() is Draft.read(tmp_path / "draft.yaml").architecture()


@settings(max_examples=6, deadline=None)
@given(
    joined=st.sampled_from(["", "parts", "heads"]),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([4, 6, 8]),
)
def test_queries_keys_and_values_are_told_apart_in_any_layout(joined: str, kv: int, group: int, dim: int) -> None:
    family = {"": "llama", "parts": "phi3", "heads": "gpt_neox"}[joined]
    heads = kv * group
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": heads * dim}
    draft = trace(ALL_MODELS[family](intermediate_size=20, num_hidden_layers=1, **shape).config)
    hand = ARCHITECTURES[family]
    assert [draft.query, draft.key, draft.value, draft.output] == [hand.query, hand.key, hand.value, hand.output]
    # Of one head the two layouts are one.
    assert draft.joined == joined or (joined == "heads" and heads == 1)


def test_queries_keys_and_values_of_many_heads_are_told_apart() -> None:
    """Of more heads than a trace has sequences."""
    shape = {"num_attention_heads": 20, "num_key_value_heads": 20, "hidden_size": 80, "head_dim": 4}
    draft = trace(ALL_MODELS["llama"](intermediate_size=20, num_hidden_layers=1, **shape).config)
    hand = ARCHITECTURES["llama"]
    assert draft.not_understood == ()
    assert [draft.query, draft.key, draft.value, draft.output] == [hand.query, hand.key, hand.value, hand.output]


# -- what is not understood


REFUSED = {
    "mixtral": {
        "model.layers.0.mlp.gate": "it multiplies by a matrix [4, 64] and is no plain linear layer",
        "model.layers.0.mlp.experts": "hold several matrices, as those of experts do",
        "model.layers.0": "an MLP has one last layer in blocks that are understood, and here none",
    },
    "qwen2_moe": {"model.layers.0.mlp.shared_expert_gate": "it adds to the hidden states, and no linear layer stands"},
    "gpt_oss": {"model.layers.0.self_attn": "it has weights [4] and is no norm"},
    "bloom": {"transformer.h.0.mlp.dense_4h_to_h": "no field of the config says how many columns it has"},
    "falcon": {"transformer.h.0.mlp.dense_h_to_4h": "is no plain linear layer"},
    "lfm2": {"model.layers.0.feed_forward.w2": "no field of the config says how many columns it has"},
    "qwen3_5_text": {
        "model.layers.0.linear_attn": "it has weights [4] and is no norm",
        "model.layers.0.linear_attn.norm": "it has weights [12] and is no norm",
    },
    "gpt_bigcode": {"transformer.h.0.attn.c_proj": "the rows of attn.c_attn are not queries, keys and values"},
}
"""modules that a draft must name, with the reason, by model"""


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_named_and_keeps_a_draft_from_use(name: str) -> None:
    fewer = {"num_local_experts": 4, "num_experts": 4}
    draft = trace(config_of(name, **fewer))
    found = {each.module: each.why for each in draft.not_understood}
    for module, why in REFUSED[name].items():
        assert why in found[module]
    with pytest.raises(InputError, match=r"does not understand .*write the description of this model by hand"):
        draft.architecture()


def test_rows_of_an_mlp_unit_that_lie_beside_each_other_are_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3 has all gates first; here each gate precedes the row that it multiplies."""

    def interleaved(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
        rows = mlp.gate_up_proj(hidden)
        return mlp.down_proj(rows[..., 1::2] * mlp.activation_fn(rows[..., ::2]))

    config = ALL_MODELS["phi3"]().config
    assert not trace(config).not_understood
    monkeypatch.setattr(modeling_phi3.Phi3MLP, "forward", interleaved)
    [only] = trace(config).not_understood
    assert only.module == "model.layers.0.mlp.down_proj" and "not one for each row" in only.why


def test_keys_before_queries_in_one_layer_are_not_taken_for_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(attention: Any, hidden: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        parts = attention.c_attn(hidden).chunk(3, dim=-1)
        key, query, value = (part.view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2) for part in parts)
        scaling = attention.scaling
        attend = modeling_gpt2.eager_attention_forward
        mixed, weights = attend(attention, query, key, value, attention_mask, scaling=scaling)
        return attention.c_proj(mixed.reshape(hidden.shape)), weights

    monkeypatch.setattr(modeling_gpt2.GPT2Attention, "forward", exchanged)
    [only] = trace(ALL_MODELS["gpt2"]().config).not_understood
    assert only.module == "transformer.h.0.attn.c_proj" and "are not queries, keys and values" in only.why


def test_an_attention_whose_layers_are_the_block_s_own_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    init = modeling_llama.LlamaDecoderLayer.__init__

    def flattened(block: Any, *args: Any, **more: Any) -> None:
        init(block, *args, **more)
        attention = block._modules.pop("self_attn")
        for name, layer in attention.named_children():
            block.add_module(name, layer)
        object.__setattr__(block, "self_attn", attention)  # no sub-module, but called

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", flattened)
    [only] = trace(ALL_MODELS["llama"]().config).not_understood
    assert only.module == "model.layers.0.o_proj" and only.why.endswith("are in no module of their own")


def test_blocks_that_hold_other_weights_are_named() -> None:
    config = config_of("lfm2", layer_types=["full_attention", "conv"])
    [first] = [each for each in trace(config).not_understood if each.module == "model.layers.1"]
    assert first.why.startswith("it holds other weights than model.layers.0: ")


def test_a_model_that_cannot_be_made_is_a_sentence() -> None:
    config = config_of("starcoder2")
    config.hidden_act = "nope"
    with pytest.raises(InputError, match="a starcoder2 model cannot be made and run to trace it: 'nope'"):
        trace(config)


# -- drafts that are wrong


@functools.cache
def llama() -> tuple[PretrainedConfig, Draft]:
    config = tiny_llama().config
    return config, trace(config)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a producer is left out": ({"mlp_producers": ("mlp.gate_proj",)}, "it names"),
    "layers of other inputs in one stage": (
        {
            "stages": (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
            )
        },
        "self_attn.o_proj does not read what self_attn.q_proj reads",
    ),
    "stages in another order": (
        {
            "stages": (
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
            )
        },
        "the layers run in the order",
    ),
    "rows that lie otherwise": ({"rows_of_unit": 2}, "removed units mlp do not equal units whose columns are zero"),
    "values in place of queries": (
        {"query": "self_attn.v_proj", "value": "self_attn.q_proj"},
        "removed units kv-groups do not equal units whose columns are zero",
    ),
    "a field that is none of the width": ({"mlp_width": "max_position_embeddings"}, "removed units mlp do not equal"),
    "a norm that is left out": ({"after_blocks": ()}, "the logits do not follow from the output of the last block"),
    "a factor that is none": ({"logits_factor": "num_attention_heads"}, "the logits do not follow"),
    "other blocks": ({"blocks": "model"}, "the blocks are model.layers, and not model"),
    "a module that is not there": ({"after_blocks": ("model.nom",)}, "no model can be read by it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_draft_that_is_wrong_breaks_a_law(name: str) -> None:
    changed, sentence = WRONG[name]
    config, draft = llama()
    check_laws(draft, config)
    with pytest.raises(InputError, match=f"the architecture file of llama is wrong: .*{sentence}"):
        check_laws(replace(draft, **changed), config)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "does not hold fields and values"),
        ({"model_type": "llama", "colour": "red"}, "has an unknown field 'colour'"),
        ({"model_type": "llama"}, "has an invalid blocks"),
    ],
)
def test_data_that_is_no_draft(data: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Draft.from_dict(data, "the file")


def test_a_draft_of_another_kind_is_refused() -> None:
    _, draft = llama()
    with pytest.raises(InputError, match="describes llama models, and this one is a glm4"):
        draft.put_into(config_of("glm4"))
