"""Structured pruning of the demo model: every choice of columns, with and without restoration, at three sparsities.

    .venv/bin/python -m benchmarks.structured

Calibrated on one half of the news articles, evaluated on the other. Every row has the same moments, propagation
policy (pruned prefix), calibration tokens and evaluator; `over floor` is the time of the whole run over that of its
two calibration passes.
"""

import argparse
import copy

from benchmarks.common import setting, write_table
from optprune.evaluate import perplexity
from optprune.pipeline import prune
from optprune.recipe import make_recipe

ROWS = (
    ("FASP metric", "restored", ["fasp_metric", "restore"]),
    ("FASP metric", "not restored", ["fasp_metric"]),
    ("magnitude", "restored", ["magnitude", "restore"]),
    ("random", "restored", ["random", "restore"]),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--units", default="mlp")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    options = parser.parse_args()
    here = setting(options.samples, options.seq_length, options.windows, options.seed)
    dense = here.loaded.model
    rows = [row("none (dense)", "", 0.0, 0.0, perplexity(dense, here.windows).perplexity, "", "", "")]
    print(rows[0], flush=True)
    for sparsity in options.sparsities:
        for choice, restoration, solver in ROWS:
            recipe = make_recipe({"solver": solver, "sparsity": sparsity, "units": options.units, "seed": options.seed})
            model = copy.deepcopy(dense)
            report = prune(model, here.batches, recipe)
            score = perplexity(model, here.windows).perplexity
            error = sum(layer.relative_error for layer in report.layers) / len(report.layers)
            ratio = report.seconds / report.floor_seconds
            reached = report.sparsity_reached
            rows.append(row(choice, restoration, sparsity, reached, score, error, report.seconds, ratio))
            print(rows[-1], flush=True)
    tokens = options.samples * options.seq_length
    title = (
        f"Structured pruning of SmolLM2-135M-Instruct, units {options.units}: {tokens} calibration tokens of news, "
        f"{options.windows} x {options.seq_length} held-out tokens of other news articles, seed {options.seed}"
    )
    print(write_table(f"structured_{options.units}", title, rows, "python -m benchmarks.structured"))


def row(choice, restoration, asked, reached, perplexity, error, seconds, ratio):
    return {
        "columns chosen by": choice,
        "kept columns": restoration,
        "sparsity asked": asked,
        "reached": reached,
        "perplexity": perplexity,
        "mean layer error": error,
        "seconds": seconds,
        "over floor": ratio,
    }


if __name__ == "__main__":
    main()
