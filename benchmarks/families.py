"""The study `families` as one table: the same recipes on models of several families, side by side."""

import math
from typing import Any

from benchmarks.common import markdown
from benchmarks.models import read
from benchmarks.studies import DENSE, STUDIES, Case, rows_of

TOKENS = 8192
"""the calibration tokens"""
MODELS = {"SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct", "gemma-3-270m.gguf": "Gemma 3 270M"}
"""the models by the names of their rows, and what they are called"""
UNITS, HALF, PAIRS = "whole units, 20%", "weights, 50%", "weights, 2:4"


class Families:
    """Perplexity on held-out news of seed 0 and, in brackets, its logarithm over that of the dense model."""

    def markdown(self) -> str:
        """The table; a cell that was not run is empty."""
        dense = {name: _news(name, DENSE) or math.nan for name in MODELS}
        lines = [{"removed": "", "recipe": "the dense model"} | {MODELS[name]: f"{dense[name]:.1f}" for name in MODELS}]
        for recipe, settings in STUDIES["families"]:
            cells = {MODELS[name]: _cell(_news(name, (recipe, settings)), dense[name]) for name in MODELS}
            lines.append({"removed": _removed(settings), "recipe": f"`{recipe}`{_changed(settings)}"} | cells)
        return markdown(lines).rstrip("\n")


def _news(model: str, case: Case) -> float | None:
    """The perplexity of a case with seed 0 on a model's news; None where it was not run."""
    return next((row["news"] for row in rows_of(read(), model, case, TOKENS) if row["seed"] == 0), None)


def _cell(perplexity: float | None, dense: float) -> str:
    return "" if perplexity is None else f"{perplexity:.1f} ({math.log(perplexity / dense):.2f})"


def _changed(settings: dict[str, Any]) -> str:
    """In which settings a case differs from its recipe."""
    units = {"rotated-all": ", rotary pairs stay", "all": ", coordinates"}
    clipped = ", not clipped" if "metric.clip" in settings else ""
    policy = f", under `{settings['propagation']}`" if "propagation" in settings else ""
    return units.get(settings.get("units", ""), "") + clipped + policy


def _removed(settings: dict[str, Any]) -> str:
    if "units.weights" not in settings:
        return UNITS
    return PAIRS if settings["units.weights"] == "2:4" else HALF
