"""Folders with a config.json alone, of the published shapes of large models, for `optprune plan`.

.venv/bin/python -m benchmarks.shapes SHAPES
optprune plan SHAPES/llama3-8b --device cuda --no-probe
"""

import argparse
from pathlib import Path

from transformers import LlamaConfig

SHAPES = {
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama3-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
COMMON = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "dtype": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, shape in SHAPES.items():
        LlamaConfig(**shape, **COMMON).save_pretrained(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
