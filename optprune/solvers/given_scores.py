"""Experts by scores that a user gives, such as statistics of the router on a text of his own, and their file."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.errors import InputError
from optprune.problems import ExpertChoice
from optprune.solvers.experts import ExpertScore
from optprune.system.files import read_json
from optprune.system.wording import counted, shown

EXAMPLE = '{"scores": {"0": [0.5, 0.1, 0.4]}}'


@final
@dataclass(frozen=True)
class GivenScores(ExpertScore):
    """Keep the experts with the largest of the scores that are given for their block.

    Only the order within a block counts. The text of the run measures what the choice costs, and decides nothing.
    """

    scores: Mapping[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])
    """for each block with experts, by its number, a score of at least 0 for each expert; a recipe may name a file"""
    block: int | None = None
    """the block whose experts are chosen; None before a run, and where the scores are of one block"""

    def __post_init__(self) -> None:
        for number, scores in self.scores.items():
            for expert, score in enumerate(scores):
                if not (math.isfinite(score) and score >= 0):
                    raise InputError(
                        f"the score of expert {expert} of block {number} is {score:g}: give finite numbers of at least "
                        "0, where the largest experts stay"
                    )

    @classmethod
    def read(cls, file: str | Path) -> "GivenScores":
        """Return the scores in a JSON file: an object whose `scores` has a list of numbers for each block.

        The keys are the numbers of the blocks that have experts. An `about` may say where the scores come from.
        """
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the file of expert scores {file} cannot be read: {error}") from error
        try:
            return cls(_listed(read_json(text, "it")))
        except InputError as error:
            raise InputError(f"the file of expert scores {file} cannot be used: {error}") from error

    def to_json(self, about: str = "") -> str:
        """Return the text of a file that `read` reads, with a line for each block."""
        lines = (f'    "{number}": {json.dumps(list(scores))}' for number, scores in self.scores.items())
        return f'{{\n  "about": {json.dumps(about)},\n  "scores": {{\n' + ",\n".join(lines) + "\n  }\n}\n"

    def of_block(self, block: int) -> "GivenScores":
        return replace(self, block=block)

    def refusal(self, experts: Sequence[int]) -> str | None:
        having = {number: count for number, count in enumerate(experts) if count}
        for number, count in having.items():
            if number not in self.scores:
                return f"the expert scores lack block {number}: give a score for each of its {count} experts"
        for number, scores in self.scores.items():
            if number not in having:
                what = "has no experts" if number < len(experts) else f"is not among the {len(experts)} of the model"
                return f"the expert scores name block {number}, which {what}: leave it out"
            if len(scores) != having[number]:
                return (
                    f"the expert scores of block {number} are {counted(len(scores), 'number')}, and it has "
                    f"{having[number]} experts: give one for each"
                )
        return None

    def score(self, problem: ExpertChoice) -> Float[Tensor, "experts"]:
        [scores] = self.scores.values() if self.block is None else [self.scores[self.block]]
        return torch.tensor(scores, dtype=torch.float64, device=problem.logits.device)


def _listed(content: object) -> dict[int, tuple[float, ...]]:
    """Return the scores by block in the content of a file."""
    fields = cast("dict[str, object]", content) if isinstance(content, dict) else {}
    scores: Any = fields.get("scores")
    if not scores or not isinstance(scores, dict):
        raise InputError(f"it has no object 'scores' with a list for each block: write {EXAMPLE}")
    for name in fields:
        if name not in ("scores", "about"):
            raise InputError(f"it has a field {shown(name)}, which is not known: use scores and about")
    return {_block(name): _numbers(name, each) for name, each in cast("dict[str, object]", scores).items()}


def _block(name: str) -> int:
    """Return the number of a block."""
    if not re.fullmatch(r"0|[1-9]\d{0,5}", name, re.ASCII):
        raise InputError(f"{shown(name)} is not the number of a block: write {EXAMPLE}")
    return int(name)


def _numbers(block: str, scores: Any) -> tuple[float, ...]:
    """Return the scores of a block as numbers."""
    listed = cast("list[object]", scores if isinstance(scores, list) else [])
    numbers = [each for each in listed if isinstance(each, int | float) and not isinstance(each, bool)]
    if not numbers or len(numbers) < len(listed):
        raise InputError(
            f"the scores of block {block} are {shown(cast('object', scores))}, not a list of numbers: write {EXAMPLE}"
        )
    return tuple(map(_number, numbers))


def _number(score: int | float) -> float:
    """Return a number as a float, infinite where it is a whole number beyond all floats."""
    try:
        return float(score)
    except OverflowError:
        return math.inf if score > 0 else -math.inf
