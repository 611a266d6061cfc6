"""Whole runs on models of the papers' shapes, with random weights: seconds by phase, peak memory, and floors.

    .venv/bin/python -m benchmarks.headline --device cuda --blocks all --samples 128 --seq-length 2048
    .venv/bin/python -m benchmarks.headline --shapes opt-125m --blocks all --recipes fasp
    .venv/bin/python -m benchmarks.headline --shapes llama3-8b --blocks 1 --vocabulary 1024 --samples 4 --seconds 1800

A row is a process of its own, which opens the folder, prunes it a block at a time, saves it, and has it checked by
another process; one that takes longer than --seconds is stopped, and the row says so. The calibration tokens are drawn
at random too: what is measured is time and memory. Host memory is the largest resident size that the system tells
(ru_maxrss) of the process that prunes; device memory is what torch has had allocated at most there.

Phases are those that a run tells of; the passes of blocks are what is left of their time without the solves. The floor
is the run's own, two passes and the Gram products of each block. Where not all blocks were run, or fewer tokens than
--target-tokens, two columns say what the whole would take: that is an extrapolation. All seconds grow with the blocks,
but those of starting the process that checks, which are counted as if they did; the passes, and those of the budget,
grow with the tokens too; the metric grows with them up to the number that its recipe caps it at. The probes of a budget
grow with the square of the blocks, which it leaves out.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import with_earlier, write_table
from benchmarks.random_checkpoints import SHAPES, write_checkpoint
from optprune import load_recipe, prune
from optprune.export import save_model
from optprune.models import DTYPES, open_model
from optprune.report.phases import BUDGET, CHECKING, METRIC, PRUNING, SAVING

SPARSITY = {
    "fasp": 0.2,
    "spap": 0.2,
    "structured_best": 0.2,
    "fistapruner": 0.5,
    "alps": 0.5,
    "sparse_best": 0.5,
}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=list(SPARSITY), choices=list(SPARSITY))
    parser.add_argument("--blocks", default="2", help="how many, or all")
    parser.add_argument("--vocabulary", type=int, help="fewer tokens than the model's own")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--target-tokens", type=int, default=128 * 2048, help="what is extrapolated to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=3600.0, help="the most that a row may take")
    parser.add_argument("--scratch", help="where checkpoints are written [default: the system's temporary files]")
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "RECIPE"), help="what a process of its own does")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(Path(options.run[0]), options.run[1], options)))
        return
    for name in options.shapes:
        shape = SHAPES[name]
        blocks = shape.blocks if options.blocks == "all" else min(int(options.blocks), shape.blocks)
        config = shape.config(blocks, options.vocabulary or shape.vocabulary)
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            folder = Path(scratch) / name
            write_checkpoint(folder, config, DTYPES[options.dtype])
            for recipe in options.recipes:
                row = {"shape": name, "recipe": recipe, "blocks": f"{blocks} of {shape.blocks}"}
                row |= {"tokens": options.samples * options.seq_length, "device": place(options.device)}
                rows = [row | told(apart(folder, recipe, options), recipe, blocks / shape.blocks, options)]
                print(rows[0], flush=True)
                rows = with_earlier("headline", rows, ("shape", "recipe", "blocks", "tokens", "device"))
                write_table("headline", "Whole runs on random models of the papers' shapes", rows)


def place(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def apart(folder: Path, recipe: str, options: argparse.Namespace) -> dict[str, float] | None:
    """What a process of its own measured; None where it took too long."""
    words = [sys.executable, "-m", "benchmarks.headline", "--run", str(folder), recipe, "--device", options.device]
    words += ["--samples", str(options.samples), "--seq-length", str(options.seq_length)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        found = subprocess.run(
            words, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=options.seconds
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(found.stdout.splitlines()[-1])


def run(folder: Path, name: str, options: argparse.Namespace) -> dict[str, float]:
    """A whole run: open, prune, save, check."""
    began, processor = time.perf_counter(), os.times()
    recipe = load_recipe(name, {"sparsity": SPARSITY[name]})
    loaded = open_model(folder, device=options.device, scratch=folder.parent)
    opened = time.perf_counter() - began
    generator = torch.Generator().manual_seed(0)
    shape = (options.samples, options.seq_length)
    tokens = torch.randint(0, loaded.model.config.vocab_size, shape, generator=generator)
    batches = list(tokens.split(max(1, 2048 // options.seq_length)))
    report = prune(loaded.model, batches, recipe, store=loaded.store)
    output = folder.parent / "pruned"
    saved = save_model(loaded, output, report=report, recipe=recipe, check_tokens=tokens[:1], overwrite=True)
    after, whole = os.times(), time.perf_counter() - began
    spent = sum(after[:4]) - sum(processor[:4])
    phases = {phase.name: phase.seconds for phase in saved.report.phases} if saved.report else {}
    device = loaded.model.device
    return {
        "whole": whole,
        "processor": spent,
        "open": opened,
        **{phase: phases.get(phase, 0.0) for phase in (METRIC, BUDGET, PRUNING)},
        "save and check": phases.get(SAVING, 0.0) + phases.get(CHECKING, 0.0),
        "solves": sum(layer.seconds for layer in report.layers),
        "floor": report.floor_seconds,
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device": torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else 0.0,
        "removed": report.sparsity_reached,
    }


def told(found: dict[str, float] | None, recipe: str, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """A row's measurements in words and numbers, with what the whole model would take."""
    names = ("s", "processor s", "open", "metric", "budget", "passes", "solves", "save and check")
    names += ("floors", "host MiB", "device MiB", "all blocks, s", "and all tokens, s")
    if found is None:
        return {**dict.fromkeys(names, ""), "s": f"stopped after {options.seconds:g}"}
    passes, tokens = found[PRUNING] - found["solves"], options.samples * options.seq_length
    asked, more = load_recipe(recipe).metric, max(options.target_tokens / tokens, 1.0)
    cap = options.target_tokens if asked is None else min(asked.tokens, options.target_tokens)
    once = found["open"] + found["save and check"]
    each = found["metric"] + found["budget"] + found[PRUNING]
    grown = found["metric"] * max(cap / tokens, 1.0) + (found["budget"] + passes) * more + found["solves"]
    values = (found["whole"], found["processor"], found["open"], found["metric"], found["budget"], passes)
    values += (found["solves"], found["save and check"], found["whole"] / found["floor"])
    values += (found["host"], found["device"], (once + each) / share, (once + grown) / share)
    return dict(zip(names, values, strict=True))


if __name__ == "__main__":
    main()
