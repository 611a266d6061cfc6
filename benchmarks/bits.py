"""Loss of whole models in 4 bits: llama.cpp's own q4_0, rounding, compensated errors, and a 2:4 mask with q4_0.

`python -m benchmarks.bits` writes benchmarks/results/bits.md, with `--model FOLDER` another table. Only the linear
layers of the blocks are quantised, so that all rows have the same embedding and head. Rows have the same calibration
windows and evaluation windows.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import Setting, setting, with_earlier, write_table
from optprune.calibration.input_squares import mean_squares
from optprune.export.ggml import packed
from optprune.measure import perplexity
from optprune.models import Decoder
from optprune.pruning import prune
from optprune.recipe import Recipe

Q4_0 = GGMLQuantizationType.Q4_0
CHAIN = ["gptq", "grid_descent"]
METRIC = {"kind": "full", "width": 4096, "damping": 0.1}
ALPS = {
    "propagation": "cross",
    "units": {"weights": "2:4"},
    "sparsity": 0.5,
    "solver": ["admm", {"conjugate_gradients": {"tolerance": 1e-3}}],
}


def layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yield the linear layers of the blocks, with their names."""
    decoder = Decoder(model)
    for index in range(len(decoder.blocks)):
        for path in decoder.paths(index):
            yield decoder.name(index, path), decoder.layer(index, path)


@torch.no_grad()
def by_ggml(model: PreTrainedModel, importance: dict[str, Tensor] | None) -> PreTrainedModel:
    """Return the model with its layers as llama.cpp's quantiser leaves them, zeros kept as ggml keeps them."""
    for name, layer in layers(model):
        weights = None if importance is None else importance[name]
        layer.weight.copy_(torch.from_numpy(gguf.dequantize(packed(layer.weight, Q4_0, weights), Q4_0)))
    return model


def pruned(base: Setting, **settings: Any) -> PreTrainedModel:
    """Return a copy of the model after a run with these settings."""
    model = copy.deepcopy(base.loaded.model)
    prune(model, base.batches, Recipe({"units": "weights", "sparsity": 0.0, **settings}))
    return model


def rows(base: Setting) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Yield the name of each row and a function that makes its model."""
    dense = base.loaded.model

    def bits(solver: Any) -> dict[str, Any]:
        return {"kind": "q4_0", "solver": solver}

    yield "dense", lambda: dense
    yield "q4_0 of llama.cpp", lambda: by_ggml(copy.deepcopy(dense), None)
    yield "q4_0 of llama.cpp, importance matrix", partial(by_importance, base, lambda: dense)
    yield "round_to_nearest", lambda: pruned(base, bits=bits("round_to_nearest"), propagation="dense")
    yield "gptq, grid_descent, inputs of the rounded model", lambda: pruned(base, bits=bits(CHAIN))
    yield "gptq", lambda: pruned(base, bits=bits("gptq"), propagation="cross")
    yield "gptq, grid_descent", lambda: pruned(base, bits=bits(CHAIN), propagation="cross")
    metric = {"propagation": "cross", "metric": METRIC}
    yield "gptq, grid_descent, output metric", lambda: pruned(base, bits=bits(CHAIN), **metric)
    for name, recipe in (("ALPS", ALPS), ("sparse_best", ALPS | {"metric": METRIC, "allocation": "global"})):
        sparse = cache(partial(pruned, base, **recipe))
        yield f"2:4 ({name})", sparse
        yield f"2:4 ({name}), then q4_0 of llama.cpp, importance matrix", partial(by_importance, base, sparse)
        yield f"2:4 ({name}) with q4_0", partial(pruned, base, **recipe, bits=bits(CHAIN))


def by_importance(base: Setting, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Return a model as llama.cpp's quantiser leaves it, with an importance matrix of its own inputs."""
    squares = mean_squares(Decoder(copy.deepcopy(make())), base.batches)
    return by_ggml(copy.deepcopy(make()), squares)


def main() -> None:
    """Measure the rows, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo", help="demo, or the folder of another model")
    parser.add_argument("--only", nargs="*", help="names of rows to measure; others stay as they are in the table")
    options = parser.parse_args()
    base = setting(options.samples, options.seq_length, options.windows, options.seed, options.model)
    model_name = "SmolLM2-135M-Instruct" if options.model == "demo" else Path(options.model).name
    table = "bits" if options.model == "demo" else f"bits_{model_name}"
    title = (
        f"{model_name} in 4 bits: calibrated on {options.samples} windows of {options.seq_length} tokens of "
        f"news, evaluated on {options.windows} windows of other news, seed {options.seed}"
    )
    found = list[dict[str, Any]]()
    for name, make in rows(base):
        if options.only and name not in options.only:
            continue
        began = time.perf_counter()
        model = make()
        seconds = round(time.perf_counter() - began)
        evaluation = perplexity(model, base.windows)
        loss = round(math.log(evaluation.perplexity), 4)
        found.append({"weights of the blocks": name, "nats per token": loss, "seconds to make": seconds})
        every = with_earlier(table, found, ["weights of the blocks"])
        print(write_table(table, title, every).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
