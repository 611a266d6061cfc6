"""Folders of a tiny GPT-OSS with experts in MXFP4, as OpenAI's checkpoints hold them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.tiny_models import ALL_MODELS, save_tiny

EXPERTS = ("gate_up_proj", "down_proj")
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router", "lm_head"]}


def packed_folder(place: Path, **config: Any) -> Path:
    """A folder in bfloat16 whose experts are random bytes, with scales near those of a trained model."""
    folder = save_tiny(ALL_MODELS["gpt_oss"](intermediate_size=64, **config).bfloat16(), place)
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if not name.endswith(EXPERTS):
            tensors[name] = tensor
            continue
        count, inputs, outputs = tensor.shape
        groups = (count, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*groups, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, groups, generator=generator, dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    write_config(folder, quantization_config=CONFIG)
    return folder


def write_config(folder: Path, **fields: Any) -> None:
    """Set fields of the folder's config."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
