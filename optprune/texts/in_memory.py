"""Calibration that a caller holds: the name of a text, texts, or token batches, told apart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError
from optprune.system.wording import counted
from optprune.texts.calibration import DrawnWindows, Text, draw_windows, read_texts
from optprune.texts.documents import Conversation
from optprune.texts.token_batches import token_batches

KINDS = "name a text, or give a list of texts, token batches or a DataLoader of them"


@dataclass(frozen=True, eq=False)
class GivenCalibration:
    """Texts, or else the windows that token batches are."""

    name: str
    texts: tuple[Text, ...] = ()
    windows: DrawnWindows | None = None

    @classmethod
    def of(cls, given: Any) -> "GivenCalibration":
        """Return a calibration that is the name of a text, texts, or token batches; InputError for another kind."""
        if isinstance(given, str | Path):
            return cls(str(given), tuple(read_texts(str(given))))
        if not isinstance(given, Iterable):
            raise InputError(f"the calibration cannot be of type {type(given).__name__}: {KINDS}")
        items = given if isinstance(given, Mapping | Tensor) else list(given)
        if isinstance(items, list) and items and isinstance(items[0], str | Conversation):
            name = f"{counted(len(items), 'text')} of the caller"
            return cls(name, (Text(name, items),))
        batches = token_batches(items)
        count, tokens = sum(map(len, batches)), sum(batch.numel() for batch in batches)
        name = f"{counted(count, 'sequence')} of the caller, {counted(tokens, 'token')}"
        return cls(name, windows=DrawnWindows(batches, batches[0][0], (count,), name))  # type: ignore[arg-type]

    @property
    def size(self) -> dict[str, int]:
        """The number and the largest length of the windows of token batches; nothing of texts."""
        if self.windows is None:
            return {}
        batches = self.windows.batches
        return {"samples": sum(map(len, batches)), "seq_length": max(batch.shape[1] for batch in batches)}

    def drawn(
        self, tokenizer: Tokenizer | None, samples: int, seq_length: int, seed: int, sequences: str
    ) -> DrawnWindows:
        """Return the windows, those of texts by a tokenizer, as in `draw_windows`."""
        if self.windows is not None:
            return self.windows
        if tokenizer is None:
            raise InputError("texts are read by the model's tokenizer: give it as `tokenizer`, or give token batches")
        return draw_windows(tokenizer, self.texts, samples, seq_length, seed, sequences=sequences)
