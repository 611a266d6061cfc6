"""Whole models: perplexity on held-out news and on speeches after every recipe of a study, by policy and seed.

    .venv/bin/python -m benchmarks.models sparse
    .venv/bin/python -m benchmarks.models structured ablation --seeds 0 1 2
    .venv/bin/python -m benchmarks.models recovery --samples 32
    .venv/bin/python -m benchmarks.models sparse --model path/to/folder --samples 32
    .venv/bin/python -m benchmarks.models ablation ablation-sparse --seeds 0 1 2 --share
    .venv/bin/python -m benchmarks.models --tables      # only write the tables of what has been run

All recipes get the same calibration tokens (news), policy, evaluator and damping, but where they choose their own. Rows
are added to results/models.json one by one, with a digest of the recipe as it was run: what is there already is not run
again, so a long table can be made in several goes, and what a recipe gave before it was changed is in no table. Each
row names the machine. `run / floor` is the time of the whole run over that of its two calibration passes with their
Gram products; memory is the most that the run took on top of the model.
"""

import argparse
import copy
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import RESULTS, TEXTS, evaluation_texts, machine, markdown, tokenizer_of
from benchmarks.studies import NAMES, STUDIES, Settings, as_run, digest
from optprune import Recipe, Statistics, collect, prune
from optprune.errors import InputError
from optprune.measure import perplexity
from optprune.measure.memory import memory_increase
from optprune.models import load_model
from optprune.report import Report
from optprune.texts import begin_tokens, calibration_batches, read_documents, tokenise

KEY = ("model", "digest", "seed", "tokens", "evaluated")
MEASURED = ("mean layer error", "seconds", "run / floor", "memory, MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", nargs="+", help="recipes; all of the study otherwise")
    parser.add_argument("--sparsities", type=float, nargs="+", help="those of the study with these only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16, help="of each text")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument(
        "--share",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure once what rows have in common (optprune.collect), and keep it in a folder where one is named",
    )
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    unknown = set(options.studies) - set(STUDIES)
    if unknown:
        parser.error(f"no study is called {sorted(unknown)}: {', '.join(STUDIES)}")
    if not options.tables:
        cases = [case for study in options.studies or STUDIES for case in STUDIES[study]]
        cases = [case for case in cases if not options.only or case[0] in options.only]
        cases = [case for case in cases if not options.sparsities or case[1]["sparsity"] in options.sparsities]
        run(cases, options)
    for study in STUDIES:
        text = table(study, read())
        if text:
            (RESULTS / f"models_{study.replace(':', '_')}.md").write_text(text, encoding="utf-8")


def run(cases: Iterable[tuple[str, Settings]], options: argparse.Namespace) -> None:
    loaded = load_model(options.model)
    model, name = loaded.model, "SmolLM2-135M-Instruct" if options.model == "demo" else Path(options.model).name
    original = copy.deepcopy(model.state_dict())
    tokenizer = tokenizer_of(loaded)
    windows = evaluation_texts(tokenizer, options.seq_length, options.windows)
    calibration, begin = tokenise(tokenizer, read_documents("demo:calibration")), begin_tokens(tokenizer)
    tokens, evaluated = options.samples * options.seq_length, options.windows * options.seq_length

    def add(row: dict[str, Any]) -> None:
        # Read again: another run of this script may have added rows meanwhile.
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / "models.json"
        file.write_text(json.dumps({"rows": [*read(), row]}, indent=1) + "\n", encoding="utf-8")
        print(row, flush=True)

    def score(pruned: torch.nn.Module) -> dict[str, float]:
        return {text: perplexity(pruned, ids).perplexity for text, ids in windows.items()}  # type: ignore[arg-type]

    def missing(key: tuple[Any, ...]) -> bool:
        return not any(tuple(row[field] for field in KEY) == key for row in read())

    key = (name, "dense", 0, 0, evaluated)
    if missing(key):
        add({**dict(zip(KEY, key, strict=True)), "recipe": "dense", **score(model), "machine": machine()})
    for seed in options.seeds:
        common: Statistics | None = None
        for recipe, settings in cases:
            key = (name, digest(recipe, settings, tokens), seed, tokens, evaluated)
            if not missing(key):
                continue
            model.load_state_dict(original)
            # Pruned units change the shapes, so the run gets a model of its own.
            pruned = copy.deepcopy(model)
            batches = calibration_batches(calibration, options.samples, options.seq_length, seed, begin=begin)
            try:
                chosen = as_run(recipe, settings, seed)
                if options.share is not None and common is None:
                    folder = Path(options.share) / f"{name}-{seed}-{tokens}" if options.share else None
                    common = collect(model, batches, recipes=[], folder=folder)  # what a run needs is added to them
                saved = 0.0 if common is None else common.seconds_saved
                report, taken = measured(pruned, batches, chosen, common)
            except InputError as error:
                print(f"{recipe} {settings} is not for {name}: {error}", flush=True)
                continue
            # As long as the run would have taken alone.
            seconds = report.seconds + (0.0 if common is None else common.seconds_saved - saved)
            add(
                {
                    **dict(zip(KEY, key, strict=True)),
                    "recipe": recipe,
                    "settings": settings,
                    **score(pruned),
                    "sparsity reached": report.sparsity_reached,
                    "mean layer error": mean(layer.relative_error for layer in report.layers),
                    "seconds": seconds,
                    "run / floor": seconds / report.floor_seconds,
                    "memory, MiB": None if taken is None or options.share is not None else taken / 2**20,
                    "machine": machine(),
                }
            )


def measured(
    model: PreTrainedModel, batches: Iterable[Tensor], recipe: Recipe, statistics: Statistics | None
) -> tuple[Report, int | None]:
    """Prune: the report, and the bytes that the run took on top of the model."""
    reports: list[Report] = []
    taken = memory_increase(model.device, lambda: reports.append(prune(model, batches, recipe, statistics=statistics)))
    return reports[0], taken


def read() -> list[dict[str, Any]]:
    file = RESULTS / "models.json"
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []


def table(study: str, rows: list[dict[str, Any]]) -> str:
    """The study's rows with the seeds drawn together, for every model it was run on; empty where it was not."""
    parts = []
    # The study's own words for a run, which another study may call by another name.
    sizes = {row["tokens"] for row in rows}
    words = {digest(*case, tokens): case for case in reversed(STUDIES[study]) for tokens in sizes}
    for model in dict.fromkeys(row["model"] for row in rows):
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if row["model"] == model and row["digest"] in words:
                recipe, settings = words[row["digest"]]
                key = (row["digest"], row["tokens"], row["evaluated"])
                groups.setdefault(key, []).append({**row, "recipe": recipe, "settings": settings})
        if not groups:
            continue
        lines = [_line(same) for same in sorted(groups.values(), key=_order)]
        dense = [row for row in rows if row["model"] == model and row["recipe"] == "dense"]
        told = "; ".join(
            f"dense on {r['evaluated']} tokens: news {r['news']:.2f}, speeches {r['speeches']:.2f}" for r in dense
        )
        machines = sorted({row["machine"] for same in groups.values() for row in same})
        parts.append("\n".join([f"## {model}", "", told, "", *machines, "", markdown(lines)]))
    if not parts:
        return ""
    return "\n".join([f"# {NAMES[study]}", "", f"`python -m benchmarks.models {study}`", "", "\n".join(parts)])


def _order(same: list[dict[str, Any]]) -> tuple[Any, ...]:
    settings = same[0]["settings"]
    return (
        settings.get("units.weights", ""),
        settings["sparsity"],
        settings.get("propagation", ""),
        -same[0]["tokens"],
        mean(row["news"] for row in same),
    )


def _line(same: list[dict[str, Any]]) -> dict[str, Any]:
    first = same[0]
    settings = first["settings"]
    spread = {text: stdev(row[text] for row in same) if len(same) > 1 else None for text in TEXTS}
    return {
        "recipe": first["recipe"],
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        **{text: _with_spread(mean(row[text] for row in same), spread[text]) for text in TEXTS},
        "seeds": len(same),
        "reached": mean(row["sparsity reached"] for row in same),
        # Runs that were suspended for a while have no times; some rows under stage by stage policies are from before
        # their floor was right; a row made by a script beside this one has the perplexities alone.
        **{key: _mean_of_known(row.get(key) for row in same) for key in MEASURED},
        "calibration tokens": first["tokens"],
    }


def _mean_of_known(values: Iterable[float | None]) -> float | str:
    known = [value for value in values if value]
    return mean(known) if known else ""


def _with_spread(value: float, spread: float | None) -> str:
    return f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"


if __name__ == "__main__":
    main()
