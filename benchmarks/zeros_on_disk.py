"""Size of the pruned weights of SmolLM2 on the disk: as stored, compressed by zstd, and as a bitmap with the values.

`python -m benchmarks.zeros_on_disk` writes benchmarks/results/zeros_on_disk.md. The weights are those of the blocks
after the recipe sparsegpt, in bfloat16. Their bytes are compressed as they stand, and with those of equal place
together, since the sign and the exponent take few values.
"""

import argparse
import copy
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import Tensor

from benchmarks.common import Setting, setting, write_table
from optprune.models import Decoder
from optprune.pruning import prune
from optprune.recipe import load_recipe

ZEROS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "2:4": {"units": {"weights": "2:4"}},
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
}
LEVEL = 9
"""the level of zstd"""


def weights_of(base: Setting, settings: dict[str, Any] | None) -> Tensor:
    """Return the weights of the linear layers of all blocks, pruned, in bfloat16, as one vector."""
    model = copy.deepcopy(base.loaded.model)
    if settings is not None:
        prune(model, base.batches, load_recipe("sparsegpt", settings))
    decoder = Decoder(model)
    layers = (decoder.layer(i, path) for i in range(len(decoder.blocks)) for path in decoder.paths(i))
    return torch.cat([layer.weight.detach().reshape(-1) for layer in layers]).to(torch.bfloat16)


def compressed(data: bytes) -> int:
    """Return the number of bytes after zstd."""
    return len(pyarrow.Codec("zstd", LEVEL).compress(data, asbytes=True))


def row(zeros: str, weights: Tensor) -> dict[str, Any]:
    """Return the sizes as shares of the dense weights in bfloat16."""
    stored = weights.view(torch.int16).numpy().view(np.uint8).reshape(-1, 2)
    places = stored.any(1)
    kept, bitmap = stored[places], np.packbits(places)
    sizes = {
        "zstd": compressed(stored.tobytes()),
        "zstd, bytes apart": sum(compressed(byte.tobytes()) for byte in stored.T),
        "bitmap and values": bitmap.nbytes + kept.nbytes,
        "bitmap and values, zstd, bytes apart": compressed(bitmap.tobytes())
        + sum(compressed(byte.tobytes()) for byte in kept.T),
    }
    return {"zeros": zeros, **{name: f"{size / stored.nbytes:.1%}" for name, size in sizes.items()}}


def main() -> None:
    """Write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    base = setting(16, 256, 1, 0)
    rows = [row(zeros, weights_of(base, settings)) for zeros, settings in ZEROS.items()]
    title = f"Weights of the blocks of SmolLM2 on the disk, as shares of bfloat16; zstd at level {LEVEL}"
    print(write_table("zeros_on_disk", title, rows))


if __name__ == "__main__":
    main()
