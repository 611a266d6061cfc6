"""Folders of tiny models whose linear layers are quantised as published checkpoints are, packed number by number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.packed_experts import write_config
from tests.helpers.tiny_models import ALL_MODELS, save_tiny

Quantise = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""returns the tensors of a layer by the endings of their names, and the weight that they stand for, in float64"""
GROUP = 16
AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


def quantised_folder(
    place: Path, family: str, quantise: Quantise, config: dict[str, Any], **fields: Any
) -> tuple[Path, dict[str, Tensor]]:
    """Return a folder in bfloat16 with quantised linear layers in its blocks, and the weights that they stand for."""
    folder = save_tiny(ALL_MODELS[family](**fields).bfloat16(), place)
    return folder, quantise_layers(folder, quantise, config)


def quantise_layers(
    folder: Path, quantise: Quantise, config: dict[str, Any], start: str = "model.layers."
) -> dict[str, Tensor]:
    """Quantise the linear layers of blocks in a folder, and return the weights that they stand for."""
    file = folder / "model.safetensors"
    tensors, weights = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(file).items():
        if not (name.startswith(start) and name.endswith("_proj.weight")):
            tensors[name] = tensor
            continue
        parts, weights[name] = quantise(tensor.float())
        tensors |= {name.removesuffix(".weight") + ending: part.contiguous() for ending, part in parts.items()}
    save_file(tensors, file, {"format": "pt"})
    write_config(folder, quantization_config=config)
    return weights


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# -- FP8


def fp8(block: tuple[int, int], ending: str = ".weight_scale_inv") -> Quantise:
    """Quantise to FP8 with a scale for each block, of which those at the ends may be cut."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        scales = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
        numbers, meant = torch.zeros_like(weight).to(torch.float8_e4m3fn), weight.double().clone()
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                scales[i, j] = weight[here].abs().max() / 448
                numbers[here] = (weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
                meant[here] = numbers[here].double() * scales[i, j].double()
        return {".weight": numbers, ending: scales}, meant

    return quantise


def fp8_rows(scale_dtype: torch.dtype, one: bool = False) -> Quantise:
    """Quantise to FP8 with a scale for each row, or with one scale, as compressed-tensors does."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scales = (weight.abs().flatten()[None] if one else weight.abs()).amax(1, keepdim=True) / 400
        scales = scales.to(scale_dtype)
        numbers = (weight / scales.float()).to(torch.float8_e4m3fn)
        stored = scales.reshape(1) if one else scales
        return {".weight": numbers, ".weight_scale": stored}, numbers.double() * scales.double()

    return quantise


# -- integers in words


def word(integers: list[int], bits: int) -> int:
    """Return a word, as a signed number, that holds integers from its lowest bits on."""
    value = sum(integer << (bits * place) for place, integer in enumerate(integers))
    return value - (1 << 32) if value >= 1 << 31 else value


def in_words(rows: list[list[int]], bits: int, order: list[int] | None = None) -> Tensor:
    """Return rows of integers in words, filled up with zeros."""
    each = 32 // bits
    order = order or list(range(each))
    padded = [row + [0] * (-len(row) % each) for row in rows]
    return torch.tensor(
        [[word([row[at + one] for one in order], bits) for at in range(0, len(row), each)] for row in padded],
        dtype=torch.int32,
    )


def integers_of(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers [out, in], zero points [out, groups] and scales [out, groups] of a weight [out, in]."""
    parts = weight.unflatten(1, (-1, group))
    low, high = parts.amin(2), parts.amax(2)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    found = (parts / scales[..., None]).round() + zeros[..., None]
    return found.clamp(0, 2**bits - 1).flatten(1).int(), zeros.int(), scales


def meant_by(integers: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """Return the weight (integer - zero point) x scale of each column's group."""
    return (integers - zeros[:, groups]).double() * scales.double()[:, groups]


def gptq(bits: int = 4, less: int = 1, order: bool = False) -> Quantise:
    """Quantise as GPTQ stores it: words of inputs, zero points less one, and groups in any order."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        integers, zeros, scales = integers_of(weight, bits, GROUP)
        columns = weight.shape[1]
        groups = torch.arange(columns) // GROUP
        if order:
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        parts = {
            ".qweight": in_words(integers.tolist(), bits).t(),
            ".qzeros": in_words((zeros - less).t().tolist(), bits),
            ".scales": scales.t().half(),
            ".g_idx": groups.int(),
        }
        return parts, meant_by(integers, zeros, scales, groups)

    return quantise


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Quantise as AWQ stores it: words of eight outputs in an order of their own."""
    integers, zeros, scales = integers_of(weight, 4, GROUP)
    parts = {
        ".qweight": in_words(integers.t().tolist(), 4, AWQ),
        ".qzeros": in_words(zeros.t().tolist(), 4, AWQ),
        ".scales": scales.t().half(),
    }
    return parts, meant_by(integers, zeros, scales, torch.arange(weight.shape[1]) // GROUP)
