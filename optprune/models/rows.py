"""Rows: where the queries, keys and values of a KV head are in the layers that make them, which may be one layer."""

from itertools import accumulate

import torch
from torch import Tensor

from optprune.models.architecture import BlockShape, Heads

JOINED = ("", "parts", "heads")
"""three layers; one layer, all queries before all keys before all values; one layer, head by head"""


def rows_of_heads(joined: str, heads: Heads, shape: BlockShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the queries [kv_heads, group dim], keys [kv_heads, dim] and values [kv_heads, value_dim] by head."""
    widths = (heads.group * heads.dim, heads.dim, shape.value_dim)
    head = torch.arange(shape.kv_heads, device=device)[:, None]
    before = [0, *accumulate(widths)]
    rows = []
    for width, start in zip(widths, before[:3], strict=True):
        stride, first = {
            "": (width, 0),
            "parts": (width, shape.kv_heads * start),
            "heads": (before[3], start),
        }[joined]
        rows.append(first + head * stride + torch.arange(width, device=device))
    query, key, value = rows
    return query, key, value


def counts_of_heads(joined: str, heads: Heads, keys: int, mixed: int) -> tuple[int, int]:
    """The KV heads and the value dimensions of each, by the rows of the layer of the keys and what is read behind."""
    values = mixed // heads.group
    kv_heads = (keys - values) // ((heads.group + 1) * heads.dim) if joined else keys // heads.dim
    return kv_heads, values // kv_heads
