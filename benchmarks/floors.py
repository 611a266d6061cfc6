"""Whole commands against their floor: what `optprune prune` takes from start to end, over what no run can spare.

    .venv/bin/python -m benchmarks.floors                     # 128 windows of 512 tokens
    .venv/bin/python -m benchmarks.floors --samples 16 --recipes fasp --parts

The floor is two forward passes of the calibration tokens through the dense model's blocks, and the Gram products X^T X
of the inputs at which the recipe's layers are seen: in float32, in the batches and with the threads of the command,
with nothing kept, checked or summed up beside. The model is loaded and the text tokenised before its clock starts.
With --floor-samples it is measured on fewer windows and taken to grow with them, as each batch does the same work. The
whole command is a process of its own: imports, loading, tokenising, all passes and solves, saving, and the check that
reloads the folder in a third process.

Clock seconds are those of a wall; processor seconds, of the process and those it waited for, say what a machine with
other work to do takes for this alone, more or less, and the ratio is theirs. With --parts the command runs under
cProfile, which tells where its seconds go and costs some itself, so that those runs get no ratio.
"""

import argparse
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import tokenizer_of, with_earlier, write_table
from optprune import load_recipe
from optprune.calibration import calibrating, first_inputs
from optprune.calibration.stream import run_block
from optprune.models import Decoder, load_model
from optprune.texts import calibration_batches, read_documents, tokenise

SPARSITY = {"fasp": 0.2, "structured_best": 0.2, "alps": 0.5, "sparse_best": 0.5}
TARGETS = {"fasp": 1.25, "alps": 1.6, "structured_best": 3.0, "sparse_best": 4.0}
"""the most floors that a whole command is to take"""
PARTS = {
    "tokenising": ("windows.py", "tokenise"),
    "loading": ("load.py", "load_model"),
    "metric": ("run.py", "_metrics"),
    "budget": ("run.py", "_division"),
    "collecting": ("moments_pass.py", "collect"),
    "moving on": ("propagation.py", "_advance"),
    "solving": ("layer.py", "prune_layer"),
    "saving": ("save.py", "save_model"),
    "checking": ("check.py", "compare"),
}
"""the functions whose time, with all they call, is that of a part; collecting is also part of the budget, and checking
of saving"""


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of the processor."""

    clock: float
    processor: float

    def times(self, factor: float) -> "Spent":
        """As many seconds times a factor."""
        return Spent(self.clock * factor, self.processor * factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--floor-samples", type=int, help="the windows that the floor is measured on; default: all")
    parser.add_argument("--parts", action="store_true", help="tell where the seconds of the command go, and no ratio")
    parser.add_argument("--floor", metavar="RECIPE", help="what a process of its own does")
    options = parser.parse_args()
    if options.floor:
        print(json.dumps(asdict(floor(options.floor, options.samples, options.seq_length))))
        return
    rows = []
    for recipe in options.recipes:
        if options.parts:
            print(recipe, json.dumps(parts(recipe, options.samples, options.seq_length)), flush=True)
            continue
        rows.append(row(recipe, options))
        print(rows[-1], flush=True)
    if rows:
        title = "Whole commands against their floor"
        print(write_table("floors", title, with_earlier("floors", rows, ("recipe", "tokens", "threads"))))


def row(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one recipe's command takes, and its floor."""
    before, windows = os.getloadavg()[0], options.floor_samples or options.samples
    least = floor_apart(recipe, windows, options.seq_length).times(options.samples / windows)
    whole, report = command(recipe, options.samples, options.seq_length)
    return {
        "recipe": recipe,
        "tokens": options.samples * options.seq_length,
        "threads": torch.get_num_threads(),
        "floors": whole.processor / least.processor,
        "at most": TARGETS[recipe],
        "command, processor s": whole.processor,
        "floor, processor s": least.processor,
        "command, clock s": whole.clock,
        "floor, clock s": least.clock,
        "floor's tokens": windows * options.seq_length,
        "prune(), clock s": report["seconds"],
        "solves, clock s": sum(layer["seconds"] for layer in report["layers"]),
        "load before, after": f"{before:.1f}, {os.getloadavg()[0]:.1f}",
    }


def floor_apart(recipe: str, samples: int, seq_length: int) -> Spent:
    """The floor in a process of its own, with the threads of this one."""
    words = [sys.executable, "-m", "benchmarks.floors", "--floor", recipe]
    words += ["--samples", str(samples), "--seq-length", str(seq_length)]
    told = subprocess.run(words, env=environment(), stdout=subprocess.PIPE, text=True, check=True).stdout
    return Spent(**json.loads(told.splitlines()[-1]))


def floor(name: str, samples: int, seq_length: int) -> Spent:
    """Two passes of the blocks, in the first of them the Gram products of what the recipe's layers read."""
    loaded, recipe = load_model("demo"), load_recipe(name)
    tokens = tokenise(tokenizer_of(loaded), read_documents("demo:calibration"))
    batches = calibration_batches(tokens, samples, seq_length, 0)
    decoder = Decoder(loaded.model)
    candidates = [recipe.units.candidates(decoder, index) for index in range(len(decoder.blocks))]
    with calibrating(decoder):
        entering = first_inputs(decoder, batches)
        clock, processor = time.perf_counter(), time.process_time()
        for second in (False, True):
            stream = entering.copy()
            for block, targets in zip(decoder.blocks, candidates, strict=True):
                taps = () if second else sorted({target.tap for target in targets})
                pairs = zip(stream.hidden, stream.arguments, strict=True)
                stream.past(
                    stream.hidden.with_values(passed(block, hidden, arguments, taps) for hidden, arguments in pairs)
                )
        return Spent(time.perf_counter() - clock, time.process_time() - processor)


def passed(block: torch.nn.Module, hidden: Tensor, arguments: dict[str, Any], taps: Sequence[str]) -> Tensor:
    """What leaves a block; the Gram products of the taps are made and forgotten."""
    seen, after = run_block(block, hidden, arguments, taps)
    for inputs in seen.values():
        rows = inputs.flatten(0, -2)
        _ = rows.T @ rows
    return after


def command(recipe: str, samples: int, seq_length: int, profile: Path | None = None) -> tuple[Spent, dict[str, Any]]:
    """A whole `optprune prune`, and its report; with `profile` under cProfile, which writes there."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "model"
        words = [sys.executable, *([] if profile is None else ["-m", "cProfile", "-o", str(profile)])]
        words += ["-m", "optprune", "prune", "demo", "--calibration", "demo:calibration", "--output", str(output)]
        words += ["--samples", str(samples), "--seq-length", str(seq_length), "--recipe", recipe]
        words += ["--sparsity", str(SPARSITY[recipe])]
        clock, before = time.perf_counter(), os.times()
        subprocess.run(words, env=environment(), stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        # Of children that are done, with those that they in turn have waited for.
        processor = after.children_user + after.children_system - before.children_user - before.children_system
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        return Spent(time.perf_counter() - clock, processor), report


def parts(recipe: str, samples: int, seq_length: int) -> dict[str, float]:
    """The seconds of a command's parts, by the clock."""
    with tempfile.TemporaryDirectory() as scratch:
        profile = Path(scratch) / "profile"
        whole, _ = command(recipe, samples, seq_length, profile)
        found = dict.fromkeys(PARTS, 0.0)
        for (file, _, function), (_, _, _, seconds, _) in pstats.Stats(str(profile)).stats.items():  # type: ignore[attr-defined]
            for part, (name, wanted) in PARTS.items():
                if function == wanted and Path(file).name == name and "optprune" in file:
                    found[part] += seconds
    return {"whole": whole.clock, **found}


def environment() -> dict[str, str]:
    """That of this process, with its number of threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


if __name__ == "__main__":
    main()
