"""The check of an exported graph: ONNX Runtime's logits on the CPU beside those of transformers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""the variable that ONNX Runtime reads when it is imported: unless it is 1, it sends events, and writes an id of the
machine into the home directory"""
SIZES = ((1, 32, 0), (3, 17, 4))
"""the batch, the length, and the padding before the first text, of what is compared"""


def difference_of(file: Path, model: PreTrainedModel, cache: bool) -> float:
    """The largest difference of logits between a graph and its model, which is in float32 and in evaluation mode.

    The second batch begins with padding. With a `cache` the graph reads a text in three parts, the first without
    anything before it and the last of one token, and transformers reads it at once. NaN where the graph gives NaN.
    """
    session = _session(file)
    found = [_largest(session, model, cache, ids, mask) for ids, mask in _texts(model)]
    return float(torch.tensor(found).max())


def without_telemetry() -> None:
    """Have ONNX Runtime write and send nothing: call it before anything imports onnxruntime."""
    os.environ[TELEMETRY] = "1"


def _session(file: Path) -> Any:
    without_telemetry()
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # where somebody else has imported it first
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _texts(model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids [batch, length] drawn from the vocabulary, and which of them are not padding."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, limit = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    for batch, most, padding in SIZES:
        length = min(most, limit or most)
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : min(padding, length - 1)] = 0
        yield torch.randint(vocabulary, (batch, length), generator=generator), mask


def _largest(session: Any, model: PreTrainedModel, cache: bool, ids: Tensor, mask: Tensor) -> float:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        # Where nothing is padding, transformers numbers the positions by itself.
        own = {"attention_mask": mask, "position_ids": positions} if not bool(mask.all()) else {}
        expected = model(input_ids=ids, use_cache=False, **own).logits
    length = ids.shape[1]
    ends = sorted({length // 2, length - 1, length} - {0}) if cache else [length]
    parts, past, begin = list[Tensor](), _nothing(session, len(ids)), 0
    names = [output.name for output in session.get_outputs()]
    for end in ends:
        feed = {
            "input_ids": ids[:, begin:end].numpy(),
            "attention_mask": mask[:, :end].numpy(),
            "position_ids": positions[:, begin:end].numpy(),
        }
        given = dict(zip(names, session.run(names, feed | past), strict=True))
        parts.append(torch.from_numpy(given.pop("logits")))
        past = {name.replace("present", "past_key_values", 1): value for name, value in given.items()}
        begin = end
    return float((torch.cat(parts, dim=1) - expected)[mask.bool()].abs().max())


def _nothing(session: Any, batch: int) -> dict[str, Any]:
    """Keys and values of no tokens at all."""
    past = [one for one in session.get_inputs() if one.name.startswith("past_key_values.")]
    return {one.name: torch.zeros(batch, one.shape[1], 0, one.shape[3]).numpy() for one in past}
