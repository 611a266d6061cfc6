"""Importance of the inputs of layers, llama.cpp's importance matrix, measured on a calibration text."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from optprune.calibration.input_squares import mean_squares
from optprune.models import LoadedModel, need_tokenizer, open_model
from optprune.texts import draw_windows, read_texts


@dataclass(frozen=True, eq=False)
class Importance:
    """Mean squares of the inputs of every layer of the blocks: errors of a weight's columns count by them.

    They are the diagonals of the Gram matrices E[x x^T], as in the importance matrix of llama.cpp's llama-imatrix.
    Embeddings and the head have none, as there.
    """

    squares: Mapping[str, Tensor]
    """[in] for each layer, by its name in the model"""
    text: str
    """the calibration text"""


def importance_of(
    model: str | Path | LoadedModel,
    calibration: str,
    *,
    samples: int = 128,
    seq_length: int = 2048,
    sequences: str = "packed",
    seed: int = 0,
    device: str = "auto",
) -> Importance:
    """Return the importance of a model's inputs on windows of a calibration text, which is as for `read_texts`.

    The model is a source of `load_model`, read a block at a time, or a loaded one. Windows are drawn as for `prune`.
    """
    with tempfile.TemporaryDirectory(prefix="optprune-") as scratch:
        loaded = model if isinstance(model, LoadedModel) else open_model(model, device=device, scratch=Path(scratch))
        tokenizer = need_tokenizer(loaded.tokenizer, loaded.source)
        drawn = draw_windows(tokenizer, read_texts(calibration), samples, seq_length, seed=seed, sequences=sequences)
        return Importance(mean_squares(loaded.decoder(), drawn.batches), calibration)
