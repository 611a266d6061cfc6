"""The study `families` as one table: the same recipes on models of several families, side by side."""

import math
from typing import Any

from benchmarks.common import markdown
from benchmarks.models import read
from benchmarks.studies import STUDIES, digest

TOKENS = 8192
"""the calibration tokens"""
MODELS = {"SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct", "gemma-3-270m.gguf": "Gemma 3 270M"}
"""the models by the names of their rows, and what they are called"""
UNITS, HALF, PAIRS = "whole units, 20%", "weights, 50%", "weights, 2:4, `intra`"


class Families:
    """Perplexity on held-out news of seed 0 and, in brackets, its logarithm over that of the dense model."""

    def markdown(self) -> str:
        """The table; a cell that was not run is empty."""
        rows = read()
        dense = {row["model"]: row["news"] for row in rows if row["recipe"] == "dense"}
        lines = [{"removed": "", "recipe": "the dense model"} | {MODELS[name]: f"{dense[name]:.1f}" for name in MODELS}]
        for recipe, settings in STUDIES["families"]:
            found = {
                row["model"]: row["news"]
                for row in rows
                if (row["digest"], row["tokens"], row["seed"]) == (digest(recipe, settings, TOKENS), TOKENS, 0)
            }
            cells = {MODELS[name]: _cell(found.get(name), dense[name]) for name in MODELS}
            lines.append({"removed": _removed(settings), "recipe": f"`{recipe}`"} | cells)
        return markdown(lines).rstrip("\n")


def _cell(perplexity: float | None, dense: float) -> str:
    return "" if perplexity is None else f"{perplexity:.1f} ({math.log(perplexity / dense):.2f})"


def _removed(settings: dict[str, Any]) -> str:
    if "pattern" not in settings:
        return UNITS
    return PAIRS if settings["pattern"] == "2:4" else HALF
