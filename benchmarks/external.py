"""Our methods beside other people's code: llm-compressor's SparseGPT and Wanda, fmchisel's ALPS, optipfair.

    python -m benchmarks.external layers     # in an environment that also holds llmcompressor and fmchisel
    python -m benchmarks.external model
    python -m benchmarks.external units      # optipfair

Layer tier: each of their functions is wrapped as a solver and gets our moments; relative errors on calibration and
held-out tokens of the first layer of every stage of a block. Model tier: llm-compressor's own `oneshot` with its
sequential pipeline (our policy `pruned`) on the same tokens; perplexity on held-out news by the same evaluator.
Units: optipfair's choice of MLP units, from the weights alone and with our calibration tokens, to the same widths;
perplexity on held-out news and on speeches. It refits nothing.
Their Wanda compares weights within rows, so the pattern is `rows`; their unstructured SparseGPT may drop one weight
more than asked in each of its blocks of 128 columns.
"""

import argparse
import copy
import importlib.util
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import Setting, evaluation_texts, setting, with_earlier, write_table
from benchmarks.layers import layers
from benchmarks.layerwise.benchmark_utils.published import published
from optprune.allocation.uniform import uniform
from optprune.measure import perplexity
from optprune.models import Decoder, Mlp
from optprune.objectives import sparse
from optprune.patterns import NM, Pattern, RowWise, Unstructured
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.solvers import Answer, DirectSolver, Solver, SparseGpt, solve
from optprune.work import Work

DAMPING = 0.01


class Foreign(DirectSolver[SparseLeastSquares]):
    """Somebody else's function of a linear layer and its Hessian."""

    accepts = (SparseLeastSquares,)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        return SparseGpt().work(outputs, inputs, coupled=coupled)


def asked(problem: SparseLeastSquares) -> tuple[float, int, int]:
    """(sparsity, dropped of a group, group), (., 0, 0) for an unstructured or row-wise pattern."""
    pattern, (outputs, inputs) = problem.pattern, problem.loss.weight.shape
    if isinstance(pattern, NM):
        return 1 - pattern.n / pattern.m, pattern.m - pattern.n, pattern.m
    if isinstance(pattern, RowWise):
        return 1 - pattern.keep / inputs, 0, 0
    assert isinstance(pattern, Unstructured)
    return 1 - pattern.keep / (outputs * inputs), 0, 0


def linear(problem: SparseLeastSquares) -> nn.Linear:
    outputs, inputs = problem.loss.weight.shape
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight.data = problem.loss.weight.clone()
    return layer.requires_grad_(False)


@final
@dataclass(frozen=True)
class LlmCompressorSparseGpt(Foreign):
    """llmcompressor.modifiers.pruning.sparsegpt: it adds the damping itself."""

    def answer(self, problem: SparseLeastSquares, start: Tensor) -> Answer:
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

        layer, (sparsity, n, m) = linear(problem), asked(problem)
        hessians = {layer: problem.loss.moments.gram.clone()}
        return Answer(sparsify_weight(layer, hessians, sparsity, n, m, 128, DAMPING, False)[1])


@final
@dataclass(frozen=True)
class LlmCompressorWanda(Foreign):
    """llmcompressor.modifiers.pruning.wanda."""

    def answer(self, problem: SparseLeastSquares, start: Tensor) -> Answer:
        from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight

        layer, (sparsity, n, m) = linear(problem), asked(problem)
        return Answer(sparsify_weight(layer, {layer: problem.loss.moments.mean_square}, sparsity, n, m))


@final
@dataclass(frozen=True)
class FmchiselAlps(Foreign):
    """fmchisel.pruning.alps, its one file of numerics alone.

    The package itself asks for llmcompressor 0.5.1 and transformers below 5, of which that file needs one constant.
    """

    def answer(self, problem: SparseLeastSquares, start: Tensor) -> Answer:
        layer, (sparsity, n, m) = linear(problem), asked(problem)
        # They count what a group keeps. Without `verbose` one of their branches uses a name that is not defined.
        kept = m - n
        hessians = {layer: problem.loss.moments.gram.clone()}
        sparsify_weight = published("pruning/alps/utils/alps_sparsify.py").sparsify_weight
        return Answer(sparsify_weight(layer, hessians, sparsity, kept, m, DAMPING, verbose=True)[1])


@dataclass(frozen=True)
class Pair:
    """One of our recipes, and somebody else's code for the same method."""

    recipe: str
    theirs: Solver
    module: str
    distribution: str
    pattern: str
    """the pattern at 50 percent"""


PAIRS = (
    Pair("wanda", LlmCompressorWanda(), "llmcompressor", "llmcompressor", "rows"),
    Pair("sparsegpt", LlmCompressorSparseGpt(), "llmcompressor", "llmcompressor", "unstructured"),
    Pair("alps", FmchiselAlps(), "fmchisel", "fmchisel", "unstructured"),
)


def pattern(name: str, weight: Tensor) -> Pattern:
    if name == "rows":
        return RowWise(weight.shape[1] // 2)
    return NM(2, 4) if name == "2:4" else Unstructured(weight.numel() // 2)


def layer_tier(options: argparse.Namespace, pairs: list[Pair]) -> list[dict]:
    found = layers(options.samples, 16, options.seq_length, options.blocks, options.seed)
    rows = []
    for pair in pairs:
        for name in (pair.pattern, "2:4"):
            for label, solver in (("optprune", load_recipe(pair.recipe).solver), (pair.distribution, pair.theirs)):
                sums = [0.0, 0.0, 0.0, 0.0]
                for _, weight, moments, apart in found:
                    loss = LayerLoss.of(weight, moments, DAMPING)
                    began = time.perf_counter()
                    value = solve(SparseLeastSquares(loss, pattern(name, weight)), solver).value
                    seconds = time.perf_counter() - began
                    elsewhere = LayerLoss.of(weight, apart).relative_error(value)
                    zeros = float((value == 0).float().mean())
                    measured = (zeros, loss.relative_error(value), elsewhere, seconds)
                    sums = [total + one / len(found) for total, one in zip(sums, measured, strict=True)]
                keys = ("zeros", "error on calibration", "error on held-out", "seconds")
                rows.append(
                    {"method": pair.recipe, "pattern": name, "code": label, **dict(zip(keys, sums, strict=True))}
                )
                print(rows[-1], flush=True)
    return rows


def by_prune(here: Setting, method: str, name: str) -> PreTrainedModel:
    solver = load_recipe(method).solver
    recipe = Recipe(objective=sparse, solver=solver, units={"weights": name}, sparsity=0.5, damping=DAMPING)
    model = copy.deepcopy(here.loaded.model)
    prune(model, here.batches, recipe)
    return model


def by_oneshot(here: Setting, method: str, name: str) -> PreTrainedModel:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    windows = [window[None] for batch in here.batches for window in batch]
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    with tempfile.TemporaryDirectory() as folder:
        # Their entry point reads the model's folder again.
        here.loaded.model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        oneshot(
            model=model,
            processor=here.loaded.tokenizer,
            dataset=DataLoader(samples, batch_size=None),  # type: ignore[arg-type]
            recipe=modifier(sparsity=0.5, mask_structure="2:4" if name == "2:4" else "0:0", ignore=["re:.*lm_head"]),
            pipeline="sequential",
            num_calibration_samples=len(samples),
        )
    return model


def model_tier(options: argparse.Namespace, pairs: list[Pair]) -> list[dict]:
    here = setting(options.samples, options.seq_length, options.windows, options.seed)
    rows = []
    for pair in pairs:
        names = {"50%": [pair.pattern], "2:4": ["2:4"], None: [pair.pattern, "2:4"]}[options.setting]
        for name in names:
            for code, run in (("optprune", by_prune), (pair.distribution, by_oneshot)):
                if options.code not in (None, code):
                    continue
                began = time.perf_counter()
                model = run(here, pair.recipe, name)
                seconds = time.perf_counter() - began
                parts = [part for block in Decoder(model).blocks for part in block.modules()]
                weights = torch.cat([layer.weight.flatten() for layer in parts if isinstance(layer, nn.Linear)])
                score = perplexity(model, here.windows).perplexity
                rows.append(
                    {
                        "method": pair.recipe,
                        "pattern": name,
                        "code": code,
                        "zeros": float((weights == 0).double().mean()),
                        "perplexity": score,
                        "seconds": seconds,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def by_optipfair(here: Setting, kept: float, *, with_data: bool) -> PreTrainedModel:
    from optipfair import prune_model

    windows = torch.cat(list(here.batches))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(2)]
    return prune_model(
        copy.deepcopy(here.loaded.model),
        neuron_selection_method="MAW",
        pruning_percentage=100 * (1 - kept),
        dataloader=batches if with_data else None,
        show_progress=False,
    )  # type: ignore[return-value]


def unit_tier(options: argparse.Namespace) -> list[dict]:
    here = setting(options.samples, options.seq_length, options.windows, options.seed)
    texts = evaluation_texts(here.loaded.tokenizer, options.seq_length, options.windows)
    whole = Decoder(here.loaded.model)
    rows = []
    for sparsity in (0.1, 0.2, 0.3):
        kept = uniform(whole, sparsity, Mlp(), 8).blocks[0].shape.mlp_width / whole.shape(0).mlp_width
        for name, with_data in (("weights alone", False), ("weights and activations", True)):
            began = time.perf_counter()
            model = by_optipfair(here, kept, with_data=with_data)
            seconds = time.perf_counter() - began
            decoder = Decoder(model)
            rows.append(
                {
                    "removed": 1 - decoder.linear_weights() / whole.linear_weights(),
                    "optipfair": name,
                    "MLP width": decoder.shape(0).mlp_width,
                    **{text: perplexity(model, windows).perplexity for text, windows in texts.items()},
                    "seconds": seconds,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=["layers", "model", "units"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--blocks", type=int, nargs="+", default=[14])
    parser.add_argument("--methods", nargs="+", default=[pair.recipe for pair in PAIRS])
    parser.add_argument(
        "--setting", choices=["50%", "2:4"], help="only this one, in the model tier; rows of earlier runs stay"
    )
    parser.add_argument("--code", help="only optprune, or only this distribution, in the model tier")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokens = f"{options.samples * options.seq_length} calibration tokens of news, seed {options.seed}"
    if options.tier == "units":
        if not importlib.util.find_spec("optipfair"):
            parser.error("optipfair is not installed here")
        title = (
            "Perplexity of SmolLM2-135M-Instruct with MLP units removed by optipfair, "
            f"{options.windows * options.seq_length} tokens of each text"
        )
        title = f"{title}: {tokens}; optipfair {version('optipfair')}"
        print(write_table("external_units", title, unit_tier(options)))
        return
    if options.tier == "model":
        options.methods = [method for method in options.methods if method != "alps"]
    pairs = [pair for pair in PAIRS if pair.recipe in options.methods and importlib.util.find_spec(pair.module)]
    if not pairs:
        parser.error("neither llmcompressor nor fmchisel is installed here")
    used = ", ".join(f"{name} {version(name)}" for name in sorted({pair.distribution for pair in pairs}))
    if options.tier == "layers":
        rows = layer_tier(options, pairs)
        title = f"Our baselines and other code on the layers of blocks {options.blocks} of SmolLM2-135M-Instruct, means"
    else:
        rows = model_tier(options, pairs)
        title = (
            "Perplexity of SmolLM2-135M-Instruct pruned by our baselines and by other code, policy pruned, "
            f"{options.windows * options.seq_length} held-out tokens"
        )
        rows = with_earlier("external_model", rows, ["method", "pattern", "code"])
    print(write_table(f"external_{options.tier}", f"{title}: {tokens}, damping {DAMPING}; {used}", rows))


if __name__ == "__main__":
    main()
