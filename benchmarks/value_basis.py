"""Value dimensions of real layers removed as coordinates and as directions: errors of the output projection.

    .venv/bin/python -m benchmarks.value_basis
    .venv/bin/python -m benchmarks.value_basis --share 0.5 --blocks 2 14 26

Moments of SmolLM2's output projections in the dense model: calibrated on one half of the news articles, held out from
the other. Coordinates go by exact elimination with swaps; directions by the nested basis, whose first are kept, and by
the one that is turned on for the number kept. Each is refitted to one loss (1 percent of the mean diagonal); errors are
without damping. The last columns are the errors of directions over those of coordinates.
"""

import argparse
import time
from functools import partial
from typing import Any

import torch

from benchmarks.common import setting, write_table
from optprune.calibration import calibrating, first_inputs
from optprune.calibration.moments_pass import collect
from optprune.models import Decoder, Values
from optprune.moments import InputMoments
from optprune.problems import Channels, LayerLoss, MaskedLeastSquares, Rotation, StructuredLeastSquares
from optprune.solvers import Restore, best_basis, nested_basis, solve

ON = ("calibration", "held out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.25, help="of the value dimensions, to remove")
    parser.add_argument("--blocks", type=int, nargs="*", help="default: all")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    here = setting(options.samples, options.seq_length, options.held_out, options.seed)
    decoder, apart = Decoder(here.loaded.model), [window[None] for window in here.windows]
    output, rows = decoder.architecture.output, list[dict[str, Any]]()
    with calibrating(decoder):
        stream = first_inputs(decoder, [*here.batches, *apart])
        for index, block in enumerate(decoder.blocks):
            following = stream.copy()
            seen = collect(block, stream, [output], held_out=len(apart), output=following)
            if options.blocks is None or index in options.blocks:
                [layers] = Values().layers(decoder, index)
                loss = LayerLoss.of(decoder.layer(index, output).weight, seen.moments[output], 0.01)
                rows.append(measured(index, loss, layers.channels, seen.held_out[output], options.share))
                print(rows[-1], flush=True)
            stream = following
    keys = [key for key in rows[0] if key != "block"]
    rows.append({"block": "mean", **{key: sum(row[key] for row in rows) / len(rows) for key in keys}})
    title = (
        f"Value dimensions of SmolLM2-135M-Instruct, {options.share:.0%} removed: relative errors of the output "
        f"projection, {options.samples * options.seq_length} calibration tokens of news, "
        f"{options.held_out * options.seq_length} held out, seed {options.seed}"
    )
    print(write_table("value_basis", title, rows))


def measured(block: int, loss: LayerLoss, channels: Channels, apart: InputMoments, share: float) -> dict[str, Any]:
    """The errors of one layer, calibrated and held out."""
    size = channels.units // channels.slot_count
    keep = round((1 - share) * size)
    held_out = LayerLoss.of(loss.weight, apart)
    began = time.perf_counter()
    by = {"coordinates": solve(StructuredLeastSquares(loss, channels, keep * channels.slot_count)).value}
    seconds = [time.perf_counter() - began]
    for name, basis in (("nested", nested_basis), ("turned", partial(best_basis, keep=keep))):
        began = time.perf_counter()
        by[name] = kept(loss, channels, basis(loss, channels), keep)
        seconds.append(time.perf_counter() - began)
    errors = {f"{name}, calibration": loss.relative_error(weight) for name, weight in by.items()}
    errors |= {f"{name}, held out": held_out.relative_error(weight) for name, weight in by.items()}
    ratios = {f"turned / coordinates, {on}": errors[f"turned, {on}"] / errors[f"coordinates, {on}"] for on in ON}
    return {"block": block, **errors, "coordinates, s": seconds[0], "turned, s": seconds[2], **ratios}


def kept(loss: LayerLoss, channels: Channels, rotation: Rotation, keep: int) -> torch.Tensor:
    """The refitted weight of the first directions of every slot, in the coordinates that there were."""
    first = torch.zeros(channels.units, dtype=torch.bool)
    first[channels.by_slot[:, :keep].reshape(-1)] = True
    turned = rotation.loss(loss)
    problem = MaskedLeastSquares(turned, channels.column_mask(first, loss.weight.shape[1]))
    return rotation.back(solve(problem, Restore()).value)


if __name__ == "__main__":
    main()
