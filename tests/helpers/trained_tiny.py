"""A tiny model that has learned something of a real text, and one that was made from it by setting weights to zero."""

import copy
import functools

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from optprune.texts import demo_articles, tokenise
from tests.helpers.tiny_models import tiny_llama, tiny_tokenizer

LENGTH = 64


@functools.cache
def news(first: int, last: int) -> Tensor:
    """Windows [n, LENGTH] of some articles."""
    ids = tokenise(tiny_tokenizer(), demo_articles("calibration")[first:last]).long()
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@functools.cache
def _trained(steps: int) -> LlamaForCausalLM:
    model, windows = tiny_llama(), news(0, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        ids = windows[torch.randint(len(windows), (16,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return model.eval()


def trained(steps: int = 100) -> LlamaForCausalLM:
    """A copy of a tiny Llama that was trained on news."""
    return copy.deepcopy(_trained(steps))


@torch.no_grad()
def halved(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with two of four neighbouring weights zero, the smaller ones, in every linear layer of its blocks."""
    for name, weight in model.named_parameters():
        if "layers" in name and weight.ndim == 2:
            groups = weight.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0.0)
    return model
