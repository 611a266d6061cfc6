"""A tiny model with a tokenizer, and two texts without an article in common: what comparisons are made of."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optprune.models import LoadedModel
from optprune.texts import demo_articles
from tests.helpers.tiny_models import save_tiny, tiny_llama, tiny_tokenizer

SMALL: dict[str, Any] = {"samples": 8, "seq_length": 64, "windows": 3}


@dataclass(frozen=True)
class TwoTexts:
    """A model folder, a text to calibrate on and one to evaluate on."""

    model: Path
    calibration: Path
    text: Path

    @classmethod
    def into(cls, folder: Path) -> "TwoTexts":
        articles = demo_articles("calibration")
        files = folder / "fitted.jsonl", folder / "told.jsonl"
        for file, documents in zip(files, (articles[:6], articles[6:9]), strict=True):
            file.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
        return cls(save_tiny(tiny_llama(), folder / "model"), *files)

    def asked(self, **more: Any) -> dict[str, Any]:
        """The options of a small comparison."""
        return {"calibration": str(self.calibration), "text": str(self.text), **SMALL, **more}


def loaded() -> LoadedModel:
    """The same model in memory."""
    return LoadedModel(tiny_llama().eval(), tiny_tokenizer(), "tiny")
