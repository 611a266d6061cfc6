"""Quantised checkpoints, read as floats layer by layer: FP8, compressed-tensors, ModelOpt, GPTQ and AWQ.

A layer is then several tensors in the files, which a format decodes together. MXFP4, of experts, is in mxfp4.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.models.checkpoint import Checkpoint, InFiles, StoredTensor, is_plain
from optprune.models.mxfp4 import float_pairs, is_packed, paired
from optprune.system.wording import either, shown

Parts = Mapping[str, Tensor]
"""the tensors of a layer, by the endings of their names"""
MXFP4 = "mxfp4"
"""the method that is read for experts alone"""
E4M3 = torch.float8_e4m3fn
UNUSED = (".input_scale", ".input_global_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale")
"""endings of tensors that quantise activations, which stay floats here"""
NVFP4_GROUP = 16
"""the columns that share a scale in NVFP4"""
FP8_BLOCK = (128, 128)
"""the rows and columns that share a scale in FP8 by blocks, where the config does not say it"""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""the order of columns in a packed word of AWQ, from its lowest bits"""


class Format(ABC):
    """A way in which several tensors hold the weight of a linear layer."""

    needed: ClassVar[tuple[str, ...]]
    """endings of the tensors that every layer has; the first one identifies the format"""
    optional: ClassVar[tuple[str, ...]] = ()
    """endings of tensors that a layer may have too"""
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    """the dtypes of a layer's first tensor"""

    def holds(self, name: str, dtype: torch.dtype) -> bool:
        """Return whether a tensor may be part of a layer in this format, by its name and its dtype."""
        if name.endswith(self.needed[0]):
            return dtype in self.dtypes
        return name.endswith((*self.needed, *self.optional))

    @abstractmethod
    def shape(self, parts: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """Return the shape [out, in] of a layer; ValueError where its tensors do not fit together."""

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """Return the weight [out, in] in float32."""


@final
@dataclass(frozen=True)
class ScaledFormat(Format):
    """Numbers of eight bits with a scale for each block: FP8 as in DeepSeek V3, and FP8 or integers otherwise.

    A weight is its number times the scale of its block. Blocks at the ends of a matrix may be cut.
    """

    needed: ClassVar[tuple[str, ...]] = (".weight",)
    optional: ClassVar[tuple[str, ...]] = (".weight_scale_inv", ".weight_scale")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (E4M3, torch.int8)

    block: tuple[int, int] | None = None
    """the rows and columns of a block; None has one scale for a row, or one for the matrix"""

    def shape(self, parts: Mapping[str, StoredTensor]) -> tuple[int, int]:
        rows, columns = parts[".weight"].shape
        self._block((rows, columns), self._scale(parts).shape)
        return rows, columns

    def decode(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        scale, weight = self._scale(parts).float(), parts[".weight"].float()
        down, across = self._block(shape, tuple(scale.shape))
        scale = scale.reshape(-(-shape[0] // down), -(-shape[1] // across))
        spread = scale.repeat_interleave(down, 0)[: shape[0]].repeat_interleave(across, 1)[:, : shape[1]]
        return weight * spread

    def _scale(self, parts: Mapping[str, Any]) -> Any:
        found = [parts[name] for name in self.optional if name in parts]
        if len(found) != 1:
            raise ValueError
        return found[0]

    def _block(self, shape: tuple[int, int], scales: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns that share a scale; ValueError for another number of scales."""
        if len(scales) == 4 and scales[1::2] == (1, 1):  # ModelOpt's, of blocks that are dimensions of the matrix
            scales = scales[::2]
        if scales in ((), (1,), (1, 1)):
            return shape
        if self.block is not None:
            cut = zip(shape, self.block, strict=True)
            if scales == tuple(-(-size // one) for size, one in cut):
                return self.block
        if self.block is None and scales in ((shape[0],), (shape[0], 1)):
            return 1, shape[1]
        raise ValueError


@final
@dataclass(frozen=True)
class WordsFormat(Format):
    """Integers of four or eight bits in words of 32, in the format pack-quantized of compressed-tensors.

    A weight is (integer - zero point) x scale, with a scale for each group of columns of a row.
    """

    needed: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale", ".weight_shape")
    optional: ClassVar[tuple[str, ...]] = (".weight_zero_point", ".weight_g_idx")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.int32,)

    bits: int

    def shape(self, parts: Mapping[str, StoredTensor]) -> tuple[int, int]:
        rows, columns = (int(size) for size in parts[".weight_shape"].read().tolist())
        scales, each = parts[".weight_scale"].shape, 32 // self.bits
        zero = parts.get(".weight_zero_point")
        fits = parts[".weight_packed"].shape == (rows, -(-columns // each)) and len(scales) == 2
        fits = fits and scales[0] == rows and scales[1] > 0 and columns % scales[1] == 0
        if not fits or (zero is not None and zero.shape != (-(-rows // each), scales[1])):
            raise ValueError
        return rows, columns

    def decode(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        integers = words(parts[".weight_packed"], self.bits).flatten(1)[:, : shape[1]]
        scale = parts[".weight_scale"].float()
        groups = _groups(parts.get(".weight_g_idx"), shape[1], scale.shape[1])
        zero = torch.full(scale.shape, 2 ** (self.bits - 1))
        if ".weight_zero_point" in parts:
            zero = words(parts[".weight_zero_point"].t(), self.bits).flatten(1)[:, : shape[0]].t()
        return (integers - zero[:, groups]).float() * scale[:, groups]


@dataclass(frozen=True)
class FloatPairsFormat(Format):
    """Floats of four bits, two in a byte, with FP8 scales of a group and one scale for the matrix: NVFP4."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.uint8,)

    group: int

    def shape(self, parts: Mapping[str, StoredTensor]) -> tuple[int, int]:
        packed, scales, whole = (parts[name].shape for name in self.needed)
        rows, pairs = packed
        if scales != (rows, 2 * pairs // self.group) or 2 * pairs % self.group or whole not in ((), (1,)):
            raise ValueError
        return rows, 2 * pairs

    def decode(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        packed, scales, whole = (parts[name] for name in self.needed)
        scale = self._scale(scales.float(), whole.float())
        return float_pairs(packed).flatten(1) * scale.repeat_interleave(self.group, 1)

    @abstractmethod
    def _scale(self, scales: Tensor, whole: Tensor) -> Tensor:
        """Return the scale of each group from its own and the matrix's."""


@final
@dataclass(frozen=True)
class CompressedPairs(FloatPairsFormat):
    """NVFP4 of compressed-tensors: a weight is its number times the scale of its group, over that of the matrix."""

    needed: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale", ".weight_global_scale")

    def _scale(self, scales: Tensor, whole: Tensor) -> Tensor:
        return scales / whole


@final
@dataclass(frozen=True)
class ModelOptPairs(FloatPairsFormat):
    """NVFP4 of ModelOpt: a weight is its number times the scale of its group, times that of the matrix."""

    needed: ClassVar[tuple[str, ...]] = (".weight", ".weight_scale", ".weight_scale_2")

    def _scale(self, scales: Tensor, whole: Tensor) -> Tensor:
        return scales * whole


@final
@dataclass(frozen=True)
class ColumnWordsFormat(Format):
    """Integers of four or eight bits in words of 32, as GPTQ (packed along inputs) and AWQ (along outputs) hold them.

    A weight [in, out] is (integer - zero point) x scale, with a scale for each group of inputs of an output.
    """

    needed: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales")
    optional: ClassVar[tuple[str, ...]] = (".g_idx",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.int32,)

    bits: int
    along_inputs: bool
    """whether a word holds successive inputs of an output, as in GPTQ, and not outputs of an input"""
    raised: int = 0
    """what is added to each stored zero point: 1 in the first version of GPTQ"""
    order: tuple[int, ...] | None = None
    """the columns in a word; None for successive ones"""

    def shape(self, parts: Mapping[str, StoredTensor]) -> tuple[int, int]:
        packed, zeros, scales = (parts[name].shape for name in self.needed)
        each = 32 // self.bits
        if not len(packed) == len(zeros) == len(scales) == 2:
            raise ValueError
        groups, outputs = scales
        inputs, found = (packed[0] * each, packed[1]) if self.along_inputs else (packed[0], packed[1] * each)
        if found != outputs or zeros != (groups, -(-outputs // each)) or not groups:
            raise ValueError
        if ".g_idx" in parts and parts[".g_idx"].shape != (inputs,):
            raise ValueError
        return outputs, inputs

    def decode(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        outputs, inputs = shape
        packed = parts[".qweight"]
        integers = words(packed.t(), self.bits).flatten(1) if self.along_inputs else self._along(packed).t()
        zero = (self._along(parts[".qzeros"])[:, :outputs] + self.raised) & (2**self.bits - 1)
        scale = parts[".scales"].float()
        groups = _groups(parts.get(".g_idx"), inputs, len(scale))
        return (integers - zero.t()[:, groups]).float() * scale.t()[:, groups]

    def _along(self, packed: Tensor) -> Tensor:
        """Return the integers of words that hold outputs, in their order."""
        found = words(packed, self.bits)
        if self.order is not None:
            found = found[:, :, torch.tensor(self.order).argsort()]
        return found.flatten(1)


def words(packed: Tensor, bits: int) -> Tensor:
    """Return the integers [rows, words, 32 / bits] in words [rows, words] of 32 bits, from the lowest bits on."""
    places = bits * torch.arange(32 // bits)
    return ((packed.long()[:, :, None] >> places) & (2**bits - 1)).int()


def _groups(given: Tensor | None, columns: int, count: int) -> Tensor:
    """Return the number of the group of each column."""
    if given is None or bool((given < 0).any()):  # groups that were not set
        return torch.arange(columns) * count // columns
    return given.long()


@dataclass(frozen=True)
class QuantisedTensor:
    """The weight [out, in] of a linear layer that several tensors in files hold together."""

    parts: Mapping[str, StoredTensor]
    """the tensors, by the endings of their names"""
    format: Format
    stored: tuple[int, int]
    """the shape [out, in]"""
    turned: bool = False
    """whether the matrix is given as [in, out]"""
    taken: range | None = None
    """the rows that it consists of; None for all"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        rows, columns = self.stored[::-1] if self.turned else self.stored
        return (rows if self.taken is None else len(self.taken), columns)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is read."""
        return torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(dict.fromkeys(part.file for part in self.parts.values()))

    def item(self, number: int) -> Self:
        """Raise NotImplementedError, since these formats hold the experts of a mixture one by one."""
        raise NotImplementedError

    def transposed(self) -> Self:
        """Return the transposed matrix."""
        assert self.taken is None
        return replace(self, turned=not self.turned)

    def rows(self, taken: range) -> Self:
        """Return some of the rows."""
        assert self.taken is None
        return replace(self, taken=taken)

    def read(self) -> Tensor:
        """Return the weight; damaged numbers give NaN or infinity, which the users of a weight refuse."""
        found = self.format.decode({name: part.read() for name, part in self.parts.items()}, self.stored)
        found = found.t().contiguous() if self.turned else found
        return found if self.taken is None else found[self.taken.start : self.taken.stop : self.taken.step].clone()


@dataclass(frozen=True)
class Quantisation:
    """The method by which a checkpoint is quantised, as its config says."""

    method: str
    """the name of the method, "" where none is given"""
    formats: tuple[Format, ...] = ()
    """the formats in which layers may be; none where the method is not read, or is read for experts alone"""
    reason: str = ""
    """why the method is not read, where that is known"""

    @classmethod
    def of(cls, config: Any) -> Self:
        """Return the method of a quantization_config."""
        fields = config if isinstance(config, dict) else config.to_dict()
        method = str(fields.get("quant_method") or "")
        try:
            return cls(method, METHODS[method](fields) if method in METHODS else ())
        except (InputError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            return cls(method, (), str(error) if isinstance(error, InputError) else "its settings are not known")

    @property
    def name(self) -> str:
        """The method in words."""
        return self.method or "by an unnamed method"

    def check(self, source: str, experts: Sequence[str]) -> None:
        """Raise InputError unless checkpoints of this method are read; `experts` are the methods for experts."""
        if self.formats or self.method in experts:
            return
        named = self.name + (f", {self.reason}" if self.reason else "")
        raise InputError(
            f"the checkpoint {source} is quantised ({named}), which is not read: load the unquantised original, or "
            f"one in {either([*METHODS])}"
        )

    def open(self, folder: str | Path, source: str) -> Checkpoint:
        """Return the checkpoint of a folder or hub name with its layers as floats."""
        if self.method == MXFP4:
            checkpoint = Checkpoint.open(folder, source, is_packed)
            return replace(checkpoint, tensors=paired(checkpoint.tensors, source))
        checkpoint = Checkpoint.open(folder, source, self.readable)
        return replace(checkpoint, tensors=self.layers(checkpoint.tensors, source))

    def readable(self, name: str, dtype: torch.dtype) -> bool:
        """Return whether a tensor is plain or may be part of a quantised layer, by its name and its dtype."""
        return is_plain(name, dtype) or name.endswith(UNUSED) or any(one.holds(name, dtype) for one in self.formats)

    def layers(self, tensors: Mapping[str, InFiles], source: str) -> dict[str, InFiles]:
        """Return the tensors with one of floats for each layer; InputError where parts of one do not fit together."""
        found = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNUSED)}
        for each in self.formats:
            first = each.needed[0]
            for name in [name for name in found if name.endswith(first) and found[name].dtype in each.dtypes]:
                stem = name.removesuffix(first)
                parts = {end: found.pop(f"{stem}{end}", None) for end in (*each.needed, *each.optional)}
                there = {end: part for end, part in parts.items() if isinstance(part, StoredTensor)}
                try:
                    if any(end not in there for end in each.needed):
                        raise ValueError
                    found[f"{stem}.weight"] = QuantisedTensor(there, each, each.shape(there))
                except ValueError:
                    raise InputError(
                        f"{stem} of {source} is in {self.method}, but its numbers and scales do not fit together: "
                        "fetch the weights again"
                    ) from None
        return found


# -- the formats of each method, by its settings


def _fp8(fields: Mapping[str, Any]) -> tuple[Format, ...]:
    """Return the formats of FP8 with scales of blocks, as in DeepSeek V3 (arXiv 2412.19437)."""
    if fields.get("expert_dtype", "fp8") != "fp8" or fields.get("scale_fmt", "float") not in ("float", "ue8m0", None):
        raise InputError("with experts in another format than FP8, or scales in one that is not known")
    block = fields.get("weight_block_size", FP8_BLOCK)
    return (ScaledFormat(None if block is None else (int(block[0]), int(block[1]))),)


def _compressed_tensors(fields: Mapping[str, Any]) -> tuple[Format, ...]:
    """Return the formats of compressed-tensors: weights in eight bits, or packed integers of four or eight."""
    if fields.get("sparsity_config") or fields.get("transform_config"):
        raise InputError("with sparse or transformed weights")
    formats = list[Format]()
    for group in fields["config_groups"].values():
        kind = str(group.get("format") or fields["format"])
        weights = group["weights"]
        if kind == "nvfp4-pack-quantized" and weights["num_bits"] == 4:
            formats.append(CompressedPairs(int(weights["group_size"])))
        elif kind == "pack-quantized":
            formats.append(WordsFormat(_bits(weights["num_bits"])))
        elif kind in ("float-quantized", "int-quantized", "naive-quantized") and weights["num_bits"] == 8:
            formats.append(ScaledFormat(_scaled_block(weights)))
        else:
            raise InputError(f"in the format {shown(kind)}")
    return tuple(dict.fromkeys(formats))


def _scaled_block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a block of scaled numbers; None where a row or the matrix has one scale."""
    if not weights.get("symmetric", True):
        raise InputError("with zero points beside numbers of eight bits")
    if weights["strategy"] == "block":
        return int(weights["block_structure"][0]), int(weights["block_structure"][1])
    if weights["strategy"] == "group":
        return 1, int(weights["group_size"])
    if weights["strategy"] not in ("channel", "tensor"):
        raise InputError(f"with a scale for each {shown(weights['strategy'])}")
    return None


def _modelopt(fields: Mapping[str, Any]) -> tuple[Format, ...]:
    """Return the formats of ModelOpt: FP8 with a scale for the matrix, each row or each block, and NVFP4."""
    algorithm = str(fields["quant_algo"]).upper()
    group = next(iter(fields.get("config_groups", {"": {}}).values())).get("weights", {}).get("group_size")
    if algorithm == "NVFP4":
        return (ModelOptPairs(int(group or fields.get("group_size") or NVFP4_GROUP)),)
    if algorithm == "FP8_PB_WO":
        return (ScaledFormat(FP8_BLOCK),)
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return (ScaledFormat(),)
    raise InputError(f"by the algorithm {shown(algorithm)}")


def _gptq(fields: Mapping[str, Any]) -> tuple[Format, ...]:
    """Return the format of GPTQ, whose first version stores zero points less one (v2 does not)."""
    first = fields.get("checkpoint_format", "gptq") != "gptq_v2"
    return (ColumnWordsFormat(_bits(fields["bits"]), along_inputs=True, raised=int(first)),)


def _awq(fields: Mapping[str, Any]) -> tuple[Format, ...]:
    """Return the format of AWQ's version gemm, whose words hold outputs in an order of their own."""
    version = str(fields.get("version", "gemm")).lower()
    if version != "gemm" or fields.get("bits") != 4:
        raise InputError(f"in the version {shown(version)} with {shown(fields.get('bits'))} bits")
    return (ColumnWordsFormat(4, along_inputs=False, order=AWQ_ORDER),)


def _bits(given: Any) -> int:
    if given not in (4, 8):
        raise InputError(f"with {shown(given)} bits")
    return int(given)


METHODS: Mapping[str, Callable[[Mapping[str, Any]], tuple[Format, ...]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}
"""the methods that are read for linear layers, by their names in a quantization_config"""
