"""The gallery: real layer problems that anybody can make again, as files.

    .venv/bin/python -m benchmarks.gallery gallery
    .venv/bin/python -m benchmarks.gallery gallery --model small-qwen2 --prefix qwen2 --only 'middle-*'
    .venv/bin/python -m benchmarks.gallery gallery --model small-opt --prefix opt --only 'middle-*'
    .venv/bin/python -m benchmarks.gallery gallery --check --workers 2
    .venv/bin/python -m benchmarks.gallery gallery --bounds

Small models are trained by benchmarks.train_small. Layers of an early, a middle and a late block: the query, output,
gate and down projections, to be pruned by units, patterns and an l1 penalty, with and without an output metric or the
drift of a pruned model, and small parts of them whose optimum SCIP proves. The digests, and the best values and bounds
that are known, are kept in benchmarks/results/gallery.json. `--check` makes the problems again and compares their
digests with those. Another processor may round a sum otherwise, and gives other digests.
"""

import argparse
import copy
import fnmatch
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import optprune
from benchmarks.common import RESULTS, machine, setting
from optprune.models import Decoder
from optprune.moments import InputMoments
from optprune.patterns import NM, Unstructured
from optprune.penalties import L1
from optprune.problems import (
    Channels,
    LayerLoss,
    PenalisedLeastSquares,
    Problem,
    SelectionProblem,
    SparseLeastSquares,
    StructuredLeastSquares,
    load_problem,
    save_problem,
)
from optprune.recipe import Recipe
from optprune.solvers import Fista, PerspectiveBound, RemovalBound, Solver, solve
from optprune.testing.references import mixed_integer

KNOWN = RESULTS / "gallery.json"
SAMPLES, LENGTH = 32, 256
QUERY, OUTPUT, GATE, DOWN = "q", "o", "gate", "down"
PATHS = {QUERY: "self_attn.q_proj", OUTPUT: "self_attn.o_proj", GATE: "mlp.gate_proj", DOWN: "mlp.down_proj"}
"""the layers of a Llama, and of what is built like it"""
OPT_PATHS = {QUERY: "self_attn.q_proj", OUTPUT: "self_attn.out_proj", GATE: "fc1", DOWN: "fc2"}
TINY_ROWS, TINY_COLUMNS = 4, 10


def half(loss: LayerLoss) -> Problem:
    """Half of the weights, anywhere."""
    return SparseLeastSquares(loss, Unstructured(loss.weight.numel() // 2))


def groups(n: int, m: int) -> Callable[[LayerLoss], Problem]:
    """An N:M pattern."""
    return lambda loss: SparseLeastSquares(loss, NM(n, m))


def units(share: float) -> Callable[[LayerLoss], Problem]:
    """A share of the input channels removed."""

    def state(loss: LayerLoss) -> Problem:
        width = loss.weight.shape[1]
        return StructuredLeastSquares(loss, Channels.of(width), width - round(share * width))

    return state


def lasso(share: float) -> Callable[[LayerLoss], Problem]:
    """An l1 penalty that sets about a share of the weights to zero: the quantile of |W_ij| A_jj."""

    def state(loss: LayerLoss) -> Problem:
        sizes = (loss.weight.abs() * loss.gram.diagonal()).reshape(-1)
        return PenalisedLeastSquares(loss, L1(float(sizes.kthvalue(round(share * sizes.numel())).values)))

    return state


STATEMENTS: dict[str, Callable[[LayerLoss], Problem]] = {
    "units20": units(0.2),
    "units40": units(0.4),
    "half": half,
    "2of4": groups(2, 4),
    "4of8": groups(4, 8),
    "l1weak": lasso(0.3),
    "l1": lasso(0.5),
    "l1strong": lasso(0.7),
}
STATED: dict[tuple[str, str], tuple[str, ...]] = {
    ("early", OUTPUT): ("half", "2of4"),
    ("early", DOWN): ("units20", "units40", "2of4"),
    ("middle", QUERY): ("half", "2of4"),
    ("middle", OUTPUT): ("half", "l1weak", "l1", "l1strong"),
    ("middle", GATE): ("half", "4of8"),
    ("middle", DOWN): ("units20", "units40", "half"),
    ("late", OUTPUT): ("4of8",),
    ("late", DOWN): ("units20", "units40", "2of4"),
}


def tiny(loss: LayerLoss) -> LayerLoss:
    """The loss of the first rows and of the columns with the largest inputs alone."""
    columns = loss.moments.mean_square.argsort(descending=True, stable=True)[:TINY_COLUMNS].sort().values
    moments = InputMoments(
        loss.moments.covariance[columns][:, columns], loss.moments.mean[columns], loss.moments.tokens
    )
    return LayerLoss.of(loss.weight[:TINY_ROWS][:, columns].double(), moments.to(torch.float64), 0.01)


class Layers:
    """The problems of a model, each made by itself; a loss that several of them share is measured once."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
        self.model, self.batches, self.decoder = model, batches, Decoder(model)
        count = len(self.decoder.blocks)
        self.blocks = {"early": 1, "middle": count // 2, "late": max(count - 2, count // 2 + 1)}
        self.paths = OPT_PATHS if model.config.model_type == "opt" else PATHS
        self.loss = cache(self._loss)
        self.drifted = cache(self._drifted)

    def name(self, place: str, layer: str) -> str:
        """Return the name of a layer of an early, middle or late block."""
        return self.decoder.name(self.blocks[place], self.paths[layer])

    def _loss(self, place: str, layer: str) -> LayerLoss:
        return optprune.layer_loss(self.model, self.batches, self.name(place, layer), "dense")

    def _drifted(self) -> LayerLoss:
        pruned = halved(copy.deepcopy(self.model), self.blocks["middle"])
        return optprune.layer_loss(pruned, self.batches, self.name("middle", DOWN), "cross", dense=self.model)

    def of_recipe(self, place: str, layer: str, recipe: dict[str, Any]) -> Problem:
        """Return the problem that a recipe states for a layer."""
        return optprune.layer_problem(self.model, self.batches, self.name(place, layer), Recipe(recipe))

    def instances(self) -> dict[str, Callable[[], Problem]]:
        """Return what makes each problem, by its name."""
        found = dict[str, Callable[[], Problem]]()
        for (place, layer), names in STATED.items():
            loss = partial(self.loss, place, layer)
            short = f"{place}-{layer}"
            for name in names:
                found[f"{short}-{name}"] = partial(lambda state, loss: state(loss()), STATEMENTS[name], loss)
            if layer == DOWN:
                found[f"{short}-tiny-units"] = partial(lambda loss: units(0.5)(tiny(loss())), loss)
                found[f"{short}-tiny-l1"] = partial(lambda loss: lasso(0.5)(tiny(loss())), loss)
            if layer == OUTPUT:
                found[f"{short}-tiny-half"] = partial(lambda loss: half(first_row(tiny(loss()))), loss)
        weighed = {"units": {"weights": "2:4"}, "sparsity": 0.5, "propagation": "dense", "metric": {"kind": "full"}}
        found["middle-o-2of4-metric"] = partial(self.of_recipe, "middle", OUTPUT, weighed)
        values = {"units": "vo", "sparsity": 0.03, "propagation": "dense"}
        found["middle-o-values"] = partial(self.of_recipe, "middle", OUTPUT, values)
        found["middle-down-units20-drift"] = lambda: units(0.2)(self.drifted())
        found["middle-down-2of4-drift"] = lambda: groups(2, 4)(self.drifted())
        return found


def first_row(loss: LayerLoss) -> LayerLoss:
    """Return the loss of the first output alone."""
    return replace(loss, weight=loss.weight[:1])


@torch.no_grad()
def halved(model: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """Set the two smaller weights of every four to zero in the first blocks, in place."""
    decoder = Decoder(model)
    for index in range(blocks):
        for path in decoder.paths(index):
            weight = decoder.layer(index, path).weight
            weight.mul_(NM(2, 4).project(weight.abs()))
    return model


def make(folder: Path, source: str, prefix: str, only: str, part: int, parts: int) -> dict[str, dict[str, Any]]:
    """Write every so many of the problems of a model, and return what is noted of each."""
    base = setting(SAMPLES, LENGTH, 1, 0, source)
    entries = dict[str, dict[str, Any]]()
    every = Layers(base.loaded.model, base.batches).instances()
    for name in fnmatch.filter(every, only)[part::parts]:
        file, problem = folder / f"{prefix}-{name}.safetensors", every[name]()
        save_problem(problem, file, origin={"model": prefix, "instance": name, "tokens": SAMPLES * LENGTH})
        shape = list(problem.loss.weight.shape)
        entries[file.stem] = {"kind": problem.kind, "shape": shape, "fingerprint": problem.fingerprint()}
        print(file.stem, problem.kind, shape, flush=True)
    return entries


def made(folder: Path, source: str, prefix: str, only: str, workers: int) -> dict[str, dict[str, Any]]:
    """Write the problems of a model, in so many processes, and return what is noted of each."""
    if workers == 1:
        return make(folder, source, prefix, only, 0, 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(make, folder, source, prefix, only, part, workers) for part in range(workers)]
        return {name: entry for each in parts for name, entry in each.result().items()}


def check(entries: dict[str, dict[str, Any]]) -> None:
    """Compare digests with the known ones; leave with the names of those that differ."""
    before = known()["instances"]
    other = [name for name, entry in entries.items() if entry["fingerprint"] != before[name]["fingerprint"]]
    print(f"{len(entries) - len(other)} of {len(entries)} digests are those of {KNOWN.name}")
    if other:
        raise SystemExit(f"these differ: {', '.join(other)}")


def known() -> dict[str, Any]:
    """Return what is known of the instances: digests, best values and bounds."""
    return json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {"instances": {}}


def note(name: str, entry: dict[str, Any]) -> None:
    """Add to what is known of an instance; of another fingerprint all that was known is dropped."""
    every = known()
    before = every["instances"].get(name, {})
    same = entry.get("fingerprint", before.get("fingerprint")) == before.get("fingerprint")
    every["instances"][name] = ({**before} if same else {}) | entry
    every["machine"] = machine()
    KNOWN.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def prove(folder: Path) -> None:
    """Prove a lower bound of every problem in a folder, by SCIP where it is tiny, and note it."""
    for file in sorted(folder.glob("*.safetensors")):
        problem = load_problem(file)
        bound, proof = proved(problem)
        note(file.stem, {"bound": bound, "proof": proof})
        print(file.stem, f"{bound:.6g}", proof, flush=True)


def proved(problem: Problem) -> tuple[float, str]:
    """Return the best lower bound of a problem that its solvers prove, and by what."""
    if isinstance(problem, SelectionProblem) and problem.loss.weight.shape[1] <= TINY_COLUMNS:
        best = mixed_integer(problem)  # type: ignore[arg-type]
        return best.optimum - best.rounding, "SCIP, to 1e-5 of its range"
    by: Solver[Any, Any] = Fista(tolerance=1e-6)
    if isinstance(problem, SelectionProblem):
        by = RemovalBound() if isinstance(problem, StructuredLeastSquares) else PerspectiveBound()
    certificate = solve(problem, by).certificate
    return (0.0, "a loss is not negative") if certificate is None else (certificate.lower_bound, certificate.proof)


def main() -> None:
    """Make the gallery, or prove its bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prefix", default="smollm2", help="first part of the names")
    parser.add_argument("--only", default="*", help="pattern of the names without the prefix")
    parser.add_argument("--workers", type=int, default=1, help="processes that make them")
    parser.add_argument("--check", action="store_true", help="compare digests with the known ones, and note nothing")
    parser.add_argument("--bounds", action="store_true", help="prove bounds of the problems that are there")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    if options.bounds:
        prove(options.folder)
        return
    entries = made(options.folder, options.model, options.prefix, options.only, options.workers)
    if options.check:
        check(entries)
        return
    for name, entry in entries.items():
        note(name, entry)


if __name__ == "__main__":
    main()
