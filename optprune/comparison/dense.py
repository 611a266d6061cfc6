"""Dense model of a comparison: where each run gets it from, and its predictions on the evaluation text."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.calibration import advance, calibrating, first_inputs
from optprune.errors import InputError
from optprune.measure import Divergence, divergence_of
from optprune.measure.evaluate import TOKENS_AT_ONCE, check_windows
from optprune.models import Decoder, LoadedModel, load_config, load_model, load_tokenizer, need_tokenizer, open_model
from optprune.models.load import Described
from optprune.models.places import States
from optprune.pruning.run import place_for


class DenseSource(ABC):
    """Source of a dense model that can be loaded several times."""

    source: str
    """the name that the user gave"""

    @abstractmethod
    def to_prune(self, scratch: Path, *, whole: bool = False) -> LoadedModel:
        """Return the dense model for one run, which may change it; with `whole`, all of it is in memory."""

    @abstractmethod
    def to_measure(self, scratch: Path, *, whole: bool = False) -> LoadedModel:
        """Return the dense model, which must not be changed."""

    @abstractmethod
    def config(self) -> PretrainedConfig:
        """Return its config."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Return its tokenizer. Raises InputError where it has none."""


@dataclass(frozen=True)
class FromFiles(DenseSource):
    """Model that is read from its files, a block at a time."""

    source: str
    dtype: str
    device: str
    architecture: Described | None = None
    """draft of an unknown architecture"""

    def to_prune(self, scratch: Path, *, whole: bool = False) -> LoadedModel:
        if whole:
            return load_model(self.source, dtype=self.dtype, device=self.device, architecture=self.architecture)
        return open_model(
            self.source, dtype=self.dtype, device=self.device, scratch=scratch, architecture=self.architecture
        )

    def to_measure(self, scratch: Path, *, whole: bool = False) -> LoadedModel:
        return self.to_prune(scratch, whole=whole)

    def config(self) -> PretrainedConfig:
        return load_config(self.source, self.architecture)

    def tokenizer(self) -> Tokenizer:
        return need_tokenizer(load_tokenizer(self.source), self.source)


@dataclass(frozen=True, eq=False)
class InMemory(DenseSource):
    """Model in memory, of which each run gets a copy."""

    loaded: LoadedModel

    def __post_init__(self) -> None:
        if self.loaded.store is not None:
            raise InputError(
                f"the blocks of {self.loaded.source} are not in memory: give the name of the model instead"
            )

    @property
    def source(self) -> str:  # type: ignore[override]
        return self.loaded.source

    def to_prune(self, scratch: Path, *, whole: bool = False) -> LoadedModel:
        return LoadedModel(copy.deepcopy(self.loaded.model), self.loaded.tokenizer, self.loaded.source)

    def to_measure(self, scratch: Path, *, whole: bool = False) -> LoadedModel:
        return self.loaded

    def config(self) -> PretrainedConfig:
        return self.loaded.model.config

    def tokenizer(self) -> Tokenizer:
        return need_tokenizer(self.loaded.tokenizer, self.loaded.source)


def dense_source(
    model: str | Path | LoadedModel, dtype: str, device: str, architecture: Described | None = None
) -> DenseSource:
    """Return the source of a model that is named, or is in memory and must not be changed."""
    return InMemory(model) if isinstance(model, LoadedModel) else FromFiles(str(model), dtype, device, architecture)


class DensePredictions:
    """Predictions of a dense model on independent windows of token ids [n, length].

    The hidden states after the last block [n, length, hidden] are kept in memory or in a file; the head computes logits
    from them again, which over the whole vocabulary would be many times as large.
    """

    def __init__(self, decoder: Decoder, windows: Tensor, folder: Path | None = None) -> None:
        """Run the model once. A file of the hidden states may be put into `folder`."""
        check_windows(windows)
        self.decoder, self.windows, self._folder = decoder, windows, folder
        self._batches = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))
        self._ends = self._last_states(decoder)

    def divergence_to(self, decoder: Decoder) -> Divergence:
        """Return the divergence of another model from the dense one; its blocks may be read one at a time.

        Raises NumericalError where it gives NaN.
        """
        return self._compared(decoder, self._last_states(decoder))

    def itself(self) -> Divergence:
        """Return the dense model's perplexity, with a divergence of 0 and an agreement of 1."""
        return self._compared(self.decoder, self._ends)

    def _last_states(self, decoder: Decoder) -> States[Tensor]:
        """Return the outputs of the last block, by batch."""
        decoder.states = place_for("auto", decoder, self._batches, self._folder)
        with calibrating(decoder):
            stream = first_inputs(decoder, self._batches)
            for index in range(len(decoder.blocks)):
                with decoder.resident(index) as block:
                    advance(block, stream)
        return stream.hidden

    def _compared(self, decoder: Decoder, ends: Sequence[Tensor]) -> Divergence:
        dense = self.decoder
        with calibrating(decoder), calibrating(dense), decoder.head_in_dtype(), dense.head_in_dtype(), torch.no_grad():
            pairs = zip(ends, self._ends, strict=True)
            logits = ((decoder.logits(found), dense.logits(expected)) for found, expected in pairs)
            return divergence_of(self.windows, logits)
