"""Damages: what may happen to the folder of a run that was stopped, and what may come of going on with it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.torture.children import Told
from tests.helpers.torture.judge import FAILED, differing, of_words
from tests.helpers.torture.killing import Killing
from tests.helpers.torture.moments import KILL
from tests.helpers.torture.runs import contents
from tests.helpers.torture.sandbox import state

RUNS = {
    "prune": ("structured_best", "rename block-00000.json"),
    "costs": ("structured_best", "rename division.json"),
    "tokens": ("fewer tokens", "rename block-00000.json"),
    "heal": ("heal", "rename state-000003.safetensors"),
    "compare": ("compare", "rename magnitude-0.4-seed0.json"),
}
"""the runs that are damaged: the command, and the moment before which it was killed"""
SHARD, RECORD = "model.layers.0.safetensors", "block-00000.json"
PRUNED_AFTER = "rename block-00001.json"
"""the moment of the prune run: one block is finished, and another has its weights alone"""


@dataclass(frozen=True)
class Damage:
    """What is done to a run folder, with another run's folder at hand."""

    run: str
    does: Callable[[Path, Path], None]
    adds: str | None = None
    """a file of somebody else, which must stay"""


def flipped(pattern: str, share: float = 0.8) -> Callable[[Path, Path], None]:
    """Flip a bit of a file."""

    def does(folder: Path, other: Path) -> None:
        file = sorted(folder.glob(pattern))[-1]
        data = bytearray(file.read_bytes())
        data[int(share * len(data))] ^= 1
        file.write_bytes(data)

    return does


def cut(pattern: str) -> Callable[[Path, Path], None]:
    """Cut a file in half."""

    def does(folder: Path, other: Path) -> None:
        file = sorted(folder.glob(pattern))[-1]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return does


def deleted(pattern: str) -> Callable[[Path, Path], None]:
    """Delete files."""

    def does(folder: Path, other: Path) -> None:
        files = list(folder.glob(pattern))
        assert files
        for file in files:
            file.unlink()

    return does


def edited(name: str, **values: Any) -> Callable[[Path, Path], None]:
    """Give the last numbers with these names in a JSON file other values."""

    def does(folder: Path, other: Path) -> None:
        data = json.loads((folder / name).read_text())
        for key, value in values.items():
            holder = list(holding(data, key))[-1]
            assert holder[key] != value
            holder[key] = value
        (folder / name).write_text(json.dumps(data, indent=2))

    return does


def holding(data: Any, key: str) -> Iterator[Any]:
    """The mappings in plain data that have a key."""
    if isinstance(data, dict) and key in data:
        yield data
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from holding(item, key)


def added(name: str, text: str = "{}", like: str | None = None) -> Callable[[Path, Path], None]:
    """Add a file, with a text or as a copy of another."""

    def does(folder: Path, other: Path) -> None:
        (folder / name).write_text((folder / like).read_text() if like else text)

    return does


def exchanged(one: str, two: str) -> Callable[[Path, Path], None]:
    """Exchange two files."""

    def does(folder: Path, other: Path) -> None:
        first, second = sorted(folder.glob(one))[-1], sorted(folder.glob(two))[-1]
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)

    return does


def of_another(pattern: str) -> Callable[[Path, Path], None]:
    """Put another run's file in the place of this one's."""

    def does(folder: Path, other: Path) -> None:
        file = sorted(folder.glob(pattern))[-1]
        assert (other / file.name).read_bytes() != file.read_bytes()
        shutil.copy2(other / file.name, file)

    return does


def largest(does: Callable[[str], Callable[[Path, Path], None]]) -> Callable[[Path, Path], None]:
    """Do something to the largest file."""

    def done(folder: Path, other: Path) -> None:
        file = max((file for file in folder.iterdir() if file.is_file()), key=lambda file: file.stat().st_size)
        does(file.name)(folder, other)

    return done


DAMAGES = {
    "a flipped bit in the weights of a block": Damage("prune", flipped(SHARD)),
    "a flipped bit in the header of a block": Damage("prune", flipped(SHARD, 0.001)),
    "a cut file of a block": Damage("prune", cut(SHARD)),
    "no weights of a block": Damage("prune", deleted(SHARD)),
    "a block of another run": Damage("prune", of_another(SHARD)),
    "an edited record of a block": Damage("prune", edited(RECORD, objective=0.125)),
    "no record of a block": Damage("prune", deleted(RECORD)),
    "a record under another number": Damage("prune", added("block-00002.json", like=RECORD)),
    "a record of no block": Damage("prune", added("block-x.json"), adds="block-x.json"),
    "a record of a block that is not there": Damage("prune", added("block-99999.json"), adds="block-99999.json"),
    "an edited division": Damage("prune", edited("division.json", mlp_width=72)),
    "no division": Damage("prune", deleted("division.json")),
    "a division of another run": Damage("prune", of_another("division.json")),
    "a cut output metric": Damage("prune", cut("metric-*.sums")),
    "a flipped bit in an output metric": Damage("prune", flipped("metric-*.sums")),
    "no output metrics": Damage("prune", deleted("metric-*.sums")),
    "an edited index of output metrics": Damage("prune", edited("metrics.json", tokens=7)),
    "edited facts": Damage("prune", edited("run.json", sparsity=0.25)),
    "cut facts": Damage("prune", cut("run.json")),
    "no facts": Damage("prune", deleted("run.json")),
    "notes in the folder": Damage("prune", added("notes.txt", "mine"), adds="notes.txt"),
    "a flipped bit in the largest file before the division": Damage("costs", largest(flipped)),
    "the largest file before the division is cut": Damage("costs", largest(cut)),
    "edited tokens": Damage("tokens", edited("tokens.json", windows=None)),
    "cut tokens": Damage("tokens", cut("tokens.json")),
    "no tokens": Damage("tokens", deleted("tokens.json")),
    "healing at step -1": Damage("heal", edited("progress.json", step=-1)),
    "healing at step 1000000": Damage("heal", edited("progress.json", step=10**6)),
    "healing whose best step is another": Damage("heal", edited("progress.json", best=1)),
    "a state in place of the best weights": Damage("heal", exchanged("state-*.safetensors", "best-*.safetensors")),
    "a flipped bit in the state of healing": Damage("heal", flipped("state-*2.safetensors")),
    "a flipped bit in the best weights": Damage("heal", flipped("best-*.safetensors")),
    "no best weights": Damage("heal", deleted("best-*.safetensors")),
    "a state of another run": Damage("heal", of_another("state-*2.safetensors")),
    "a state of no step": Damage("heal", added("state-x.safetensors", "mine"), adds="state-x.safetensors"),
    "an edited cell": Damage("compare", edited("cells/wanda-0.4-seed0.json", perplexity=1.5)),
    "a cell of another": Damage("compare", exchanged("cells/wanda-0.4*.json", "cells/wanda-0.5*.json")),
    "edited figures of the dense model": Damage("compare", edited("cells/dense.json", perplexity=1.5)),
    "a cut cell": Damage("compare", cut("cells/wanda-0.4*.json")),
    "a cell of no recipe": Damage("compare", added("cells/x.json"), adds="cells/x.json"),
}


class Damaging:
    """Runs that were killed, of which copies are damaged."""

    def __init__(self, killing: Killing) -> None:
        self.killing, self.folder = killing, killing.folder / "damaged"

    def run(self, name: str, other: bool = False) -> Path:
        """The folder of a run that was killed; the `other` one has another seed, or length."""
        command, moment = RUNS[name]
        place = self.folder / f"{name}{' other' if other else ''}"
        output = place / "out"
        run = output if name == "compare" else output.with_name("out.run")
        if not place.exists():
            place.mkdir(parents=True)
            words = [*self.killing.command(command, output), *(["--samples", "3"] if other and name != "heal" else [])]
            words += ["--seed", "1"] if other and name == "heal" else []
            note = {"note": str(place / "note"), "output": str(output)}
            at = PRUNED_AFTER if name == "prune" else moment
            told = self.killing.children.call("ended", place, words=words, at=at, how=KILL, checked=False, **note)
            assert told.status == -9, told.err
        return run

    def faults(self, name: str) -> list[str]:
        """Damage a copy of a run, go on with it, and look for faults."""
        damage = DAMAGES[name]
        command, _ = RUNS[damage.run]
        whole, place = self.killing.whole(command), self.folder / name
        output = place / "out"
        run = output if damage.run == "compare" else output.with_name("out.run")
        shutil.copytree(self.run(damage.run), run)
        before = state(run)
        damage.does(run, self.run(damage.run, other=True))
        damaged = {Path(str(path, "utf-8")).name for path, held in state(run).items() if before.get(path) != held}
        damaged |= {Path(str(path, "utf-8")).name for path in before.keys() - state(run).keys()}
        if not (run / "run.json").exists():
            damaged.add(run.name)  # it cannot be told from a folder of somebody else
        before = state(run)
        words = [*self.killing.command(command, output), *([] if damage.run == "compare" else ["--resume"])]
        told = self.killing.children.command(words, place)
        found = [f"exit status {told.status}"] if told.status not in (0, FAILED) else []
        found += of_words(told)
        if told.status == FAILED:
            found += self._of_a_refusal(told, damaged, before, state(run))
        else:
            found += [
                f"{each} is another" for each in sorted(differing(self._of(output, damage), contents(whole.output)))
            ]
        if damage.adds is not None and not (run / damage.adds).exists():
            found.append(f"{damage.adds} is gone")
        shutil.rmtree(place)
        return [*found, *told.err.splitlines()[-1:]] if found else []

    @staticmethod
    def _of(output: Path, damage: Damage) -> dict[str, Any]:
        return {name: held for name, held in contents(output).items() if name != damage.adds}

    @staticmethod
    def _of_a_refusal(told: Told, damaged: set[str], before: dict[bytes, Any], after: dict[bytes, Any]) -> list[str]:
        """What is wrong with a refusal: it changes nothing, and names a file that is damaged."""
        gone = [path for path, held in before.items() if after.get(path) != held and not left_by_a_kill(path)]
        found = [f"another, or gone: {gone}"] if gone else []
        if not any(name in told.err for name in damaged):
            found.append(f"the sentence names none of {sorted(damaged)}")
        return found


def left_by_a_kill(path: bytes) -> bool:
    """Whether a path is a draft, a lock or a folder for what does not stay, which another process may clear."""
    return re.search(rb"/(\.[^/]*|in-use|work|scratch|optprune-[^/]*)(/aside|/offload)?$", path) is not None
