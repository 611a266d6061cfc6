"""A trained tiny model with its tokenizer, and the bits per byte of articles by a model with any tokenizer."""

import copy
import math

import torch
from transformers import PreTrainedModel

from optprune.models import LoadedModel
from tests.helpers.tiny_models import tiny_tokenizer

KEEP = 380
"""the tokens that stay"""


def bits_per_byte(loaded: LoadedModel, articles: list[str]) -> float:
    """The bits of the beginnings of articles for each byte, with a special token before each."""
    bits, count = 0.0, 0
    for article in articles:
        text, tokenizer = article[:300], loaded.tokenizer
        assert tokenizer is not None
        ids = torch.tensor([tokenizer(f"<s>{text}")["input_ids"]])
        with torch.no_grad():
            scores = loaded.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        bits -= float(scores.gather(1, ids[0, 1:, None]).sum()) / math.log(2)
        count += len(text.encode())
    return bits / count


def loaded(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(copy.deepcopy(model), tiny_tokenizer(), "tiny")
