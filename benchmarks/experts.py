"""Whole experts of a small mixture trained on the real news: ours and others, on held-out articles.

    .venv/bin/python -m benchmarks.train_small qwen3_moe small-moe
    .venv/bin/python -m benchmarks.experts small-moe
    .venv/bin/python -m benchmarks.train_small qwen2_moe small-shared    # with a shared expert
    .venv/bin/python -m benchmarks.experts small-shared

Two and four of eight experts go from each block, or as many in all by one budget. Seeds draw the calibration windows
from the articles that the model was trained on; perplexity is that of the half that it has not seen, on the same
windows for all. MoNE and HC-SMoE (merged_experts.py) are models in memory, whose classes are not those of transformers.
The rows go into benchmarks/results/experts_MODEL.json and .md.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, markdown
from benchmarks.merged_experts import hc_smoe, mone
from optprune import load_model, load_recipe, prune
from optprune.measure import perplexity
from optprune.models import Decoder
from optprune.texts import demo_articles, evaluation_windows, read_documents, tokenise

RESULTS = Path(__file__).parent / "results"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts_best": ("experts_best", {}),
    "experts_best, one budget": ("experts_best", {"allocation": "global", "allocation.probe_tokens": 2048}),
    "experts_best without the refit": ("experts_best", {"refit.recovery": "none"}),
    "reap, as published": ("reap", {"propagation": "dense"}),
    "reap, as in llm-compressor": ("reap", {"propagation": "dense", "solver": {"reap": {"renormalised": True}}}),
    "reap, as published, with the refit": (
        "reap",
        {"propagation": "dense", "refit.recovery": 2, "refit.recovery.damping": 0.01, "refit.held_out": 0.125},
    ),
    "expert_frequency": ("expert_frequency", {"propagation": "dense"}),
}
"""what is compared: scores are those of the dense model, as in the authors' code"""
IN_MEMORY: dict[str, Callable[[Decoder, list[Tensor], int], None]] = {"MoNE": mone, "HC-SMoE": hc_smoe}
KEPT, SEEDS = (6, 4), (0, 1, 2)
LENGTH, AT_ONCE, WINDOWS, HELD_OUT = 256, 8, 32, 32
"""tokens of a window, windows of a batch, of a calibration text, and for evaluation"""


def calibration(windows: Tensor, seed: int) -> list[Tensor]:
    """Batches of windows drawn from the training half."""
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:WINDOWS]
    return list(windows[drawn].split(AT_ONCE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    dense = load_model(folder)
    assert dense.tokenizer is not None
    windows = evaluation_windows(tokenise(dense.tokenizer, demo_articles("calibration")), LENGTH)
    apart = evaluation_windows(tokenise(dense.tokenizer, read_documents("demo:evaluation")), LENGTH, HELD_OUT)
    rows = [{"recipe": "dense", "kept": 8, "seed": None, "perplexity": perplexity(dense.model, apart).perplexity}]
    for kept in KEPT:
        for seed in SEEDS:
            for name, (recipe, settings) in RUNS.items():
                model, decoder = copy.deepcopy(dense.model), Decoder(dense.model)
                shapes = [replace(shape, experts=kept) for shape in decoder.shapes()]
                share = 1 - sum(map(decoder.weights_of, shapes)) / decoder.linear_weights()
                # A hair less, since a budget takes whole experts until it has all that was asked for.
                asked = {"sparsity": share * 0.999, **settings}
                report = prune(model, calibration(windows, seed), load_recipe(recipe, asked))
                row = {"recipe": name, "kept": kept, "seed": seed, "sparsity": report.sparsity_reached}
                row |= {"relative error": mean(layer.relative_error for layer in report.layers)}
                rows.append(row | {"perplexity": perplexity(model, apart).perplexity})
                print(rows[-1], flush=True)
            for name, remove in IN_MEMORY.items():
                model = copy.deepcopy(dense.model)
                remove(Decoder(model), calibration(windows, seed), kept)
                row = {"recipe": name, "kept": kept, "seed": seed}
                rows.append(row | {"perplexity": perplexity(model, apart).perplexity})
                print(rows[-1], flush=True)
    file = RESULTS / f"experts_{folder.name}.json"
    file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    text = (
        f"# Experts of {folder.name}\n\n{machine()}; perplexity, mean and spread over three draws.\n\n{table(rows)}\n"
    )
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def table(rows: list[dict[str, Any]]) -> str:
    """The perplexities of each recipe, their mean and spread over seeds."""
    shown: list[dict[str, Any]] = [{"recipe": "dense"} | dict.fromkeys(columns(), f"{rows[0]['perplexity']:.1f}")]
    for name in (*RUNS, *IN_MEMORY):
        shown.append({"recipe": name})
        for kept, column in zip(KEPT, columns(), strict=True):
            found = [row["perplexity"] for row in rows if (row["recipe"], row["kept"]) == (name, kept)]
            shown[-1][column] = f"{mean(found):.1f} ± {stdev(found):.1f}"
    return markdown(shown)


def columns() -> list[str]:
    """What the table calls the numbers of experts kept."""
    return [f"{kept} of 8 experts" for kept in KEPT]


if __name__ == "__main__":
    main()
