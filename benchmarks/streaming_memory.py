"""The peak memory of a run whose blocks are read one at a time, of models with few blocks and with many.

    .venv/bin/python -m benchmarks.streaming_memory --recipes fasp sparse_best --blocks 12 48

The models have random weights in the shape of Llama. Each run is a process of its own, of which the peak is the largest
resident size that the system tells (ru_maxrss); what it was once everything was imported is told beside it. With
--whole the models are in memory, for comparison.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optprune import load_recipe, prune
from optprune.models import load_model, open_model

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["fasp", "sparse_best"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("MODEL", "RECIPE"), help="what a process of its own does")
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "BLOCKS"), help="the same, to write a model")
    options = parser.parse_args()
    if options.make:
        model(options.hidden, int(options.make[1])).save_pretrained(options.make[0])
        return
    if options.run:
        run(Path(options.run[0]), options.run[1], options.samples, options.seq_length, options.whole)
        return
    print("| recipe | blocks | model, MiB | imports, MiB | peak, MiB | seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for blocks in options.blocks:
            folder = Path(scratch) / str(blocks)
            # Not here: a process starts with the largest size of the one that started it.
            make = [sys.executable, "-m", "benchmarks.streaming_memory", "--make", str(folder), str(blocks)]
            subprocess.run([*make, "--hidden", str(options.hidden)], capture_output=True, check=True)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for recipe in options.recipes:
                words = [sys.executable, "-m", "benchmarks.streaming_memory", "--run", str(folder), recipe]
                words += ["--samples", str(options.samples), "--seq-length", str(options.seq_length)]
                words += ["--whole"] if options.whole else []
                told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
                imports, peak, seconds = json.loads(told.splitlines()[-1])
                print(
                    f"| {recipe} | {blocks} | {size / MIB:.0f} | {imports:.0f} | {peak:.0f} | {seconds:.0f} |",
                    flush=True,
                )


def model(hidden: int, blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        vocab_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return LlamaForCausalLM(config)


def run(folder: Path, recipe: str, samples: int, length: int, whole: bool) -> None:
    torch.set_num_threads(1)
    imports = peak()
    batches = torch.randint(0, 4096, (samples, length), generator=torch.Generator().manual_seed(0)).split(4)
    loaded = load_model(folder) if whole else open_model(folder)
    report = prune(loaded.model, batches, load_recipe(recipe), store=loaded.store)
    print(json.dumps([imports, peak(), report.seconds]))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
