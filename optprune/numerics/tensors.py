"""Functions of tensors: checks, selections that do not wait for the device, a divergence, and safetensors files."""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError, check_kind

FLOATS = (torch.float32, torch.float64)
"""the dtypes in which problems are solved"""
WIDER = (torch.bfloat16, torch.float32)
"""the dtypes whose range is wider than that of float16"""


def check_tensor(what: str, value: Tensor, shape: Sequence[int | str]) -> None:
    """Raise InputError unless a value is a dense tensor of a shape; a size that is a name stands for any but 0."""
    check_kind(what, value, Tensor, "give a torch tensor, which torch.as_tensor makes of numbers")
    if value.layout != torch.strided:
        raise InputError(f"{what} is stored as {value.layout}: convert it to a dense tensor, by .to_dense()")
    fits = len(shape) == value.ndim and all(
        size > 0 if isinstance(wanted, str) else size == wanted for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise InputError(f"{what} must be [{', '.join(map(str, shape))}], not {list(value.shape)}")


def check_floats(what: str, value: Tensor, shape: Sequence[int | str], like: Tensor | None = None) -> None:
    """Raise InputError unless a value is a float32 or float64 tensor of a shape, as another is and where it is."""
    check_tensor(what, value, shape)
    if value.dtype not in FLOATS:
        raise InputError(f"{what} must be torch.float32 or torch.float64, not {value.dtype}: convert it, by .float()")
    if like is not None and value.dtype != like.dtype:
        raise InputError(f"{what} is {value.dtype}, but the rest is {like.dtype}: convert one of them, by .to()")
    _check_device(what, value, like)


def check_real(what: str, value: Tensor, shape: Sequence[int | str]) -> None:
    """Raise InputError unless a value is a tensor of real numbers, of any precision, of a shape."""
    check_tensor(what, value, shape)
    if not value.is_floating_point():
        raise InputError(f"{what} must be real numbers, not {value.dtype}: convert it, by .float()")


def check_mask(what: str, value: Tensor, shape: Sequence[int | str], like: Tensor | None = None) -> None:
    """Raise InputError unless a value is a bool tensor of a shape, on the device of another."""
    check_tensor(what, value, shape)
    if value.dtype != torch.bool:
        raise InputError(f"{what} must be torch.bool, not {value.dtype}: compare it, as in mask != 0")
    _check_device(what, value, like)


def as_indices(what: str, value: Tensor, shape: Sequence[int | str], like: Tensor | None = None) -> Tensor:
    """Return a tensor of whole numbers of any size, as torch takes indices: in int64.

    InputError for other tensors, of another shape or not on the device of another tensor.
    """
    check_tensor(what, value, shape)
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise InputError(f"{what} must be whole numbers, not {value.dtype}: convert them, by .long()")
    _check_device(what, value, like)
    return value.long()


def _check_device(what: str, value: Tensor, like: Tensor | None) -> None:
    if like is not None and value.device != like.device:
        raise InputError(f"{what} is on {value.device}, but the rest is on {like.device}: move one of them, by .to()")


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite.

    A finite sum proves it in one fast pass. A sum that overflows needs a second pass.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def rounded(what: str, value: Tensor, dtype: torch.dtype, advice: str) -> Tensor:
    """Return a weight in another dtype. Raises InputError where one of its numbers becomes infinite.

    The error gives the advice, such as "save it as", with the names of wider dtypes.
    """
    found = value.to(dtype)
    if dtype in (torch.float64, value.dtype) or not dtype.is_floating_point or found.is_meta or all_finite(found):
        return found
    if all_finite(value):
        largest, name = float(value.abs().max()), str(dtype).removeprefix("torch.")
        held = [str(each).removeprefix("torch.") for each in WIDER if largest <= torch.finfo(each).max]
        wider = f"{advice} {' or '.join(held)}" if held else "scale the weights"
        raise InputError(f"{what} holds {largest:.6g}, which is beyond {name}: {wider}")
    return found


INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""the integers that share the size of a float"""


def places(mask: Bool[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    """Return the indices, ascending, of the True entries, of which there are `count`."""
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def median_among(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the median of the values where the mask is true, the lower one of two; on a CPU by torch's own median."""
    if values.device.type == "cpu":
        return values[mask].median()
    # The lower median of n values has n // 2 values above it.
    count = mask.sum()
    return kth_largest(torch.where(mask, values, -torch.inf).reshape(1, -1), count // 2 + 1)[0, 0]


def kth_largest(score: Float[Tensor, "rows n"], k: int | Int[Tensor, ""]) -> Float[Tensor, "rows 1"]:
    """Return exactly the k-th largest value of every row, with ties, for values without NaN.

    The bits of nonnegative floats, read as integers, have the order of the floats, and those of negative ones the
    opposite. One count for each bit, from the sign on, decides whether it is set in the answer: a few passes over all
    values, for devices that sort slowly.
    """
    kind = INTEGERS[score.dtype]
    most = torch.iinfo(kind).max
    # Adding zero makes a negative zero positive.
    bits = (score + 0.0).view(kind)
    keys = torch.where(bits < 0, bits ^ most, bits)
    found = torch.full_like(keys[:, :1], torch.iinfo(kind).min)
    for place in range(torch.iinfo(kind).bits - 1, -1, -1):
        # The sign bit takes the least integer to zero.
        trial = torch.zeros_like(found) if place == torch.iinfo(kind).bits - 1 else found + (1 << place)
        enough = (keys >= trial).sum(1, keepdim=True) >= k
        found = torch.where(enough, trial, found)
    return torch.where(found < 0, found ^ most, found).view(score.dtype)


def first_output(output: Any) -> Tensor:
    """Return the tensor of a module's output, which some versions of some modules wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def divergence_terms(log_p: Float[Tensor, "*rows n"], log_q: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Return the terms p (log p - log q) of KL(p || q), in nats, from log-probabilities; a row sums to the divergence.

    Sum them in float64, because most of them cancel. Entries of probability zero, -inf in both, are NaN.
    """
    return log_p.exp() * (log_p - log_q)


# -- files

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""the name of each dtype in the header of a safetensors file"""
PLAIN = {"format": "pt"}
"""the metadata of weights that transformers loads"""


def write_tensors(
    stream: BinaryIO,
    tensors: Mapping[str, Tensor],
    values: Iterable[Tensor] | None = None,
    metadata: Mapping[str, str] = PLAIN,
) -> None:
    """Write tensors in the format of a safetensors file, one at a time.

    `tensors` may be on the meta device; then `values` gives their contents in the same order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    stream.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in zip(tensors, tensors.values() if values is None else values, strict=True):
        assert tensor.shape == tensors[name].shape and tensor.dtype == tensors[name].dtype
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        stream.write(flat.view(torch.uint8).numpy().data)
