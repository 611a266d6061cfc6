"""Problems as files: one safetensors file with a header of plain data, and no code.

The metadata of the file holds a JSON text: the format's version, the kind of problem, its fingerprint, where it comes
from, and its fields. A field is plain data, a tensor by its name in the file, or a part such as the moments with fields
of its own. Of a symmetric matrix the upper triangle is stored, row by row, which loses nothing.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optprune.errors import InputError, OptpruneError
from optprune.grids import Grid
from optprune.metric import OutputMetric
from optprune.moments import Drift, InputMoments
from optprune.numerics.fingerprint import fingerprint, plain
from optprune.numerics.tensors import write_tensors
from optprune.patterns import NM, PartlyFixed, RowLimits, RowWise, Unstructured
from optprune.penalties import L1, ColumnGroups, ElasticNet, WeightedL1
from optprune.problems.base import Problem
from optprune.problems.experts import ExpertChoice
from optprune.problems.gridded import GridLeastSquares
from optprune.problems.loss import LayerLoss
from optprune.problems.masked import MaskedLeastSquares
from optprune.problems.penalised import PenalisedLeastSquares
from optprune.problems.rotation import Permutation, Rotation
from optprune.problems.sparse import SparseLeastSquares
from optprune.problems.structured import Channels, StructuredLeastSquares
from optprune.system.files import GENERATOR, MARK, digest_of, own_place, read_json, write_whole
from optprune.system.wording import either, shown

FORMAT, EARLIER_FORMAT = 2, 1
"""the version of the format, and an earlier one that is read"""
HEADER, SOLUTION = "optprune", "optprune solution"
"""the entry of the metadata of a problem's file, and of a solution's"""
Saved = Problem | ExpertChoice | Rotation | Permutation
"""what a file can hold"""
KINDS: dict[str, type] = {
    "masked": MaskedLeastSquares,
    "sparse": SparseLeastSquares,
    "penalised": PenalisedLeastSquares,
    "structured": StructuredLeastSquares,
    "grid": GridLeastSquares,
    "expert choice": ExpertChoice,
    "rotation": Rotation,
    "permutation": Permutation,
}
"""the kinds by their names in files"""
CLASSES: tuple[type, ...] = (
    LayerLoss, InputMoments, Drift, OutputMetric, Unstructured, RowWise, NM, RowLimits, PartlyFixed,
    L1, WeightedL1, ElasticNet, ColumnGroups, Grid, Channels,
)  # fmt: skip
PARTS = dict(zip(map(attrgetter("__name__"), CLASSES), CLASSES, strict=True))
"""the parts of problems by their names in files"""
EARLIER_KINDS = {"structured": "groups", "linked": "link"}
"""the kinds of the earlier format that are structured problems now, with their fields that held the channels"""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""the dtypes that a field may name"""
BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""the integers with the bits of each dtype"""
LARGEST_INDEX = 2**24
"""the largest index of a column, a row or a slot in a file"""
WIDEST = 2**20
"""the largest width of a matrix in a file"""
REFUSED = (OptpruneError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, OverflowError)
"""the errors of fields that are none of a problem"""
Fields = dict[str, Any]


def save_problem(problem: Saved, path: str | Path, *, origin: Mapping[str, str | int | float] | None = None) -> None:
    """Write a problem to a file, as a whole or not at all.

    `origin` says where it comes from, such as the model, the layer and the recipe. InputError for a problem with a
    class of one's own, as a pattern or a penalty, because a file holds no code, and where there is a file that optprune
    did not write.
    """
    if origin is not None and not _is_origin(origin):
        raise InputError(
            f"the origin cannot be {shown(origin)}: give texts or numbers by name, such as {{'layer': 'mlp.down_proj'}}"
        )
    names = [name for name, kind in KINDS.items() if type(problem) is kind]
    if not names:
        raise InputError(
            f"a {type(problem).__name__} cannot be saved: a file holds one of the kinds {either(list(KINDS))}"
        )
    tensors = dict[str, Tensor]()
    fields = _encoded_fields(problem, names[0].replace(" ", "_"), tensors)
    content = {
        "format": FORMAT,
        "kind": names[0],
        "fingerprint": fingerprint(problem),
        "origin": dict(origin or {}),
        "fields": fields,
        "tensors": fingerprint(sorted(tensors.items())),
    }
    header = json.dumps(content | {"digest": digest_of(content)})
    metadata = {HEADER: header, GENERATOR: MARK}
    write_whole(own_place(path), lambda stream: write_tensors(stream, tensors, metadata=metadata))


def load_problem(path: str | Path) -> Any:
    """Return the problem in a file, on the CPU; InputError where the file is not a problem, or is damaged.

    It is a `Problem`, or else an `ExpertChoice`, a `Rotation` or a `Permutation`.
    """
    with _opened(Path(path)) as file:
        header = _header(Path(path), file.metadata())
        earlier = EARLIER_KINDS.get(header["kind"]) if header["format"] == EARLIER_FORMAT else None
        kind = KINDS.get(header["kind"]) if earlier is None else StructuredLeastSquares
        if kind is None:
            raise InputError(f"{path} holds a problem of the kind {shown(header['kind'])}, which this optprune lacks")
        tensors = {name: cast(Tensor, file.get_tensor(name)) for name in sorted(file.keys())}
    # Before anything is made of them: a changed index might ask for any amount of memory.
    if fingerprint(list(tensors.items())) != header["tensors"]:
        raise InputError(f"{path} is damaged: its numbers were changed; save it again")
    try:
        fields = header["fields"] if earlier is None else _as_structured(header["fields"], earlier)
        problem = _decoded_fields(kind, fields, tensors)
    except REFUSED as error:
        raise InputError(f"{path} is damaged: its fields make no {header['kind']} problem; save it again") from error
    # The fingerprint of an earlier kind is that of classes which are gone; header and numbers were checked above.
    if earlier is None and fingerprint(problem) != header["fingerprint"]:
        raise InputError(f"{path} was written by another version of optprune: save it again")
    return problem


def origin_of(path: str | Path) -> dict[str, Any]:
    """Return where the problem in a file comes from, by the file; InputError where the file is not a problem."""
    with _opened(Path(path)) as file:
        return dict(_header(Path(path), file.metadata())["origin"])


def _is_origin(origin: object) -> bool:
    """Return whether an origin holds texts or numbers by name."""
    return isinstance(origin, Mapping) and all(
        isinstance(name, str) and isinstance(value, str | int | float)
        for name, value in cast("Mapping[object, object]", origin).items()
    )


def _opened(path: Path) -> Any:
    """Return a context of an open file."""
    try:
        return safe_open(path, "pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a problem: {error}") from error


def _header(path: Path, metadata: Mapping[str, str] | None) -> Fields:
    """Return the header of a file. InputError where it is missing, damaged or of another version."""
    text = (metadata or {}).get(HEADER)
    if text is None and SOLUTION in (metadata or {}):
        raise InputError(f"{path} holds a solution, not a problem: give the file of the problem that it solves")
    if text is None:
        raise InputError(f"{path} is not a problem that optprune saved: it has no header")
    read = read_json(text, f"the header of {path}")
    header = cast(Fields, read) if isinstance(read, dict) else {}
    version: Any = header.get("format")
    if version not in (FORMAT, EARLIER_FORMAT):
        raise InputError(f"{path} is of the format {shown(version)}, and this optprune reads the format {FORMAT}")
    digest = header.pop("digest", None)
    known = {"kind", "fingerprint", "origin", "fields", "tensors"} <= header.keys()
    if digest != digest_of(header) or not known or not _is_origin(header["origin"]):
        raise InputError(f"{path} is damaged: its header was changed; save it again")
    return header


# -- fields


def _encoded_fields(part: Any, name: str, tensors: dict[str, Tensor]) -> Fields:
    """Return the fields of a part as plain data, and put its tensors into the dictionary."""
    return {
        field.name: _encoded(getattr(part, field.name), f"{name}.{field.name}", tensors)
        for field in dataclasses.fields(part)
        if field.init and field.compare
    }


def _encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        whole = value.detach().cpu()
        triangle = whole.ndim == 2 and len(whole) > 1 and whole.shape[0] == whole.shape[1] and _symmetric(whole)
        tensors[name] = _triangle_of(whole) if triangle else whole
        return {"triangle": name, "width": len(whole)} if triangle else {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        every = cast("tuple[Any, ...]", value)
        return {"tuple": [_encoded(each, f"{name}.{number}", tensors) for number, each in enumerate(every)]}
    if PARTS.get(type(value).__name__) is type(value):
        return {"part": type(value).__name__, "fields": _encoded_fields(value, name, tensors)}
    raise InputError(
        f"a problem with a {type(value).__name__} cannot be saved, because a file holds no code: state it with "
        f"{either(sorted(PARTS))}"
    )


def _as_structured(fields: Fields, earlier: str) -> Fields:
    """Return the fields of a structured problem from those of the earlier format, without rows of other layers."""
    channels = {name: fields[earlier]["fields"][name] for name in ("columns", "slots")}
    others = {name: value for name, value in fields.items() if name != earlier}
    return others | {"channels": {"part": Channels.__name__, "fields": channels}}


def _decoded_fields(kind: type, fields: Fields, tensors: Mapping[str, Tensor]) -> Any:
    """Return a part of a kind from its fields. Raises InputError or another of REFUSED where they are none of it."""
    known = {field.name for field in dataclasses.fields(kind) if field.init and field.compare}
    if fields.keys() != known:
        raise InputError(f"the fields are {sorted(fields)} and not {sorted(known)}")
    return kind(**{name: _decoded(value, tensors) for name, value in fields.items()})


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    entry = cast(Fields, value)
    if "tensor" in entry:
        return _checked(tensors[entry["tensor"]])
    if "triangle" in entry:
        return _from_triangle(tensors[entry["triangle"]], entry["width"])
    if "dtype" in entry:
        return DTYPES[entry["dtype"]]
    if "tuple" in entry:
        return tuple(_decoded(each, tensors) for each in entry["tuple"])
    return _decoded_fields(PARTS[entry["part"]], entry["fields"], tensors)


def _checked(tensor: Tensor) -> Tensor:
    """Return a tensor; InputError for an index that no problem has, which might ask for any amount of memory."""
    if tensor.dtype == torch.long and tensor.numel():
        least, most = (int(end) for end in torch.aminmax(tensor))
        if least < 0 or most > LARGEST_INDEX:
            raise InputError(f"an index is {least if least < 0 else most}")
    return tensor


# -- symmetric matrices


def _symmetric(matrix: Tensor) -> bool:
    """Return whether a matrix [n, n] is symmetric bit for bit, without a copy of all of it."""
    if not matrix.is_floating_point():
        return False
    bits = matrix.view(BITS[matrix.dtype])  # -0.0 and 0.0 are equal as numbers
    parts = (slice(first, first + 1024) for first in range(0, len(bits), 1024))
    return all(torch.equal(bits[part], bits[:, part].t()) for part in parts)


def _triangle_of(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a matrix [n, n], row by row."""
    width = len(matrix)
    found, place = matrix.new_empty(width * (width + 1) // 2), 0
    for row in range(width):
        found[place : place + width - row] = matrix[row, row:]
        place += width - row
    return found


def _from_triangle(triangle: Tensor, width: Any) -> Tensor:
    """Return the symmetric matrix [n, n] of an upper triangle. InputError where the sizes differ."""
    fits = isinstance(width, int) and 0 < width <= WIDEST and triangle.ndim == 1
    if not fits or triangle.numel() != math.comb(width + 1, 2):
        raise InputError(f"a triangle of {triangle.numel()} numbers has no width {shown(width)}")
    found, place = triangle.new_empty(width, width), 0
    for row in range(width):
        part = triangle[place : place + width - row]
        found[row, row:] = part
        found[row:, row] = part
        place += width - row
    return found
