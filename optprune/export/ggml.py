"""Weights packed into GGUF's types: by ggml's own quantiser, which rounds by an importance of the columns, or exactly.

ggml is the library of tensors in llama.cpp. Its functions are called in the shared object of the package xllamacpp,
which exports them. Types that gguf's own functions pack need no such package: f32, f16, and q8_0.
"""

import ctypes
from functools import cache
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from optprune.errors import InputError, OptpruneError
from optprune.grids import GRIDS, Codes
from optprune.measure.llama_cpp_binding import binding
from optprune.numerics.tensors import all_finite
from optprune.system.wording import install

WITHOUT_GGML = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0)
"""types that gguf's functions pack as ggml does; the rounding of q8_0 does not depend on an importance"""
FLOOR = 1e-6
"""least importance of a column, as a share of the mean: ggml divides by sums of importances"""
SCALES = {
    **dict.fromkeys((GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0), (0,)),
    **dict.fromkeys((GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q5_1), (0, 2)),
    **dict.fromkeys((GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K), (0, 2)),
    GGMLQuantizationType.Q2_K: (80, 82),
    GGMLQuantizationType.Q3_K: (108,),
    GGMLQuantizationType.Q6_K: (208,),
}
"""places of the float16 numbers in a block, in bytes; the others are whole numbers. Source: ggml-common.h"""

MOST = 65_504 * 127 * 32
"""bound of the numbers that any type but f32 holds: the largest scale of scales in q6_K, with the largest integers"""
PLAIN = {GGMLQuantizationType.F32: "f4", GGMLQuantizationType.F16: "f2", GGMLQuantizationType.F64: "f8"}
"""numpy's names of types without blocks"""
BF16_INFINITY = 0x7F80
"""bits of the exponent of bfloat16, all of which are set in infinity and NaN"""


class BeyondType(InputError):
    """Error for a weight with a number that its type in a file cannot hold."""


def packed(weight: Tensor, kind: GGMLQuantizationType, importance: Tensor | None = None) -> NDArray[np.uint8]:
    """Return a weight [..., columns] in a type of GGUF, as bytes [..., bytes of a row].

    `importance` [columns], or [experts, columns] for a weight [experts, rows, columns], says how much the squared error
    of each column counts: the mean square of its input. Types of `WITHOUT_GGML` do not use it. A weight that is on the
    grid of its type already, as after a recipe with bits, is packed exactly. Raises InputError for a row whose length
    the type does not take, for NaN, and where xllamacpp is needed and not installed, and BeyondType for a number that
    would be infinite in the file.
    """
    if not all_finite(weight):
        raise InputError("a weight holds NaN or infinity, which has no place in a file: prune again")
    plain = weight.to(torch.float32).contiguous()
    # ggml's sums of squares would overflow too.
    within = all_finite(plain) and (kind == GGMLQuantizationType.F32 or float(plain.abs().max()) < MOST)
    found = _packed(plain, kind, importance) if within else None
    if found is None or not is_finite(found, kind):
        raise BeyondType(f"{float(weight.abs().max()):.6g} is beyond the numbers that {kind.name.lower()} holds")
    return found


def is_finite(data: NDArray[Any], kind: GGMLQuantizationType, order: str = "<") -> bool:
    """Return whether all numbers are finite that the bytes of a tensor stand for, in an order of bytes (< or >).

    Of blocks only the scales are looked at, where their places are known.
    """
    if data.dtype.kind == "f":
        return bool(np.isfinite(data).all())
    if kind == GGMLQuantizationType.BF16:
        return bool((np.ascontiguousarray(data).view(f"{order}u2") & BF16_INFINITY != BF16_INFINITY).all())
    if kind in PLAIN:
        return bool(np.isfinite(np.ascontiguousarray(data).view(f"{order}{PLAIN[kind]}")).all())
    if kind in SCALES:
        blocks = np.ascontiguousarray(data).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
        scales = [np.ascontiguousarray(blocks[:, at : at + 2]).view(f"{order}f2") for at in SCALES[kind]]
        return all(bool(np.isfinite(each).all()) for each in scales)
    return True


def _packed(plain: Tensor, kind: GGMLQuantizationType, importance: Tensor | None) -> NDArray[np.uint8]:
    """Return a finite weight in float32 as bytes, which may stand for infinite numbers."""
    codes = codes_of(plain, kind)
    if codes is not None:
        return pack(codes, kind).reshape(*plain.shape[:-1], -1)
    if kind in WITHOUT_GGML:
        with np.errstate(all="ignore"):  # what is beyond the type is looked for afterwards
            return np.ascontiguousarray(gguf.quantize(plain.numpy(), kind)).view(np.uint8)
    matrices = plain.reshape(-1, *plain.shape[-2:])
    # ggml reads as many importances as there are columns, whatever there is.
    if importance is not None and importance.shape[-1] != plain.shape[-1]:
        raise OptpruneError(f"{importance.shape[-1]} importances for {plain.shape[-1]} columns: please report this")
    every = [None] * len(matrices) if importance is None else _floored(importance, len(matrices))
    parts = [_quantised(matrix.numpy(), kind, one) for matrix, one in zip(matrices, every, strict=True)]
    return np.concatenate(parts).reshape(*plain.shape[:-1], -1)


def codes_of(weight: Tensor, kind: GGMLQuantizationType) -> Codes | None:
    """Return the codes of a float32 weight [..., columns] that is on the grid of a type; None where it is not."""
    grid = GRIDS.get(kind.name.lower())
    return None if grid is None or weight.ndim < 2 else grid.codes(weight.flatten(0, -2))


def pack(codes: Codes, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Return codes as bytes [rows, bytes of a row] of q4_0, q5_0 or q8_0.

    A block is its scale in float16 and its 32 integers: in a byte each, or 4 bits of the first and the second 16 in a
    byte, after the fifth bits of all in q5_0. Source: the blocks of ggml-common.h.
    """
    grid = GRIDS[kind.name.lower()]
    scales = codes.scales.to(torch.float16).numpy()[..., None].view(np.uint8)
    integers = codes.integers.numpy().reshape(*codes.scales.shape, grid.block)
    if kind == GGMLQuantizationType.Q8_0:
        parts = [scales, integers.astype(np.int8).view(np.uint8)]
    else:
        raised = (integers - grid.lowest).astype(np.uint8)
        low, high = np.split(raised & 15, 2, axis=-1)
        fifth = [np.packbits(raised >> 4, axis=-1, bitorder="little")] if grid.bits == 5 else []
        parts = [scales, *fifth, low | high << 4]
    return np.concatenate(parts, axis=-1).reshape(len(scales), -1)


def check_ggml(kinds: set[GGMLQuantizationType]) -> None:
    """Raise InputError where one of the types needs xllamacpp, and it is not installed."""
    if kinds - set(WITHOUT_GGML):
        binding()


def _floored(importance: Tensor, count: int) -> list[NDArray[np.float32]]:
    """Return the importance of each of so many matrices, [columns] each, with no zeros in it."""
    every = importance.double().reshape(-1, importance.shape[-1]).expand(count, -1)
    # A matrix whose inputs were zero on every token has no importance: all of its columns count the same.
    floors = (FLOOR * every.mean(1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    return [row.float().contiguous().numpy() for row in every.maximum(floors)]


def _quantised(
    matrix: NDArray[np.float32], kind: GGMLQuantizationType, importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Return a matrix [rows, columns] packed by ggml_quantize_chunk, [rows, bytes of a row]."""
    rows, columns = matrix.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if columns % block:
        raise InputError(f"rows of {columns} numbers are no multiple of {block}, as {kind.name.lower()} needs")
    found = np.empty((rows, columns // block * size), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = _library().ggml_quantize_chunk(
        int(kind), matrix.ctypes.data, found.ctypes.data, 0, rows, columns, weights
    )
    if written != found.nbytes:
        raise OptpruneError(f"ggml wrote {written} bytes in place of {found.nbytes}: please report this")
    return found


@cache
def _library() -> Any:
    """Return ggml's functions. Raises InputError where xllamacpp lacks them."""
    own: Any = binding()
    library = ctypes.CDLL(own.xllamacpp.__file__)
    try:
        quantise = library.ggml_quantize_chunk
    except AttributeError as error:
        raise InputError(f"this xllamacpp does not export ggml's quantiser ({error}): {install('llama')}") from error
    quantise.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantise.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return library
