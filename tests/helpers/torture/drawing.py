"""Drawing an input: the command, what it may write, and the means by which kinds of inputs are made."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.helpers.torture.sandbox import Sandbox
from tests.helpers.torture.spoil import Spoiler
from tests.helpers.torture.stock import Stock
from tests.helpers.torture.words import listed

FAILED = 2
"""the exit status of a command that refuses what it was given"""


@dataclass(frozen=True)
class Case:
    """A command with a malformed input, and what may come of it."""

    words: list[str]
    output: Path | None = None
    """the file or folder that it may write"""
    kind: str | None = None
    """what the output is: a name in `calls.LOADS`"""
    files: dict[Path, str] = field(default_factory=dict)
    """other files that it may write, and what they are"""
    statuses: tuple[int, ...] = (0, FAILED)
    run: Path | None = None
    """the run folder that it may go on with, or leave where it is stopped"""
    whole: Path | None = None
    """the output that a run which goes on must come to"""
    strays: tuple[Path, ...] = ()
    """files of somebody else in the run folder, or in the place of the output"""
    code: str | None = None
    """a program in Python, in place of a command"""
    first: tuple["Case", ...] = ()
    """what is tried before it in the same sandbox, and judged as it is"""
    checks: tuple[tuple[str, dict[str, Any]], ...] = ()
    """what else is looked at where it succeeds: names in `checks.CHECKS`, with what these are given"""
    named: tuple[str, ...] = ()
    """what the sentence of a refusal must hold"""


class Drawn:
    """A sandbox, the stock it is filled from, and the source of random numbers."""

    def __init__(self, sandbox: Sandbox, stock: Stock, rng: random.Random) -> None:
        self.sandbox, self.stock, self.rng, self.spoil = sandbox, stock, rng, Spoiler(rng)
        self.words = stock.words()

    @property
    def output(self) -> Path:
        return self.sandbox.output

    @property
    def run(self) -> Path:
        return self.output.with_name(f"{self.output.name}.run")

    def model(self, source: Path | None = None) -> Path:
        """A copy of a model among the inputs, which the commands read from now on."""
        copied = self.sandbox.copied(source or self.rng.choice([self.stock.model, self.stock.pruned]), "model")
        self.words = replace(self.words, model=copied, pruned=copied)
        return copied

    def pruned(self) -> Path:
        """A copy of the pruned model, which is read in its place."""
        copied = self.sandbox.copied(self.stock.pruned)
        self.words = replace(self.words, pruned=copied)
        return copied

    def prune(self, *more: str, **options: Any) -> Case:
        return Case(self.words.prune(self.output, *more, **options), self.output, "pruned", run=self.run)

    def plan(self, *more: str, **options: Any) -> Case:
        return Case(self.words.plan(*self._probe(), *more, **options))

    def heal(self, *more: str, **options: Any) -> Case:
        return Case(self.words.heal(self.output, *more, **options), self.output, "model", run=self.run)

    def compare(self, *more: str, **options: Any) -> Case:
        words = self.words.compare(self.output, *more, **options)
        return Case(words, self.output, "comparison", statuses=(0, 1, FAILED), run=self.output)

    def evaluate(self, *more: str, **options: Any) -> Case:
        return self._with_json(self.words.evaluate(*more, **options))

    def evaluate_against(self, *more: str, **options: Any) -> Case:
        against = {"against": self.stock.model} | options
        return self._with_json(self.words.evaluate(*more, **against))

    def audit(self, *more: str, **options: Any) -> Case:
        # An audit that finds faults tells of them, and ends with 1.
        return replace(self._with_json(self.words.audit(*more, **options)), statuses=(0, 1, FAILED))

    def report(self, *more: str, **options: Any) -> Case:
        page = self.output.with_suffix(".html")
        return Case(self.words.report("--output", str(page), *more, **options), page, "page")

    def export_gguf(self, *more: str, **options: Any) -> Case:
        kind = {"type": self.rng.choice(["f32", "f16", "q8_0"])}
        return Case(self.words.export(self.output, *more, **kind | options), self.output, "gguf")

    def export_onnx(self, *more: str, **options: Any) -> Case:
        return Case(self.words.export(self.output, *more, **{"format": "onnx"} | options), self.output, "onnx")

    def program(self, code: str, *, files: dict[Path, str] | None = None, **more: Any) -> Case:
        """A program that uses the library, and says something where it succeeds."""
        return Case([], code=code, files=files or {}, **more)

    def reading(self) -> Case:
        """A command that reads the model."""
        return self.rng.choice(READING)(self)

    def export_packed(self) -> Case:
        return Case(self.words.export(self.output, format="compressed-tensors"), self.output, "config")

    def frontier(self, *more: str, **options: Any) -> Case:
        return Case(self.words.frontier(self.output, *more, **options), self.output, "frontier")

    def problems(self, *more: str, **options: Any) -> Case:
        case = Case(self.words.problems(self.output, *more, **options), self.output)
        return replace(case, checks=(("problems", {"folder": str(self.output)}),))

    def experts(self, model: Path, texts: list[str], scores: Path | None, options: dict[str, Any]) -> Case:
        """The use of experts by texts, with the file of scores where it is asked for."""
        words = ["experts", str(model), *(word for text in texts for word in ("--text", text)), *listed(options)]
        if scores is None:
            return self._with_json(words)
        checks = (("scores", {"file": str(scores)}),)
        return Case([*words, "--scores", str(scores)], files={scores: "json"}, checks=checks)

    def _with_json(self, words: list[str]) -> Case:
        if self.rng.random() < 0.5:
            return Case(words)
        file = self.output.with_name("found.json")
        return Case([*words, "--json", str(file)], files={file: "json"})

    def _probe(self) -> list[str]:
        return self.rng.choice([[], ["--no-probe"], ["--output", str(self.output)]])


READING: list[Callable[[Drawn], Case]] = [
    Drawn.prune,
    Drawn.plan,
    Drawn.heal,
    Drawn.evaluate,
    Drawn.evaluate_against,
    Drawn.audit,
    Drawn.export_gguf,
    Drawn.compare,
]
"""the commands that read a model"""


def damaged_json(drawn: Drawn, file: Path) -> None:
    """Spoil a JSON file of a run, so that it may still be JSON; one that is spoiled already stays."""
    try:
        data = json.loads(file.read_text())
    except ValueError:
        return
    if isinstance(data, dict) and data and drawn.rng.random() < 0.3:
        key = drawn.rng.choice(list(data))
        data[key] = drawn.spoil.value()
        file.write_text(json.dumps(data))
    else:
        drawn.spoil.json(file, top=0.5)
