"""What matching a whole block costs: seconds over the floor, memory over that of a training step of the block.

    .venv/bin/python -m benchmarks.matching_cost                 # 64 windows of 512 tokens, blocks 0, 10, 20 and 29

The floor of a block is two passes of the calibration tokens through it and the Gram products of its four inputs (see
`benchmarks.floors`). Half of its weights are zero, 2:4 by size, or a quarter of its MLP units are gone, the last ones;
an eighth of the windows decides when to stop. The training step is AdamW's of torch on the dense block, of one
sequence, as matching's, and of four at once.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import setting, write_table
from benchmarks.floors import passed
from optprune.calibration import calibrating, first_inputs
from optprune.calibration.calls import Calls, calls_of
from optprune.calibration.stream import Stream
from optprune.measure.memory import memory_increase
from optprune.models import Decoder, Mlp
from optprune.models.surgery import keep_inputs, keep_outputs
from optprune.numerics.tensors import first_output
from optprune.pruning.refinement import match_block
from optprune.recipe import load_recipe
from optprune.report import RecoveredPart
from optprune.solvers import Adam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    given = setting(options.samples, options.seq_length, 1, 0)
    decoder = Decoder(given.loaded.model.float())
    rows = list[dict[str, Any]]()
    with calibrating(decoder):
        stream = first_inputs(decoder, given.batches)
        for index, block in enumerate(decoder.blocks[: max(options.blocks) + 1]):
            if index in options.blocks:
                rows += of_block(decoder, index, stream, options)
                print(rows[-1], flush=True)
            stream.past(stream.hidden.with_values(answers(block, stream)))
    print(write_table("matching_cost", "What matching a whole block costs", rows))


def of_block(decoder: Decoder, index: int, stream: Stream, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of epochs."""
    dense = decoder.blocks[index]
    taps = sorted({target.tap for target in load_recipe("wanda").units.candidates(decoder, index)})
    began = time.perf_counter()
    for _ in (*answers(dense, stream, taps), *answers(dense, stream)):
        pass
    floor = time.perf_counter() - began
    calls = calls_of(dense, "", stream)
    fit, apart = calls.split(max(1, len(calls.targets) // 8))
    steps = dict[str, float | None]()
    for tokens in (options.seq_length, fit.targets[0].shape[:2].numel()):
        block = copy.deepcopy(dense)
        steps[f"a training step of {tokens} tokens, MiB"] = increase(partial(train, block, fit, tokens))
    rows = []
    cases = [(pruned, int(epochs)) for pruned in PRUNED for epochs in options.epochs]
    for pruned, epochs in cases:
        part, taken = matched(PRUNED[pruned](decoder, index), fit, apart, epochs)
        rows.append(
            {
                "block": index,
                "pruned": pruned,
                "tokens": calls.tokens,
                "epochs": epochs,
                "floors": part.seconds / floor,
                "matching, s": part.seconds,
                "floor, s": floor,
                "error held out, before": part.held_out_before,
                "after": part.held_out_after,
                "memory, MiB": taken,
                **steps,
            }
        )
    return rows


def matched(block: nn.Module, fit: Calls, apart: Calls, epochs: int) -> tuple[RecoveredPart, float | None]:
    """A block matched, and the MiB that took."""
    found = list[RecoveredPart]()
    taken = increase(lambda: found.append(match_block(block, fit, apart, Adam(epochs))))
    return found[0], taken


def answers(block: nn.Module, stream: Stream, taps: Sequence[str] = ()) -> Iterator[Tensor]:
    """What leaves a block, batch by batch."""
    for hidden, arguments in zip(stream.hidden, stream.arguments, strict=True):
        yield passed(block, hidden, arguments, taps)


@torch.no_grad()
def halved(decoder: Decoder, index: int) -> nn.Module:
    """A copy of a block with two zeros in four neighbouring weights of every matrix, the smaller ones."""
    block = copy.deepcopy(decoder.blocks[index])
    for weight in block.parameters():
        if weight.ndim == 2:
            fours = weight.view(-1, 4)
            fours.scatter_(1, fours.abs().argsort(dim=1)[:, :2], 0.0)
    return block


def narrowed(decoder: Decoder, index: int) -> nn.Module:
    """A copy of a block with three quarters of its MLP units, the first ones."""
    block = copy.deepcopy(decoder.blocks[index])
    [layers] = Mlp().layers(decoder, index)
    linear = {path: part for path, part in block.named_modules() if isinstance(part, nn.Linear)}
    units = linear[layers.consumer].in_features
    kept = torch.arange(units) < units - units // 4
    keep_inputs(linear[layers.consumer], kept)
    for path in layers.producers:
        keep_outputs(linear[path], kept)
    return block


PRUNED = {"2:4": halved, "a quarter of the MLP": narrowed}


def train(block: nn.Module, calls: Calls, tokens: int) -> None:
    """Two steps of AdamW, of the first sequences of a call: the second has the moments of the first."""
    optimizer = torch.optim.AdamW(block.parameters())
    (args, kwargs), target = calls.arguments[0], calls.targets[0]
    sequences = slice(tokens // target.shape[1])
    for _ in range(2):
        optimizer.zero_grad()
        with torch.enable_grad():
            output = first_output(block(args[0][sequences], *args[1:], **kwargs))
            (output - target[sequences]).square().mean().backward()
        optimizer.step()


def increase(run: Callable[[], object]) -> float | None:
    taken = memory_increase(torch.device("cpu"), run)
    return None if taken is None else taken / 2**20


if __name__ == "__main__":
    main()
