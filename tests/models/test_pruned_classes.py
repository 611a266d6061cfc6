"""Pruned classes on whole blocks pass the same arguments to attention, and use the same dropout, as the stock ones."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from optprune.models import Decoder
from tests.helpers.mixed_models import mixed
from tests.helpers.tiny_models import ALL_MODELS, SLIDING, tiny_opt, tiny_qwen2

TOKENS = torch.arange(10, 42)[None]
SEEN: list[dict[str, Any]] = []
"""the arguments of a custom attention, one entry a block"""


def noted(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    SEEN.append({"mask": attention_mask, "query": query, "key": key, "value": value, **options})
    mixed = scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=attention_mask is None, scale=options["scaling"], enable_gqa=True
    )
    return mixed.transpose(1, 2), None


AttentionInterface.register("noted", noted)
AttentionMaskInterface.register("noted", sdpa_mask)


def asked(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the arguments of a custom attention, block by block."""
    SEEN.clear()
    Decoder(model)  # which has experts one by one, so that they add up in the same order
    model.set_attn_implementation("noted")
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    return list(SEEN)


def as_pruned(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same model with whole blocks of the pruned classes."""
    model = copy.deepcopy(model)
    decoder = Decoder(model)
    for block in range(len(decoder.blocks)):
        decoder.take_classes(decoder.architecture.pruned, block)
    return model


def sliding() -> PreTrainedModel:
    return tiny_qwen2(num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2, **SLIDING)


@pytest.mark.parametrize("make", [*ALL_MODELS.values(), sliding], ids=[*ALL_MODELS, "sliding window"])
def test_a_custom_attention_is_asked_what_the_stock_class_asks(make: Any) -> None:
    stock, pruned = asked(make()), asked(as_pruned(make()))
    assert len(stock) == len(pruned) >= 1
    for one, other in zip(stock, pruned, strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


def test_a_custom_attention_gets_the_window_of_every_block_that_is_left() -> None:
    """The first block has lost its attention, the second and the last have a window, the third has none."""
    windows = [options["sliding_window"] for options in asked(mixed(sliding()))]
    assert windows == [8, None, 8]


@pytest.mark.parametrize("make", [*ALL_MODELS.values(), sliding], ids=[*ALL_MODELS, "sliding window"])
def test_a_static_cache_holds_what_a_growing_one_does(make: Any) -> None:
    model = mixed(make() if make is sliding else make(num_hidden_layers=4)).eval()
    prompt = {"inputs": TOKENS[:, :10], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    first, second = (
        model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation=kind)
        for kind in ("dynamic", "static")
    )
    assert torch.equal(first, second)


# -- dropout


def logits(model: PreTrainedModel, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("make", "rates"),
    [
        (make, rates)
        for make, residual in (
            (ALL_MODELS["opt"], "dropout"),
            (partial(tiny_opt, do_layer_norm_before=False), "dropout"),
            (ALL_MODELS["seed_oss"], "residual_dropout"),
        )
        for rates in ({residual: 0.3}, {residual: 0.0, "attention_dropout": 0.3})
    ],
)
def test_dropout_in_training_is_that_of_the_stock_class(make: Any, rates: dict[str, float]) -> None:
    stock = make(**rates)
    stock.set_attn_implementation("eager")
    pruned = as_pruned(stock)
    assert torch.equal(logits(pruned, 0), logits(stock, 0))
    for model in (stock, pruned):
        model.train()
    assert torch.equal(logits(pruned, 0), logits(stock, 0))
    assert not torch.equal(logits(pruned, 0), logits(pruned, 1))
    pruned.eval()
    assert torch.equal(logits(pruned, 0), logits(pruned, 1))
