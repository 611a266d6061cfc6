"""Exporter of folders with 4-bit weights, in the format pack-quantized of compressed-tensors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import save_torch_state_dict
from jaxtyping import Int
from torch import Tensor

from optprune.errors import OptpruneError
from optprune.export.exporter import Draft, Exporter, ModelSource, OnEvent
from optprune.export.folder import write_configs, write_rest
from optprune.export.shards import MAX_SHARD_SIZE, tensors_of
from optprune.export.source_files import origin_of
from optprune.grids import GRIDS, Codes, Grid
from optprune.models import Decoder, is_stock, open_model
from optprune.models.quantised import Quantisation
from optprune.models.sources import file_bytes
from optprune.system.files import json_text
from optprune.system.wording import counted
from optprune.work import Work

GROUPS = (128, 64, 32, 16, 8)
"""numbers of weights that may share a scale, of which the largest that fits is taken"""
BITS = 4
PER_WORD = 32 // BITS
HALF = 2 ** (BITS - 1)
"""difference between a stored nibble and its integer"""
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class PackedFolder(Exporter):
    """Model folder whose linear layers on a 4-bit grid are packed, as `prune --bits w4a16` leaves them.

    Eight integers are in an int32, with a scale for each group of a row, and a zero point where the grid is shifted.
    The weights are those of the source, to the last bit. Layers that are on no such grid, embeddings and the head stay
    as they are, and are listed in the config. Stock transformers loads the folder with compressed-tensors installed.
    """

    name: ClassVar[str] = "compressed-tensors"
    description: ClassVar[str] = "a folder of 4-bit weights for vLLM and transformers"
    noun: ClassVar[str] = "packed model"

    max_shard_size: str = MAX_SHARD_SIZE
    """largest weights file"""

    def unsupported(self, source: ModelSource) -> str | None:
        architecture, config = source.shapes.architecture, source.config
        if architecture.transposed or architecture.mixture is not None or architecture.joined:
            return f"{config.model_type} models cannot be packed: their layers are not separate linear layers"
        if not is_stock(config):
            return "blocks that differ in shape cannot be packed: vLLM and compressed-tensors read stock shapes only"
        if getattr(config, "quantization_config", None) is not None:
            return "the model is quantised already: give the folder that it was made from"
        return None

    def write(self, source: ModelSource, draft: Path, on_event: OnEvent) -> Draft:
        loaded = source.loaded or open_model(source.name, device="cpu", scratch=draft.parent)
        decoder = loaded.decoder()
        packed = _Packed.of(decoder)
        write_configs(decoder.model, draft)
        for file in draft.glob("*.safetensors*"):
            file.unlink()
        save_torch_state_dict(dict(packed.tensors), draft, max_shard_size=self.max_shard_size)
        config = json.loads((draft / CONFIG).read_text(encoding="utf-8"))
        (draft / CONFIG).write_text(json_text({**config, "quantization_config": packed.config()}), encoding="utf-8")
        write_rest(loaded, draft, origin_of(source.name).licence_files)
        notes, kept = (), packed.plain
        if kept:
            notes = (f"{counted(len(kept), 'layer')} on no 4-bit grid, such as {kept[0]}, stay as they are",)
        summary = f"4 bits in groups of {packed.grid.block}, {counted(len(packed.layers), 'layer')}"
        return Draft(draft, file_bytes(str(draft)), summary, notes, expected=(decoder, packed))

    def check(self, source: ModelSource, draft: Draft, on_event: OnEvent) -> float | None:
        """Read every layer back, and compare it with the source bit by bit."""
        decoder, packed = draft.expected
        stored = Quantisation.of(packed.config()).open(draft.path, source.name).tensors
        for index in range(len(decoder.blocks)):
            with decoder.resident(index):
                for path in decoder.paths(index):
                    name = decoder.name(index, path)
                    if name in packed.layers:
                        found = stored[f"{name}.weight"].read()
                        if not torch.equal(found, decoder.layer(index, path).weight.detach().float()):
                            raise OptpruneError(f"{name} of the packed folder is not what was written: report this")
        return None

    def work(self, source: ModelSource) -> Work:
        decoder = source.shapes
        weights = sum(parameter.numel() for parameter in decoder.model.parameters())
        blocks = [decoder.weights_of(shape) for shape in decoder.shapes()]
        size = decoder.model.dtype.itemsize
        # All packed layers are in memory, with a block and what is outside of blocks.
        return Work(bytes=sum(blocks) * 0.6 + size * (weights - sum(blocks) + 4 * max(blocks)))


@dataclass(frozen=True, eq=False)
class _Packed:
    """Tensors of a packed folder."""

    grid: Grid
    """the grid of the packed layers"""
    tensors: Mapping[str, Tensor]
    """all tensors by their names in the folder"""
    layers: tuple[str, ...]
    """names of the packed layers"""
    plain: tuple[str, ...]
    """names of the linear layers of blocks that are not packed"""
    outside: tuple[str, ...]
    """names of the linear layers outside of blocks, such as the head"""

    @classmethod
    def of(cls, decoder: Decoder) -> "_Packed":
        """Return the tensors of a model, packed one block at a time. OptpruneError where no layer is on a grid."""
        grid, tensors, layers, plain = None, dict[str, Tensor](), list[str](), list[str]()
        for index in range(len(decoder.blocks)):
            with decoder.resident(index) as block:
                paths = set(decoder.paths(index))
                for name, value in block.state_dict().items():
                    path, whole = name.removesuffix(".weight"), decoder.name(index, name)
                    codes = None
                    if path in paths and name.endswith(".weight"):
                        codes, grid = _codes(value.detach().float(), grid)
                        (plain if codes is None else layers).append(whole.removesuffix(".weight"))
                    if codes is None or grid is None:
                        tensors[whole] = value.detach().clone()
                    else:
                        stem = whole.removesuffix("weight")
                        tensors |= {f"{stem}{key}": part for key, part in pack(codes, grid, value.dtype).items()}
        if grid is None:
            raise OptpruneError(
                "no layer is on a 4-bit grid: prune with --bits w4a16 first, and export the folder that this writes"
            )
        blocks = f"{decoder.architecture.blocks}."
        outside = {name: tensor for name, tensor in tensors_of(decoder).items() if not name.startswith(blocks)}
        return cls(grid, {**tensors, **outside}, tuple(layers), tuple(plain), tuple(_outside(decoder)))

    def config(self) -> dict[str, Any]:
        """Return the quantization_config of the folder, without a sparsity_config, which vLLM refuses."""
        weights = {
            "num_bits": BITS,
            "type": "int",
            "symmetric": not self.grid.shifted,
            "strategy": "group",
            "group_size": self.grid.block,
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": [*self.plain, *self.outside],
        }
        # transformers 5.25 reads packed zero points only where it decodes the weights as it loads them.
        return {**config, "dequantize": True} if self.grid.shifted else config


def _codes(weight: Tensor, grid: Grid | None) -> tuple[Codes | None, Grid | None]:
    """Return the codes of a layer, or None, and the grid of the folder, which its first layer on one decides."""
    plain = GRIDS["w4a16"]
    candidates = [replace(plain, block=size, shifted=shifted) for size in GROUPS for shifted in (False, True)]
    for each in [grid] if grid is not None else candidates:
        codes = each.codes(weight)
        if codes is not None:
            return codes, each
    return None, grid


def _outside(decoder: Decoder) -> Iterator[str]:
    """Yield the names of the linear layers outside the blocks."""
    blocks = f"{decoder.architecture.blocks}."
    for name, module in decoder.model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(blocks):
            yield name


def pack(codes: Codes, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer: weight_packed, weight_scale, weight_shape, and weight_zero_point if shifted.

    A word holds eight successive integers of a row, from its lowest bits, each raised by 8. The weight is
    (integer - zero point) x scale, with integers from -8 to 7.
    """
    zero = -HALF - codes.lows.int()
    integers = codes.integers.int()
    if grid.shifted:
        integers = integers + zero.repeat_interleave(grid.block, dim=1)
    found = {
        "weight_packed": _words(integers),
        "weight_scale": codes.scales.to(dtype),
        "weight_shape": torch.tensor(codes.integers.shape, dtype=torch.int64),
    }
    if grid.shifted:
        found["weight_zero_point"] = _words(zero.t()).t().contiguous()
    return found


def _words(integers: Int[Tensor, "rows columns"]) -> Int[Tensor, "rows words"]:
    """Return rows of integers from -8 to 7 in int32 words, filled up with zeros."""
    raised = torch.nn.functional.pad(integers.long() + HALF, (0, -integers.shape[1] % PER_WORD))
    places = BITS * torch.arange(PER_WORD)
    return (raised.unflatten(1, (-1, PER_WORD)) << places).sum(2).to(torch.int32)
