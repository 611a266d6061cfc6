"""What pruning one block takes, beside what is held before it, and what the plan says of it.

usage: python -m tests.helpers.planned_block: print JSON with a pair of bytes, measured and planned, for each regime
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiny_models import tiny_llama
from optprune.calibration import calibrating, first_inputs
from optprune.measure.memory import memory_increase
from optprune.models import Decoder
from optprune.program import Program
from optprune.program.memory import parts_of
from optprune.pruning.block import BlockTask, prune_block
from optprune.recipe import Recipe
from tests.helpers.programs import program_of

SQUARE = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 768}
NARROW = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 2048}
HEADS = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 64}
SPARSE: dict[str, Any] = {"units": "weights", "sparsity": 0.5}
REGIMES: dict[str, tuple[dict[str, int], dict[str, Any], int]] = {
    "hidden states": (NARROW, {**SPARSE, "solver": "magnitude", "propagation": "intra"}, 1024),
    "moments": (WIDE, {"units": "mlp", "solver": "fasp_metric"}, 4),
    "permuted inputs": (
        WIDE,
        {**SPARSE, "units": {"weights": "2:4"}, "permuted": True, "solver": "magnitude", "propagation": "intra"},
        4,
    ),
    "directions": (HEADS, {"units": "rotated-vo", "solver": "fasp_metric"}, 4),
    "workspace": (SQUARE, {**SPARSE, "solver": {"admm": {"most": 6}}}, 4),
}
"""the config, the recipe and the number of sequences, by what takes the most memory then"""
LENGTH = 128


def pair(config: Mapping[str, int], fields: dict[str, Any], samples: int) -> tuple[int, int]:
    """The bytes measured and planned."""
    recipe = Recipe(fields)
    decoder = Decoder(tiny_llama(num_hidden_layers=1, **config))
    ids = torch.randint(0, 500, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    program = program_of(recipe, samples, decoder, length=LENGTH, whole=True)
    rows = program.batch_tokens // LENGTH
    # Before the run, which narrows the model that the plan is of.
    parts = [part for part in parts_of(program, "pruning", 0, 0) if part.where != "disk"]
    planned = sum(part.bytes for part in parts) - program.resident_bytes
    return memory_increase(torch.device("cpu"), lambda: _prune(decoder, program, list(ids.split(rows)))) or 0, planned


def _prune(decoder: Decoder, program: Program, batches: list[Tensor]) -> None:
    with calibrating(decoder):
        path = program.policy.start(first_inputs(decoder, batches))
        task = BlockTask(block=program.example, method=program.method, path=path, metrics={})
        prune_block(decoder, task, lambda event: None)


def main() -> None:
    torch.set_num_threads(1)
    # What libraries keep for themselves comes with their first use.
    pair(NARROW, {**SPARSE, "solver": "admm"}, 4)
    print(json.dumps({name: pair(*regime) for name, regime in REGIMES.items()}))


if __name__ == "__main__":
    main()
