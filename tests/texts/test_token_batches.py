"""Token batches in the forms that people have them in: padding is cut, and what is no batch gets a sentence."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from optprune.errors import InputError
from optprune.texts.token_batches import token_batches

ROWS = [[5, 6, 7], [8, 9], [10, 11]]
LEFT = {"input_ids": [[5, 6, 7], [0, 8, 9], [0, 10, 11]], "attention_mask": [[1, 1, 1], [0, 1, 1], [0, 1, 1]]}
RIGHT = {"input_ids": [[5, 6, 7], [8, 9, 0], [10, 11, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0], [1, 1, 0]]}


def tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in batch.items()}


@pytest.mark.parametrize(
    "given",
    [
        [tensors(LEFT)],
        [tensors(RIGHT)],
        tensors(RIGHT),
        BatchEncoding(tensors(LEFT)),
        LEFT,
        {"input_ids": ROWS},
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ROWS],
        [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ROWS],
        [{name: np.array(value) for name, value in RIGHT.items()}],
        ({**tensors(LEFT), "attention_mask": torch.tensor(LEFT["attention_mask"]).bool()} for _ in range(1)),
    ],
    ids=["left", "right", "alone", "encoding", "lists", "ragged", "rows", "labels", "arrays", "generator"],
)
def test_padding_is_cut(given: Any) -> None:
    assert [row.tolist() for batch in token_batches(given) for row in batch] == ROWS


def test_sequences_of_one_length_stay_together() -> None:
    assert [list(batch.shape) for batch in token_batches([tensors(LEFT)])] == [[1, 3], [2, 2]]
    whole = torch.arange(12).view(3, 4)
    [batch] = token_batches({"input_ids": whole, "attention_mask": torch.ones(3, 4)})
    assert torch.equal(batch, whole)


def test_a_loader_of_dicts_is_read_once() -> None:
    rows = [{"input_ids": torch.tensor([n, n + 1]), "attention_mask": torch.tensor([1, int(n != 2)])} for n in range(4)]
    loader = DataLoader(rows, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    found = sorted(row.tolist() for batch in token_batches(loader) for row in batch)
    assert found == [[0, 1], [1, 2], [2], [3, 4]]


IDS = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("some text", "the batches cannot be the text 'some text': give tensors of token ids"),
        (7, "the batches cannot be int: give tensors"),
        (["some text"], "batch 0 is the text 'some text': give tensors"),
        ([(IDS, IDS)], "batch 0 is tuple: give tensors"),
        ({"text": ["a"]}, r"batch 0 has no input_ids \(it has text\): give tensors"),
        ([{}], r"batch 0 has no input_ids \(it has nothing\)"),
        ([{"input_ids": IDS.float()}], r"the input_ids of batch 0 cannot be a torch.float32 of shape \[2, 4\]"),
        ([{"input_ids": IDS[None]}], r"the input_ids of batch 0 cannot be a torch.int64 of shape \[1, 2, 4\]"),
        ([{"input_ids": "text"}], "the input_ids of batch 0 cannot be the text 'text'"),
        ([{"input_ids": IDS, "attention_mask": IDS[:, :3]}], "the attention_mask of batch 0 has another shape"),
        ([{"input_ids": IDS, "attention_mask": 2 * IDS}], "holds values other than 0 and 1"),
        ([{"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 1, 1]] * 2)}], "leaves tokens out between others"),
        ([{"input_ids": IDS, "attention_mask": 0 * IDS}], "batch 0 holds no token: leave it out"),
        ([{"input_ids": IDS, "pixel_values": IDS}], "batch 0 has pixel_values, which pruning does not read"),
        ([{"input_ids": IDS, "position_ids": IDS}], "batch 0 has position_ids, which pruning does not read"),
        ([], "there are no calibration batches"),
    ],
)
def test_what_is_no_batch_is_refused(given: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        token_batches(given)
    assert "\n" not in str(caught.value)
