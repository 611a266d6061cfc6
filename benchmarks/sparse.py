"""Every sparse recipe on a real model: perplexity on held-out text, by pattern, propagation policy and seed.

    .venv/bin/python -m benchmarks.sparse
    .venv/bin/python -m benchmarks.sparse --policies dense intra cross --seeds 0

All recipes get the same calibration tokens, damping, policy and evaluator. Rows are added to results/sparse.json one by
one; a row that is there already with the same settings is not run again, so a long table can be made in several goes.
"""

import argparse
import copy
import json
import sys
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import RESULTS, machine, setting, write_table
from optprune import load_recipe, prune
from optprune.evaluate import perplexity
from optprune.recipe import n_of_m
from optprune.texts import calibration_batches, read_documents, tokenise

RECIPES = ("magnitude", "wanda", "sparsegpt", "fistapruner", "fistapruner_plus", "alps", "alps_plus")
KEY = ("recipe", "pattern", "sparsity", "policy", "seed", "tokens", "evaluated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--sparsity", type=float, default=0.5, help="of patterns other than N:M")
    parser.add_argument("--policies", nargs="+", default=["pruned"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    options = parser.parse_args()
    here = setting(options.samples, options.seq_length, options.windows, 0)
    model = here.loaded.model
    original = copy.deepcopy(model.state_dict())
    calibration = tokenise(here.loaded.tokenizer, read_documents("demo:calibration"))
    rows = read()
    done = {tuple(row[key] for key in KEY) for row in rows}
    evaluated = here.windows.numel()

    def run(recipe: str, pattern: str, policy: str, seed: int) -> None:
        kept = n_of_m(pattern)
        sparsity = options.sparsity if kept is None else 1 - kept[0] / kept[1]
        row: dict[str, Any] = dict(
            zip(
                KEY,
                (recipe, pattern, sparsity, policy, seed, options.samples * options.seq_length, evaluated),
                strict=True,
            )
        )
        if tuple(row.values()) in done:
            return
        model.load_state_dict(original)
        settings = {"pattern": pattern, "sparsity": sparsity, "propagation": policy, "seed": seed}
        batches = calibration_batches(calibration, options.samples, options.seq_length, seed)
        report = prune(model, batches, load_recipe(recipe, settings))
        row["perplexity"] = perplexity(model, here.windows).perplexity
        row["mean layer error"] = mean(layer.relative_error for layer in report.layers)
        row["seconds"] = report.seconds
        row["run / floor"] = report.seconds / report.floor_seconds
        row["machine"] = machine()
        print(row, flush=True)
        # Read again: another run of this script may have added rows meanwhile.
        write([*read(), row])

    if options.seeds and not any(row["recipe"] == "dense" and row["evaluated"] == evaluated for row in rows):
        dense = dict(zip(KEY, ("dense", "-", 0.0, "-", 0, 0, evaluated), strict=True))
        write([*rows, {**dense, "perplexity": perplexity(model, here.windows).perplexity, "machine": machine()}])
    for seed in options.seeds:
        for policy in options.policies:
            for pattern in options.patterns:
                for recipe in options.recipes:
                    run(recipe, pattern, policy, seed)
    print(table(read(), " ".join(["python -m benchmarks.sparse", *sys.argv[1:]])))


def read() -> list[dict[str, Any]]:
    file = RESULTS / "sparse.json"
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []


def write(rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sparse.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]], command: str) -> str:
    """The rows with the seeds drawn together, as results/sparse.md."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["recipe"] != "dense":
            groups.setdefault(tuple(row[key] for key in KEY if key != "seed"), []).append(row)
    lines = []
    for same in sorted(groups.values(), key=lambda same: (same[0]["pattern"], same[0]["policy"], _mean(same))):
        first = same[0]
        lines.append(
            {
                "pattern": first["pattern"],
                "policy": first["policy"],
                "recipe": first["recipe"],
                "perplexity": _mean(same),
                "+-": stdev(row["perplexity"] for row in same) if len(same) > 1 else float("nan"),
                "seeds": len(same),
                "mean layer error": mean(row["mean layer error"] for row in same),
                "seconds": mean(row["seconds"] for row in same),
                "run / floor": mean(row["run / floor"] for row in same),
                "calibration tokens": first["tokens"],
            }
        )
    dense = [f"{row['perplexity']:.2f} on {row['evaluated']} tokens" for row in rows if row["recipe"] == "dense"]
    title = f"Sparse recipes on SmolLM2-135M-Instruct; news, held-out articles; dense {', '.join(dense)}"
    text = write_table("sparse_table", title, lines, command)
    (RESULTS / "sparse.md").write_text(text, encoding="utf-8")
    for name in ("sparse_table.md", "sparse_table.json"):
        (RESULTS / name).unlink()
    return text


def _mean(rows: list[dict[str, Any]]) -> float:
    return mean(row["perplexity"] for row in rows)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
