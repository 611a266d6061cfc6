"""Text that the dense model writes, as calibration text: how much of it gains how much, and at which temperature.

    .venv/bin/python -m benchmarks.train_small qwen2 small-qwen2
    .venv/bin/python -m benchmarks.generated_text small-qwen2 --seeds 0 1 2
    .venv/bin/python -m benchmarks.generated_text demo --samples 16 --seq-length 512 --generated 0 48 --cases 50%
    .venv/bin/python -m benchmarks.generated_text demo --samples 16 --seq-length 512 --drift 1 0.9 0.8 0.7

Each model is pruned by windows of news and by as many windows that the dense model writes from them, and evaluated on
other news and on speeches. With `--real` further real windows are taken in place of written ones, for comparison.
With `--drift` nothing is pruned: the table has the dense model's perplexity on text that it writes in one piece, by the
position in the window, at these temperatures and for the real windows.
"""

import argparse
import copy
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import evaluation_texts, machine, setting, tokenizer_of, with_earlier, with_written, write_table
from benchmarks.studies import DIRECTIONS, HALF, INTRA, PAIRS, PARTIAL, PRUNED, UNCLIPPED, structured
from optprune import load_recipe, prune
from optprune.calibration.generated import generated_windows
from optprune.measure import perplexity
from optprune.measure.evaluate import negative_log_likelihood, perplexity_from_nll

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "50%": ("sparse_best", HALF),
    "50%, intra": ("sparse_best", HALF | INTRA),
    "50%, intra, not clipped": ("sparse_best", HALF | UNCLIPPED | INTRA),
    "50%, pruned": ("sparse_best", HALF | PRUNED),
    "50%, pruned, not clipped": ("sparse_best", HALF | UNCLIPPED),
    "2:4": ("sparse_best", PAIRS),
    "2:4, intra": ("sparse_best", PAIRS | INTRA),
    "2:4, intra, not clipped": ("sparse_best", PAIRS | UNCLIPPED | INTRA),
    "20% of units": ("structured_best", {"sparsity": 0.2}),
    "20% of units, pruned": ("structured_best", {"sparsity": 0.2} | PRUNED),
    "20% of units, pairs stay": ("structured_best", {"sparsity": 0.2} | DIRECTIONS),
    "30% of units": ("structured_best", {"sparsity": 0.3}),
    "ALPS, 50%": ("alps", HALF | PARTIAL),
    "ALPS, 2:4": ("alps", PAIRS | PARTIAL),
    "OSSCAR, 20% of units": structured("osscar", 0.2),
    "FASP, 20% of units": structured("fasp", 0.2),
}
KEYS = ("case", "text", "windows more", "temperature", "evaluated", "seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["50%", "2:4", "20% of units"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="of each text that is evaluated on")
    parser.add_argument("--generated", nargs="+", type=int, default=[0, 32, 96])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0])
    parser.add_argument("--real", nargs="*", type=int, default=[], help="numbers of further real windows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--drift", nargs="*", type=float, default=[], help="temperatures")
    options = parser.parse_args()
    if options.drift:
        drift(options)
        return
    name, rows = f"generated_text_{Path(options.model).name}", list[dict[str, Any]]()
    for case in options.cases:
        kinds = [("written", count, degree) for count in options.generated for degree in options.temperatures]
        for text, count, degree in [*kinds, *(("real", count, 1.0) for count in options.real)]:
            found = [one(options, case, text, count, degree, seed) for seed in options.seeds]
            of = {"case": case, "text": text, "windows more": count, "temperature": degree}
            of |= {"evaluated": options.windows * options.seq_length, "seeds": ", ".join(map(str, options.seeds))}
            rows.append({**of, **{key: spread([each[key] for each in found]) for key in found[0]}})
            print(rows[-1], machine(), flush=True)
            windows = f"{options.samples} windows of {options.seq_length} tokens and more"
            write_table(name, f"{Path(options.model).name} pruned by {windows}", with_earlier(name, rows, KEYS))


def drift(options: argparse.Namespace) -> None:
    """Write the table of the perplexity by position."""
    made = setting(options.samples, options.seq_length, options.windows, options.seeds[0], options.model)
    dense, batches, name = made.loaded.model.float(), list(made.batches), Path(options.model).name
    rows = list[dict[str, Any]]()
    bounds = [options.seq_length >> shift for shift in range(5, -1, -1)]
    for temperature in (None, *options.drift):
        of: dict[str, Any] = {"text": "real" if temperature is None else f"written at {temperature:g}"}
        windows = torch.cat(batches)
        if temperature is not None:
            windows = generated_windows(dense, batches, len(windows), temperature=temperature, piece=options.seq_length)
        with torch.no_grad():
            scores = [dense(input_ids=ids[None]).logits for ids in windows]
        for begin, end in pairwise(bounds):
            parts = zip(windows, scores, strict=True)
            nll = sum(
                negative_log_likelihood(ids[None, begin - 1 : end], one[:, begin - 1 : end]) for ids, one in parts
            )
            of[f"{begin} to {end}"] = f"{perplexity_from_nll(nll, len(windows) * (end - begin)):.1f}"
        rows.append(of)
        print(rows[-1], flush=True)
        write_table(f"generated_text_drift_{name}", f"Perplexity of {name} on its own text, by position", rows)


def one(
    options: argparse.Namespace, case: str, text: str, count: int, temperature: float, seed: int
) -> dict[str, float]:
    """Return the perplexities of a model pruned by real windows and `count` more, and the seconds that it took."""
    more = count if text == "real" else 0
    made = setting(options.samples + more, options.seq_length, options.windows, seed, options.model)
    dense, batches, began = made.loaded.model.float(), list(made.batches), time.perf_counter()
    recipe, fields = CASES[case]
    chosen = load_recipe(recipe, {**fields, "seed": seed})
    batches = with_written(dense, batches, count if text == "written" else 0, chosen, temperature)
    writing = time.perf_counter() - began
    model = copy.deepcopy(dense)
    torch.manual_seed(seed)
    began = time.perf_counter()
    prune(model, batches, chosen)
    seconds = time.perf_counter() - began
    texts = evaluation_texts(tokenizer_of(made.loaded), options.seq_length, options.windows)
    found = {name: perplexity(model, ids).perplexity for name, ids in texts.items()}
    return {**found, "seconds of writing": writing, "seconds of pruning": seconds}


def spread(values: list[float]) -> str:
    """Return a mean, with the standard deviation where there are several values."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
