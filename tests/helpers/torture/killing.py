"""Kills: a command that is ended at a moment, and the same command again, which must come to the same bytes."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.helpers.torture.children import Children, Told
from tests.helpers.torture.judge import OF_LIBRARIES, differing
from tests.helpers.torture.moments import FULL, INTERRUPT, KILL, TERMINATE, drawn
from tests.helpers.torture.runs import contents
from tests.helpers.torture.sandbox import Sandbox, state
from tests.helpers.torture.stock import Stock

STOPPED, FAILED = 130, 2
FEWER_TOKENS = ("--set", "vocabulary.tokens=1024", "--set", "vocabulary.predictions=1024")
LONG: dict[str, Callable[[Any, Path], list[str]]] = {
    "fasp in shards": lambda words, output: words.prune(output, "--max-shard-size", "300KB", sparsity=0.3),
    "alps under intra": lambda words, output: words.prune(output, recipe="alps", propagation="intra"),
    "sparse_best": lambda words, output: words.prune(output, "--max-shard-size", "300KB", recipe="sparse_best"),
    "structured_best": lambda words, output: words.prune(output, recipe="structured_best"),
    "two workers": lambda words, output: words.prune(output, recipe="alps", propagation="intra", workers=2),
    "fewer tokens": lambda words, output: words.prune(output, *FEWER_TOKENS, sparsity=0.3, vocabulary=400),
    "heal": lambda words, output: words.heal(output),
    "compare": lambda words, output: words.compare(output),
    "export gguf": lambda words, output: words.export(output),
    "export onnx": lambda words, output: words.export(output, format="onnx"),
}
"""the commands that take long"""
RESUMED = (
    *("fasp in shards", "alps under intra", "sparse_best", "structured_best", "two workers", "fewer tokens"),
    "heal",
)
"""those that go on by an option; the others go on, or begin anew, by the same words"""


@dataclass(frozen=True)
class Whole:
    """A command that was not stopped: its output, its moments and its processor time."""

    output: Path
    moments: list[str]
    seconds: float


class Killing:
    """Long commands in sandboxes, each of which runs once without being stopped."""

    def __init__(self, folder: Path, stock: Stock, children: Children) -> None:
        self.folder, self.stock, self.children = folder, stock, children
        self._whole: dict[str, Whole] = {}
        words = stock.words()
        self.words = replace(words, model=stock.deep)

    def command(self, name: str, output: Path) -> list[str]:
        """The words of a command."""
        return LONG[name](self.words, output)

    def whole(self, name: str) -> Whole:
        """The command, not stopped."""
        if name not in self._whole:
            sandbox = Sandbox(self.folder / f"whole {name}", random.Random(0))
            output = sandbox.place / "out"
            told = self._ended(self.command(name, output), sandbox, output, None, KILL)
            assert told.status == 0, told.err
            found = json.loads((sandbox.folder.with_suffix(".note")).read_text())
            self._whole[name] = Whole(output, found["moments"], found["seconds"])
        return self._whole[name]

    def faults(self, name: str, seed: int, how: str | None = None) -> list[str]:
        """End a command at a moment that the seed decides, once or twice, go on with it, and look for faults."""
        rng, whole = random.Random(f"{name} {seed}"), self.whole(name)
        how = how or rng.choice([KILL, KILL, INTERRUPT, TERMINATE])
        sandbox = Sandbox(self.folder / f"{name} {seed} {how}", rng)
        sandbox.output = output = sandbox.place / "out"
        for beside in ("out.part", ".out.12345678.old", "out.runs", ".outer"):
            sandbox.thing(sandbox.place / beside)
        theirs, found, words = sandbox.state(), list[str](), self.command(name, output)
        for again in range(rng.choice([1, 1, 2])):
            more = ["--resume"] if again and name in RESUMED else []
            at = self._moment(rng, whole, how)
            told = self._ended([*words, *more], sandbox, output, at, how)
            found += self._of_the_stop(told, sandbox, how, f"{how} at {at}")
            if output.exists() and name != "compare":
                break
        more = ["--resume"] if name in RESUMED else []
        if output.exists() and name not in (*RESUMED, "compare"):
            more = ["--overwrite"]  # the command was done, but a kill may have left its empty scratch folder
        told = self.children.command([*words, *more], sandbox.inputs, checked=True)
        if told.status != 0:
            found.append(f"to go on ended with {told.status}: {told.err.splitlines()[-1:]}")
        found += self._of_the_output(sandbox, output, whole, theirs)
        if not found:
            shutil.rmtree(sandbox.folder)
        return found

    def _moment(self, rng: random.Random, whole: Whole, how: str) -> int | float:
        """Two of three moments are those that are counted, the others go by the processor time."""
        if how != FULL and rng.random() < 0.35:
            return rng.random() * whole.seconds
        count = len(whole.moments)
        return rng.randrange(count // 2) if how == FULL else drawn(rng, count)

    def _ended(self, words: list[str], sandbox: Sandbox, output: Path, at: Any, how: str) -> Told:
        note = sandbox.folder.with_suffix(".note")
        note.unlink(missing_ok=True)
        arguments = {"words": words, "at": at, "how": how, "note": str(note), "output": str(output)}
        return self.children.call("ended", sandbox.inputs, checked=True, longest=300, **arguments)

    def _of_the_stop(self, told: Told, sandbox: Sandbox, how: str, when: str) -> list[str]:
        """What is wrong with how a command was stopped."""
        note, found = sandbox.folder.with_suffix(".note"), list[str]()
        reached = json.loads(note.read_text()) if note.is_file() else {"there": True, "moment": "none"}
        expected = {KILL: -signal.SIGKILL, FULL: FAILED}.get(how, STOPPED)
        when = f"{when} ({reached['moment']})"
        if told.hung or told.left:
            found.append(f"{when}: it or what it had started went on")
        if told.status != expected and not (told.status == 0 and reached["there"]):
            found.append(f"{when}: exit status {told.status}")
        if how != KILL and (seen := OF_LIBRARIES.search(told.err)):
            found.append(f"{when}: it said {told.err[seen.start() :][:300]!r}")
        if how in (INTERRUPT, TERMINATE) and told.status == STOPPED:
            found += [f"{when}: it left {name}" for name in self._drafts(sandbox)]
        return found

    def _drafts(self, sandbox: Sandbox) -> list[str]:
        """What lies beside the output and its run that was not there before."""
        before = {".out.12345678.old", "out.part", "out.runs", ".outer", "out", "out.run"}
        return sorted(path.name for path in sandbox.place.iterdir() if path.name not in before)

    def _of_the_output(self, sandbox: Sandbox, output: Path, whole: Whole, theirs: dict[bytes, Any]) -> list[str]:
        """What is wrong once the command has come to its end."""
        after = state(sandbox.folder)
        found = [f"{path!r} is another" for path, held in theirs.items() if after.get(path) != held]
        if output.exists():
            found += [f"{name} is another" for name in sorted(differing(contents(output), contents(whole.output)))]
        left = [*self._drafts(sandbox), *(["out.run"] if (sandbox.place / "out.run").exists() else [])]
        return found + [f"{name} is left beside the output" for name in left]
