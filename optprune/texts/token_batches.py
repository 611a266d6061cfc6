"""Token batches as people hold them (tensors, dicts of a DataLoader, rows of a data set), as tensors without padding.

Each sequence is cut to the tokens that its attention mask keeps, so that no later pass needs a mask: padded tokens
count in no statistic, and positions begin at the first token.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.system.wording import shown

IDS, MASK = "input_ids", "attention_mask"
UNREAD = ("inputs_embeds", "pixel_values", "position_ids")
"""inputs of a model that would change what the token ids mean"""
FORM = "give tensors of token ids [batch, length], of whole numbers, or dicts of input_ids and attention_mask"
NO_BATCH = "there are no calibration batches: give at least one tensor of token ids [batch, length]"


def token_batches(batches: Any) -> list[Tensor]:
    """Return the token ids [batch, length] of batches, without padding; InputError where one is no batch.

    A batch is a tensor, or a mapping with `input_ids` and perhaps an `attention_mask` (tensors, or lists of one or
    several sequences). One tensor or mapping is one batch, and a DataLoader is read once. Sequences that lose their
    padding stay in order, those of one length beside each other in one tensor.
    """
    alone = isinstance(batches, Mapping) or (isinstance(batches, Tensor) and batches.ndim == 2)
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise InputError(f"the batches cannot be {_kind(batches)}: {FORM}")
    found = list[Tensor]()
    for number, batch in enumerate([batches] if alone else batches):
        if isinstance(batch, Mapping):
            found += _of_mapping(batch, number)
        elif not isinstance(batch, Tensor) or batch.ndim != 2 or not _whole_numbers(batch):
            raise InputError(f"batch {number} is {_kind(batch)}: {FORM}")
        elif not batch.numel():
            raise InputError(f"batch {number} is {_kind(batch)}, which holds no token: leave it out")
        else:
            found.append(batch)
    if not found:
        raise InputError(NO_BATCH)
    return found


def _of_mapping(batch: Mapping[str, Any], number: int) -> list[Tensor]:
    """Return the sequences of a mapping without padding, in as few tensors as their order allows."""
    if IDS not in batch:
        names = ", ".join(map(str, batch)) or "nothing"
        raise InputError(f"batch {number} has no {IDS} (it has {shown(names)[1:-1]}): {FORM}")
    for name in UNREAD:
        if batch.get(name) is not None:
            raise InputError(f"batch {number} has {name}, which pruning does not read: leave it out, or give a text")
    ids, mask = _sequences(batch[IDS], number, IDS), batch.get(MASK)
    kept = [torch.ones_like(row) for row in ids] if mask is None else _sequences(mask, number, MASK)
    if [len(row) for row in ids] != [len(row) for row in kept]:
        raise InputError(f"the {MASK} of batch {number} has another shape than its {IDS}: give a 0 or 1 for each token")
    rows = [_without_padding(row, one, number) for row, one in zip(ids, kept, strict=True)]
    rows = [row for row in rows if len(row)]
    if not rows:
        raise InputError(f"batch {number} holds no token: leave it out")
    return [torch.stack(list(alike)) for _, alike in groupby(rows, len)]


def _sequences(value: Any, number: int, name: str) -> list[Tensor]:
    """Return the sequences of a tensor, an array, or a list of one or several sequences."""
    try:
        if isinstance(value, Sequence) and value and isinstance(value[0], Sequence | Tensor):
            rows = [torch.as_tensor(row) for row in value]
        else:
            whole = torch.as_tensor(value)
            rows = list(whole if whole.ndim > 1 else whole[None])
    except (TypeError, ValueError, RuntimeError, IndexError):
        rows = list[Tensor]()
    right = all(row.ndim == 1 and (name == MASK or not len(row) or _whole_numbers(row)) for row in rows)
    if not rows or not right:
        raise InputError(f"the {name} of batch {number} cannot be {_kind(value)}: {FORM}")
    return rows


def _without_padding(row: Tensor, mask: Tensor, number: int) -> Tensor:
    """Return the tokens that a mask keeps; InputError where these are not one sequence."""
    kept = mask.nonzero().flatten().tolist()
    if bool(((mask != 0) & (mask != 1)).any()):
        raise InputError(f"the {MASK} of batch {number} holds values other than 0 and 1: give a 0 or 1 for each token")
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise InputError(
            f"the {MASK} of batch {number} leaves tokens out between others: give sequences with padding at their "
            "beginning or end only"
        )
    return row[kept[0] : kept[-1] + 1] if kept else row[:0]


def _whole_numbers(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int32, torch.int64)


def _kind(value: Any) -> str:
    """Return in words what a value is."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} of shape {list(value.shape)}"
    return f"the text {shown(value)}" if isinstance(value, str) else type(value).__name__
