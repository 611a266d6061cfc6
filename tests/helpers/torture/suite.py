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
        words = " ".join(map(repr, self.case.words))
        again = f"python -m tests.helpers.torture --seeds {self.seed} --inputs {self.number}"
        return "\n".join(
            [f"{self.kind}, seed {self.seed}, input {self.number}:", *(f"  fault: {each}" for each in self.faults),
             f"  command: optprune {words}", f"  again: {again}", *(f"  | {line[:600]}" for line in self.told.err.splitlines()[-4:])]
        )  # fmt: skip


class Suite:
    """The stock, and a process that is forked for each input."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.children = folder, Children()
        self.stock = Stock(folder / "stock")
        self.stock.folder.mkdir(parents=True)
        made = self.children.call("stock", folder, folder=str(self.stock.folder), longest=600)
        assert made.status == 0, made.err

    def tried(self, seed: int, numbers: Iterable[int], kinds: list[str] | None = None) -> Iterator[Tried]:
        """Try inputs one after the other; `kinds` are those that are drawn, in place of all."""
        for number in numbers:
            kind = (kinds or list(KINDS))[number % len(kinds or KINDS)]
            yield self.one(seed, number, kind)

    def one(self, seed: int, number: int, kind: str, keep: bool = False) -> Tried:
        """Try an input."""
        rng = random.Random(f"{seed} {number} {kind}")
        folder = self.folder / f"{seed}-{number}"
        sandbox = Sandbox(folder, rng)
        with chdir(sandbox.inputs):
            case = KINDS[kind](Drawn(sandbox, self.stock, rng))
        sandbox.plant()
        before = sandbox.state()
        environment = {"HOME": str(self.children.home)}
        told = self.children.command(case.words, sandbox.inputs, environment=environment)
        faults = judged(case, told, before, sandbox.state(), self.children)
        faults += [f"it wrote {place.name} into the home directory" for place in self.children.home.iterdir()]
        for place in self.children.home.iterdir():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        if not keep:
            shutil.rmtree(folder)
        return Tried(seed, number, kind, case, told, faults)

    def close(self) -> None:
        """End the process."""
        self.children.close()
