"""The speed-up of workers: a run in one process, and by processes side by side, each with one thread.

    .venv/bin/python -m benchmarks.side_by_side --recipe alps --workers 2

The model has random weights in the shape of the demo model's blocks (hidden 576, MLP 1536). The time of a run with
workers is that of the whole run, the start of the processes included; the weights are compared bit by bit. Beside the
time is that of the processors: where others use the machine too, workers that keep all of them busy would be as many
times as fast as there are workers, but for what the processors do more.
"""

import argparse
import copy
import os
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optprune import load_recipe
from optprune.pruning import prune, workers_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="alps")
    parser.add_argument("--propagation", default="intra")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1, help="of both, in turn; the median of the ratios is told")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe, dense = load_recipe(options.recipe, {"propagation": options.propagation}), model(options.blocks)
    windows = (options.samples, options.seq_length)
    batches = torch.randint(0, 4096, windows, generator=torch.Generator().manual_seed(0)).split(4)
    ratios = []
    for _ in range(options.rounds):
        seconds, spent, found = [], [], []
        for workers in (workers_of(recipe.propagation), workers_of(recipe.propagation, options.workers)):
            found.append(copy.deepcopy(dense))
            began, busy = time.perf_counter(), processors()
            prune(found[-1], batches, recipe, workers=workers)
            seconds.append(time.perf_counter() - began)
            spent.append(processors() - busy)
            print(f"{seconds[-1]:.1f} s, of the processors {spent[-1]:.1f} s", flush=True)
        one, other = (each.state_dict() for each in found)
        same = all(torch.equal(one[name], other[name]) for name in one)
        ratios.append(seconds[0] / seconds[1])
        print(
            f"{options.recipe}, {options.blocks} blocks: {seconds[0]:.1f} s alone, {seconds[1]:.1f} s with "
            f"{options.workers} workers, {ratios[-1]:.2f} times as fast, at most "
            f"{options.workers * spent[0] / spent[1]:.2f} by the processors, {'the same' if same else 'OTHER'} bytes",
            flush=True,
        )
    print(f"median {torch.tensor(ratios).median():.2f}")


def processors() -> float:
    """The seconds that processors have spent on this process and on those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def model(blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        vocab_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
