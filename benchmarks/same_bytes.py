"""Whether a change of the code changes a weight: tiny models, every recipe, every policy, before and after.

    .venv/bin/python -m benchmarks.same_bytes after.json --against before.json [--demo]

Prunes small random models of Llama, OPT and Qwen2 with every shipped recipe, and with settings that no recipe ships,
under every propagation policy, and one of every other family with a few recipes. Of each it writes a digest of all
parameters and what the report says was kept, or the refusal; with --demo also the perplexities of `optprune demo`. With
--against it prints what differs from an earlier file and exits with 1 if anything does. The digests are those of one
machine's kernels, so no file is kept in the repository: make the earlier one here, of the commit to compare with, on
one thread as well.

    git worktree add ../before COMMIT
    (cd ../before && PYTHONPATH=$PWD:$OLDPWD $OLDPWD/.venv/bin/python -m benchmarks.same_bytes $OLDPWD/before.json)
    git worktree remove ../before

The second entry of PYTHONPATH finds this script for a commit that does not have it yet.
"""

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.tiny_models import ALL_MODELS, TINY_MODELS, VOCABULARY
from optprune import load_recipe, prune
from optprune.calibration import POLICIES
from optprune.errors import OptpruneError
from optprune.recipe import recipe_names

Settings = dict[str, Any]
Result = dict[str, Any]
MORE: dict[str, tuple[str, Settings]] = {
    "magnitude units=mlp sparsity=0.2": ("magnitude", {"units": "mlp", "sparsity": 0.2}),
    "fasp units=vo sparsity=0.1": ("fasp", {"units": "vo", "sparsity": 0.1}),
    "fasp width_multiple=1 fit_bias=False": ("fasp", {"allocation.multiple": 1, "fit_bias": False}),
    "osscar units=kv-groups": ("osscar", {"units": "kv-groups"}),
    "osscar allocation=global": ("osscar", {"allocation": "global"}),
    "osscar units=all allocation=global output_metric=diagonal budget=flops": (
        "osscar",
        {"units": "all", "allocation": "global", "metric": "diagonal", "allocation.currency": "flops"},
    ),
    "structured_best least_kept=0.0 sparsity=0.5": ("structured_best", {"allocation.least": 0.0, "sparsity": 0.5}),
    "spap units=all": ("spap", {"units": "all"}),
    "wanda pattern=4:8": ("wanda", {"units.weights": "4:8"}),
    "sparsegpt pattern=2:4": ("sparsegpt", {"units.weights": "2:4"}),
    "alps pattern=rows": ("alps", {"units.weights": "rows"}),
    "sparse_best pattern=2:4 sparsity=0.3": ("sparse_best", {"units.weights": "2:4", "sparsity": 0.3}),
    "sparse_best probe_tokens=128": ("sparse_best", {"allocation.probe_tokens": 128}),
    "sparse_best metric_width=64 held_out=0.125 recovery=1": (
        "sparse_best",
        {"metric.width": 64, "refit.held_out": 0.125, "refit.recovery": 1},
    ),
    "depth depth_parts=attention": ("depth", {"allocation.parts": "attention"}),
    "depth depth_parts=layers depth_score=influence": (
        "depth",
        {"allocation.parts": "layers", "allocation.score": "influence"},
    ),
}
"""settings that no shipped recipe has: other units, patterns and budgets, recovery where it is not usual; their names
are those of the files that results are compared with"""
FEW = ("fasp", "structured_best", "sparse_best", "experts_best", "depth")
"""the recipes for families that are not among the three on which everything is tried"""
DEMO = "demo"
"""the name of the demo's result"""


def combinations() -> dict[str, tuple[str, str, Settings]]:
    """All that is pruned, by name: (architecture, recipe, settings)."""
    cases = {name: (name, {}) for name in recipe_names()} | MORE
    tried = [
        *((model, name, policy) for model in TINY_MODELS for name in cases for policy in POLICIES),
        *((model, name, "pruned") for model in ALL_MODELS if model not in TINY_MODELS for name in FEW),
    ]
    return {
        f"{model} {name} {policy}": (model, cases[name][0], {**cases[name][1], "propagation": policy})
        for model, name, policy in tried
    }


def batches() -> list[Tensor]:
    """512 random tokens: the 16 sequences of which recipes hold out a sixteenth or more."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (2, 32), generator=generator) for _ in range(8)]


def pruned(dense: PreTrainedModel, recipe: str, settings: Settings) -> Result:
    """What became of a copy of the model, or why it was refused."""
    model = copy.deepcopy(dense)
    try:
        report = prune(model, batches(), load_recipe(recipe, settings))
    except OptpruneError as error:
        return {"refused": type(error).__name__, "because": str(error)}
    kept = {layer.name: layer.kept for layer in report.layers}
    return {"parameters": digest(model), "kept": kept, "allocation": report.allocation}


def digest(model: nn.Module) -> str:
    """A sha256 over the names, types, shapes and bytes of all parameters."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def demo() -> Result:
    """The perplexities of `optprune demo`, by the command itself, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.json"
        command = [sys.executable, "-m", "optprune", "demo", "--output", f"{folder}/model", "--json", str(file)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
        told = json.loads(file.read_text(encoding="utf-8"))
    return {state: told[state]["perplexity"] for state in ("before", "after", "reloaded")}


def differences(before: dict[str, Result], after: dict[str, Result]) -> list[str]:
    """A line for each value that is another one, and for each result that is a refusal or missing on one side."""
    lines: list[str] = []
    for name in before | after:
        old, new = before.get(name), after.get(name)
        if old is None or new is None or "refused" in old or "refused" in new:
            lines += [f"{name}: {_told(old)} before, {_told(new)} after"] if old != new else []
            continue
        earlier, later = dict(_values(old, name)), dict(_values(new, name))
        lines += [
            f"{key}: {earlier.get(key, 'nothing')} before, {later.get(key, 'nothing')} after"
            for key in earlier | later
            if key not in earlier or key not in later or earlier[key] != later[key]
        ]
    return lines


def _told(result: Result | None) -> str:
    if result is None:
        return "nothing"
    return f"{result['refused']} ({result['because']})" if "refused" in result else "weights"


def _values(data: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """The numbers and strings in nested data, each under the names that lead to it."""
    if not isinstance(data, dict | list) or not data:
        yield ": ".join(path), data
        return
    for key, item in data.items() if isinstance(data, dict) else enumerate(data):
        yield from _values(item, *path, str(key))


def kernels() -> str:
    """What, besides the code, the bits of a result hang on."""
    return (
        f"torch {torch.__version__}, transformers {version('transformers')}, {torch.backends.cpu.get_cpu_capability()}"
    )


def _write(file: Path, results: dict[str, Result]) -> str:
    text = json.dumps({"kernels": kernels(), "results": results}, indent=1) + "\n"
    file.write_text(text, encoding="utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to write the results, as JSON")
    parser.add_argument("--against", type=Path, metavar="FILE", help="an earlier file to compare with")
    parser.add_argument("--only", default="", metavar="TEXT", help="only what has this in its name: 'llama fasp'")
    parser.add_argument("--demo", action="store_true", help="also the perplexities of the demo (minutes)")
    options = parser.parse_args(arguments)
    chosen = {name: combination for name, combination in combinations().items() if options.only in name}
    if not chosen:
        parser.error(f"no name has {options.only!r} in it: names are an architecture, a recipe and a policy")
    before = json.loads(options.against.read_text(encoding="utf-8")) if options.against else None
    torch.set_num_threads(1)
    began = time.perf_counter()
    models = {architecture: make(num_hidden_layers=3) for architecture, make in ALL_MODELS.items()}
    results = {
        name: pruned(models[architecture], recipe, settings)
        for name, (architecture, recipe, settings) in chosen.items()
    }
    text = _write(options.file, results)
    if options.demo:
        # The file is there already: the demo takes minutes, and may be interrupted.
        results[DEMO] = demo()
        text = _write(options.file, results)
    refused = sum("refused" in result for result in results.values())
    print(f"{len(results)} results, {refused} of them refusals, in {time.perf_counter() - began:.0f} s: {options.file}")
    if before is None:
        return 0
    earlier = {
        name: result
        for name, result in before["results"].items()
        if (options.demo if name == DEMO else options.only in name)
    }
    lines = differences(earlier, json.loads(text)["results"])
    print("\n".join(lines) if lines else f"the same as in {options.against}")
    if lines and before["kernels"] != kernels():
        print(f"{options.against} was made with other kernels: {before['kernels']}, not {kernels()}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
