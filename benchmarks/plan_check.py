"""What `optprune plan` says beside what `optprune prune` takes: peaks of memory and seconds, for models and recipes.

    .venv/bin/python -m benchmarks.plan_check --models llama256 opt512 demo --recipes fasp alps structured_best

Each run is a process of its own with one thread. The memory is that of the process and of all that it starts, summed,
with the pages of files counted once, sampled; or the largest resident size of one of them, where that is more. The
seconds are those of the whole command, its start included. Random models have the demo model's tokenizer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from benchmarks.common import with_earlier, write_table
from optprune.models import load_tokenizer, need_tokenizer
from optprune.texts import demo_articles

MIB = 2**20
APART = 0.05
"""the seconds between two samples"""
VOCABULARY = 49152
CHARACTERS = 400_000
"""of the calibration text: about 90,000 tokens"""
MODELS = ("llama256", "llama512", "llama1024", "opt512", "mixtral256", "demo")
RECIPES = ("fasp", "alps", "structured_best", "sparse_best")
"""the recipes that are run where none is named"""


@dataclass(frozen=True)
class Taken:
    """What a command took."""

    bytes: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--detail", action="store_true", help="print the planned phases as well")
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"), help="what a process of its own does")
    options, more = parser.parse_known_args()  # what it does not know is for both commands
    if options.make:
        save(*options.make)
        return
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n\n".join(demo_articles("calibration"))[:CHARACTERS], encoding="utf-8")
        for name in options.models:
            folder = name
            if name != "demo":
                folder = str(Path(scratch) / name)
                # Not here: a process starts with the largest size of the one that started it.
                subprocess.run([sys.executable, "-m", "benchmarks.plan_check", "--make", name, folder], check=True)
            for recipe in options.recipes:
                words = [folder, "--calibration", str(text), "--recipe", recipe]
                words += ["--samples", str(options.samples), "--seq-length", str(options.seq_length), *more]
                words += ["--dtype", "float32", "--device", "cpu"]
                of = {"model": name, "recipe": recipe, "samples": options.samples, "seq_length": options.seq_length}
                rows.append(of | row(words, Path(scratch), options.detail))
                print(rows[-1], flush=True)
                every = with_earlier("plan", rows, ("model", "recipe", "samples", "seq_length"))
                write_table("plan", "What a plan says, and what a run takes", every)


def row(words: list[str], scratch: Path, detail: bool) -> dict[str, Any]:
    """The planned and the measured memory and time of a run."""
    plan, output = scratch / "plan.json", scratch / "output"
    taken(["plan", *words, "--json", str(plan)])
    planned = json.loads(plan.read_text(encoding="utf-8"))
    for phase in planned["phases"] if detail else ():
        print(phase["name"], f"{phase['seconds']:.1f} s, {phase['host_bytes'] / MIB:.0f} MiB", phase["parts"])
    found = taken(["prune", *words, "--output", str(output), "--overwrite"])
    memory, seconds = planned["host_bytes"], planned["seconds"]
    if detail:
        print(json.loads((output / "report.json").read_text(encoding="utf-8"))["phases"])
    return {
        "planned, MiB": round(memory / MIB),
        "measured, MiB": round(found.bytes / MIB),
        "memory ratio": round(memory / found.bytes, 2),
        "planned, s": round(seconds, 1),
        "measured, s": round(found.seconds, 1),
        "time ratio": round(seconds / found.seconds, 2),
    }


def taken(words: list[str]) -> Taken:
    """What a command of optprune takes."""
    began = time.perf_counter()
    # What it prints is a few lines, which the pipes hold.
    process = subprocess.Popen(
        [sys.executable, "-m", "optprune", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    most = 0
    while process.poll() is None:
        alive = tree(process.pid)
        # Pages of files, such as libraries, are in memory once for all of them.
        files = max(status(one, "RssFile") for one in alive)
        most = max(most, files + sum(status(one, "RssAnon") for one in alive), *(status(one, "VmHWM") for one in alive))
        time.sleep(APART)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"optprune {' '.join(words)}: {process.stderr.read() if process.stderr else ''}")
    return Taken(most, seconds)


def tree(process: int) -> list[int]:
    """A process and all that it has started."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    except OSError:
        return [process]
    return [process, *(one for child in children for one in tree(int(child)))]


def status(process: int, field: str) -> int:
    """A field of what the system tells of a process, in bytes; 0 of one that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def save(name: str, folder: str) -> None:
    """Write a model of random weights."""
    model(name).save_pretrained(folder)
    need_tokenizer(load_tokenizer("demo"), "demo").save_pretrained(folder)


def model(name: str) -> PreTrainedModel:
    """A model of random weights: its architecture and its width are its name."""
    torch.manual_seed(0)
    if name == "opt512":
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=512,
                ffn_dim=2048,
                word_embed_proj_dim=512,
                num_hidden_layers=6,
                num_attention_heads=8,
            )
        )
    if name == "mixtral256":
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCABULARY,
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=6,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=8,
            )
        )
    hidden = int(name.removeprefix("llama"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=11 * hidden // 4,
            num_hidden_layers={256: 24, 512: 10, 1024: 3}[hidden],
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            tie_word_embeddings=hidden > 256,
        )
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
