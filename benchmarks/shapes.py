"""Folders with a config.json alone, of the published shapes of large models, for `optprune plan`.

.venv/bin/python -m benchmarks.shapes SHAPES
optprune plan SHAPES/llama3-8b --device cuda --no-probe
"""

import argparse
from pathlib import Path

import torch

from benchmarks.random_checkpoints import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, shape in SHAPES.items():
        config = shape.config(shape.blocks, shape.vocabulary)
        config.dtype = torch.bfloat16  # type: ignore[attr-defined]
        config.save_pretrained(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
