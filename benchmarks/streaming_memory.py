"""The peak memory of whole runs whose blocks are read one at a time: of few blocks and many, of few tokens and many.

    .venv/bin/python -m benchmarks.streaming_memory --recipes fasp alps sparse_best structured_best

The models have random weights in the shape of Llama. Each run is the command `optprune prune`, from the import to the
reload check in a process of its own; of all its processes together the proportional set size (PSS: a page that
processes share counts once) is read every 30 ms, and the largest sum is told. For models of --blocks blocks on
--samples windows, and for one of --few blocks on --windows windows, with --states disk; --states says another place.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.train_small import new_tokenizer
from optprune.texts import demo_articles

MIB = 2**20
VOCABULARY = 4096
EVERY = 0.03
"""the seconds between two readings"""
LETTERS = 5
"""more letters than a token has on average"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["fasp", "alps", "sparse_best", "structured_best"])
    parser.add_argument("--blocks", type=int, nargs="*", default=[12, 48])
    parser.add_argument("--samples", type=int, default=8, help="how many windows a model of --blocks blocks gets")
    parser.add_argument("--few", type=int, default=4, help="the blocks of the model that gets more windows")
    parser.add_argument("--windows", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--states", default="disk")
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "BLOCKS"), help="what a process of its own does")
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]), options.hidden, int(options.make[1]))
        return
    cases = [(blocks, options.samples) for blocks in options.blocks]
    cases += [(options.few, windows) for windows in options.windows]
    print(
        "| recipe | blocks | tokens | model, MiB | states, MiB | peak, MiB | seconds |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for recipe in options.recipes:
            for blocks, windows in cases:
                folder, tokens = scratch / f"{blocks} blocks", windows * options.seq_length
                if not folder.exists():
                    words = ["--make", str(folder), str(blocks), "--hidden", str(options.hidden)]
                    subprocess.run([sys.executable, "-m", __spec__.name, *words], capture_output=True, check=True)
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                peak, seconds = run(folder, recipe, windows, options.seq_length, options.states, scratch)
                sizes = f"{size / MIB:.0f} | {tokens * options.hidden * 4 / MIB:.0f} | {peak / MIB:.0f}"
                print(f"| {recipe} | {blocks} | {tokens} | {sizes} | {seconds:.0f} |", flush=True)


def make(folder: Path, hidden: int, blocks: int) -> None:
    """A model in a folder, with a tokenizer."""
    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        vocab_size=VOCABULARY,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    new_tokenizer(demo_articles("calibration"), VOCABULARY).save_pretrained(folder)


def run(model: Path, recipe: str, samples: int, length: int, states: str, scratch: Path) -> tuple[int, float]:
    """The peak of a run's processes together, in bytes, and its seconds."""
    text, words = scratch / "text.jsonl", "\n\n".join(demo_articles("calibration"))
    # As much text as is needed: tokens grow with the windows.
    text.write_text(json.dumps({"text": words[: samples * length * LETTERS]}))
    given = ["--calibration", str(text), "--samples", str(samples), "--seq-length", str(length), "--states", states]
    command = [sys.executable, "-m", "optprune", "prune", str(model), "--recipe", recipe, *given, "--overwrite"]
    began, peak = time.perf_counter(), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--output", str(scratch / "pruned")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(proportional_size, family(process.pid))))
            time.sleep(EVERY)
        assert process.stderr is not None
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {process.stderr.read()}")
    return peak, time.perf_counter() - began


def family(process: int) -> list[int]:
    """A process and all that come from it."""
    found = [process]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it has ended meanwhile
    return found


def proportional_size(process: int) -> int:
    """The bytes of a process in memory, of which each page that others share counts in part; 0 where it has ended."""
    try:
        rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    main()
