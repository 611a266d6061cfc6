"""The suite of malformed inputs: each is drawn from a seed and a number, tried in a sandbox, and judged."""

import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.torture.children import Children, Told
from tests.helpers.torture.drawing import Case, Drawn
from tests.helpers.torture.judge import judged
from tests.helpers.torture.kinds import KINDS
from tests.helpers.torture.sandbox import Sandbox
from tests.helpers.torture.stock import Stock


@dataclass(frozen=True)
class Tried:
    """An input that was tried."""

    seed: int
    number: int
    kind: str
    case: Case
    told: Told
    faults: list[str]

    def __str__(self) -> str:
        """The faults, the command, and how to try it again."""
        lines = [f"{self.kind}, seed {self.seed}, input {self.number}:"]
        lines += [f"  fault: {each}" for each in self.faults]
        for case in (*self.case.first, self.case):
            lines += [f"  command: optprune {' '.join(map(repr, case.words))}"] if case.code is None else []
            lines += [f"  program: {line}" for line in (case.code or "").splitlines()]
        lines += [f"  again: python -m tests.helpers.torture --seeds {self.seed} --inputs {self.number}"]
        return "\n".join([*lines, *(f"  | {line[:600]}" for line in self.told.err.splitlines()[-4:])])


def kind_of(number: int) -> str:
    """The kind of an input: all in turn, so that one alone is the one that it is among others."""
    return list(KINDS)[number % len(KINDS)]


class Suite:
    """The stock, and a process that is forked for each input."""

    def __init__(self, folder: Path, keep: bool = False) -> None:
        """With `keep` the sandboxes stay."""
        self.folder, self.keep, self.children = folder, keep, Children()
        self.stock = Stock(folder / "stock")
        self.stock.folder.mkdir(parents=True)
        made = self.children.call("stock", folder, folder=str(self.stock.folder), longest=600)
        assert made.status == 0, made.err

    def tried(self, seed: int, numbers: Iterable[int], kinds: list[str] | None = None) -> Iterator[Tried]:
        """Try inputs one after the other, or those of some kinds alone."""
        for number in numbers:
            if kinds is None or kind_of(number) in kinds:
                yield self.one(seed, number)

    def one(self, seed: int, number: int) -> Tried:
        """Try an input."""
        kind = kind_of(number)
        rng = random.Random(f"{seed} {number} {kind}")
        folder = self.folder / f"{seed}-{number}"
        sandbox = Sandbox(folder, rng)
        with chdir(sandbox.inputs):
            case = KINDS[kind](Drawn(sandbox, self.stock, rng))
        sandbox.plant()
        faults = list[str]()
        for each in case.first:
            faults += [f"before: {fault}" for fault in self._one_case(each, sandbox)[1]]
        told, found = self._one_case(case, sandbox)
        faults += found
        faults += [f"it wrote {place.name} into the home directory" for place in self.children.home.iterdir()]
        for place in self.children.home.iterdir():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        if not self.keep:
            shutil.rmtree(folder)
        return Tried(seed, number, kind, case, told, faults)

    def _one_case(self, case: Case, sandbox: Sandbox) -> tuple[Told, list[str]]:
        """How a command or a program ended, and its faults."""
        before, environment = sandbox.state(), {"HOME": str(self.children.home)}
        if case.code is None:
            told = self.children.command(case.words, sandbox.inputs, environment=environment)
        else:
            told = self.children.call("program", sandbox.inputs, code=case.code, environment=environment)
        return told, judged(case, told, before, sandbox.state(), self.children)

    def close(self) -> None:
        """End the process."""
        self.children.close()
