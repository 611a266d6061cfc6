"""What it takes to write the problem of a down projection, at the shapes of an 8B model divided by four.

usage: python -m tests.helpers.problem_memory FOLDER: print the bytes beside the model, and those of the problem
"""

import sys
from pathlib import Path

import torch

import optprune
from benchmarks.tiny_models import tiny_llama
from optprune.measure.memory import memory_increase
from optprune.pruning.saved_problems import save_problems


def main() -> None:
    model = tiny_llama(num_hidden_layers=1, hidden_size=1024, intermediate_size=3584)
    recipe = optprune.load_recipe("wanda")
    folder, batches = Path(sys.argv[1]), [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))]

    def write(layer: str) -> None:
        save_problems(model, batches, recipe, folder, layers=layer)

    # What libraries keep for themselves comes with their first use.
    write("*.q_proj")
    taken = memory_increase(torch.device("cpu"), lambda: write("*.down_proj"))
    problem = optprune.load_problem(folder / "model.layers.0.mlp.down_proj.safetensors")
    print(taken, problem.loss.moments.covariance.nbytes + problem.loss.weight.nbytes)


if __name__ == "__main__":
    main()
