"""2:4 in the first blocks of a real model with its inputs in the order that they have, and permuted.

    .venv/bin/python -m benchmarks.permuted_blocks
    .venv/bin/python -m benchmarks.permuted_blocks --blocks 2 --recipes wanda

The first blocks of SmolLM2 are pruned under `intra`, calibrated on one half of the news articles. The perplexity is
that of the whole model on the other half, errors are the layers' relative errors, their mean over the blocks. Output
metrics are those of the whole model. Seconds are of CPU time.
"""

import argparse
from statistics import mean
from typing import Any

import torch

import optprune
from benchmarks.common import setting, write_table
from benchmarks.first_blocks import OfTheWhole, prune_first_blocks

RECIPES = ("wanda", "alps", "sparse_best")
PERMUTED = ("o_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    here = setting(options.samples, options.seq_length, options.windows, options.seed)
    model, rows = here.loaded.model, list[dict[str, Any]]()
    statistics = OfTheWhole(model)
    dense = optprune.perplexity(model, here.windows).perplexity
    for recipe in options.recipes:
        for permuted in (False, True):
            fields = {"units.weights": "2:4", "propagation": "intra", "permuted": permuted}
            chosen = optprune.load_recipe(recipe, fields)
            pruned, report, seconds = prune_first_blocks(model, options.blocks, here.batches, chosen, statistics)
            row = {"recipe": recipe, "order": "permuted" if permuted else "as it is"}
            for name in PERMUTED:
                errors = [layer.relative_error for layer in report.layers if layer.name.endswith(f".{name}")]
                row[f"{name} error"] = round(mean(errors), 4)
            row["perplexity"] = round(optprune.perplexity(pruned, here.windows).perplexity, 2)
            rows.append(row | {"CPU s": round(seconds)})
            print(rows[-1], flush=True)
    title = (
        f"2:4 in the first {options.blocks} blocks of SmolLM2-135M-Instruct (dense {dense:.1f}), "
        f"{options.samples * options.seq_length} calibration tokens of news, seed {options.seed}"
    )
    print(write_table("permuted_blocks", title, rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
