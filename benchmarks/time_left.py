"""How true the time left is: what `optprune prune` says of it on the way, beside what was left.

    .venv/bin/python -m benchmarks.time_left                                  # three recipes, 16 windows of 512 tokens
    .venv/bin/python -m benchmarks.time_left --recipes fasp --seq-length 128

A whole command is run, and the lines that it writes to its log are read: each says when it was told, and now and then
what is left in all. From a tenth of the run on that is to be at most twice wrong; a rounding of the words, which go by
5 seconds or by minutes, is not held against it, nor anything in the last 5 seconds of which only "a few" are told.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import with_earlier, write_table

RECIPES = {"fasp": "0.2", "structured_best": "0.2", "sparse_best": "0.5"}
"""the sparsity by the recipe"""
FIRST = 0.1
"""the share of the run from which what is left is to be true"""
TOLD = re.compile(r", (about [\w ]+?|a few seconds) left in all$")
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list[dict[str, Any]]()
    for recipe in options.recipes:
        rows.append(row(recipe, options))
        print(rows[-1], flush=True)
        every = with_earlier("time_left", rows, ("recipe", "model", "tokens"))
        write_table("time_left", "The time left that a run tells of", every)


def row(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one recipe's command said."""
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        log, words = Path(place) / "log.txt", ["--recipe", recipe, "--sparsity", RECIPES[recipe]]
        words += ["--calibration", "demo:calibration", "--samples", str(options.samples)]
        words += ["--seq-length", str(options.seq_length), "--log", str(log), "--output", str(Path(place) / "out")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "optprune", "prune", options.model, *words]
        began = datetime.now().astimezone()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        whole = (datetime.now().astimezone() - began).total_seconds()
        told = read(log.read_text(encoding="utf-8"), began)
    late = [(at, left) for at, left in told if left is not None and at >= FIRST * whole]
    factors = [(wrong(*left, whole - at), at / whole) for at, left in late]
    worst, when = max(factors)
    return {
        "recipe": recipe,
        "model": options.model,
        "tokens": options.samples * options.seq_length,
        "seconds": whole,
        "told after a tenth": len(late),
        "worst factor": worst,
        "at": f"{when:.0%}",
        "beyond 2": sum(factor > 2 for factor, _ in factors),
        "load before, after": f"{before:.1f}, {os.getloadavg()[0]:.1f}",
    }


def read(log: str, began: datetime) -> list[tuple[float, tuple[float, float] | None]]:
    """By line of a log: the seconds since the command began, and the least and the most left that its words mean."""
    told = list[tuple[float, tuple[float, float] | None]]()
    for line in log.splitlines():
        stamp, _, text = line.partition(" ")
        found, at = TOLD.search(text), (datetime.fromisoformat(stamp) - began).total_seconds()
        told.append((at, None if found is None else meant(found[1])))
    return told


def meant(words: str) -> tuple[float, float]:
    """The least and the most seconds that are told by such words as about 3 min."""
    if words == "a few seconds":
        return 0.0, 5.0
    parts = words.removeprefix("about ").split()
    seconds = sum(float(number) * UNITS[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True))
    rounding = 30.0 if "min" in parts else 2.5
    return seconds - rounding, seconds + rounding


def wrong(least: float, most: float, left: float) -> float:
    """By what factor an estimate in a range is wrong at least."""
    nearest = min(max(left, least), most)
    return max(nearest, left, 1e-9) / max(min(nearest, left), 1e-9) if left > 5 or least > 10 else 1.0


if __name__ == "__main__":
    main()
