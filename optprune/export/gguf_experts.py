"""GGUF file of a mixture without the experts that its pruned folder lost; what stays is copied byte for byte."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType, GGUFWriter
from torch import Tensor

from optprune.errors import InputError, OptpruneError
from optprune.export.exporter import Draft, Exporter, ModelSource, OnEvent
from optprune.export.ggml import is_finite
from optprune.export.gguf_file import MAGIC, write_content
from optprune.export.place import check_apart
from optprune.models.checkpoint import Checkpoint
from optprune.models.gguf import PlainReader
from optprune.models.skeleton import with_model_names
from optprune.problems import ExpertChoice
from optprune.report import Report
from optprune.report.reading import read_healing, read_report
from optprune.work import Work

ROUTER = TENSOR_NAMES[MODEL_TENSOR.FFN_GATE_INP]
BY_EXPERT = (
    ROUTER,
    TENSOR_NAMES[MODEL_TENSOR.FFN_EXP_PROBS_B],
    TENSOR_NAMES[MODEL_TENSOR.FFN_GATE_UP_EXP],
    TENSOR_NAMES[MODEL_TENSOR.FFN_GATE_EXP],
    TENSOR_NAMES[MODEL_TENSOR.FFN_UP_EXP],
    TENSOR_NAMES[MODEL_TENSOR.FFN_DOWN_EXP],
)
"""names of the tensors with an entry for each expert, without .weight or .bias"""
ROUNDING = 0.01
"""largest relative distance between a router's row in the folder and in the file; rounding to bfloat16 is 0.004"""


@dataclass(frozen=True)
class GgufExperts(Exporter):
    """GGUF file of a pruned mixture, made from a GGUF file of the dense one, whatever the types of its tensors.

    The folder must have lost whole experts only, equally many in each block. Its router shows which ones: every row of
    it is one of the file's, up to rounding. The rows of those experts are left out of the tensors that count experts,
    and everything else, the vocabulary included, is copied byte for byte. Nothing is dequantised but the routers.
    """

    name: ClassVar[str] = "gguf"
    description: ClassVar[str] = "a file for llama.cpp"
    is_folder: ClassVar[bool] = False
    magic: ClassVar[bytes] = MAGIC

    original: str | Path
    """the GGUF file of the dense model"""

    @cached_property
    def _reader(self) -> PlainReader:
        try:
            return PlainReader(Path(self.original))
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise InputError(
                f"{self.original} is not a GGUF file that can be read ({error}): fetch it again"
            ) from error

    def check_output(self, output: Path, overwrite: bool) -> None:
        check_apart(output, [str(self.original)])
        super().check_output(output, overwrite)

    def unsupported(self, source: ModelSource) -> str | None:
        if source.loaded is not None:
            return "a loaded model has no report of what was pruned: save it, and export the folder"
        try:
            report = read_report(source.name)
            self._check_folder(source, report)
            self._check_file(source, report)
        except InputError as error:
            return str(error)
        return None

    def _check_folder(self, source: ModelSource, report: Report) -> None:
        """Raise InputError where the folder lost or changed more than whole experts, or not equally many."""
        shapes = source.shapes.shapes()
        advice = f"so its tensors are not those of {self.original}: export it with --type instead of --original"
        changed = [layer.name for layer in report.layers if layer.kind != ExpertChoice.kind]
        if changed or len(shapes) != len(report.blocks):
            what = f"{changed[0]} was pruned" if changed else "blocks were removed"
            raise InputError(f"{source.name} lost more than experts ({what}), {advice}")
        if report.recovered:
            raise InputError(
                f"the experts of {source.name} were refitted ({report.recovered[0].name}), {advice}, or prune with "
                "--set refit.recovery=none"
            )
        if any(before.parts != after.parts for before, after in ((one.before, one.after) for one in report.blocks)):
            raise InputError(f"{source.name} lost more than experts (sub-blocks were removed), {advice}")
        if report.vocabulary is not None:
            raise InputError(f"{source.name} lost more than experts (its vocabulary is smaller), {advice}")
        if read_healing(source.name) is not None:
            raise InputError(f"{source.name} was healed, {advice}")
        left = sorted({shape.experts for shape in shapes} - {0})
        if not left:
            raise InputError(f"{source.name} has no experts: export it with --type instead of --original")
        if len(left) > 1:
            raise InputError(
                f"the blocks of {source.name} keep {left[0]} to {left[-1]} experts, and a GGUF file has one number for "
                "all of them: prune with --experts, which keeps equally many"
            )

    def _check_file(self, source: ModelSource, report: Report) -> None:
        """Raise InputError where the file is not that of the dense model."""
        parts = self._field("split.count")
        if parts is not None and parts > 1:
            raise InputError(
                f"{self.original} is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge"
            )
        dense = {change.before.experts for change in report.blocks} - {0}
        expected = {
            "block_count": len(source.shapes.shapes()),
            "embedding_length": int(source.config.hidden_size),
            "expert_count": max(dense),
        }
        for key, count in expected.items():
            found = self._field(f"{self._architecture}.{key}")
            if found != count:
                raise InputError(
                    f"{self.original} has {key} {found}, and the dense model of {source.name} {count}: give the GGUF "
                    "file of that model"
                )

    @property
    def _architecture(self) -> str:
        return str(self._field("general.architecture"))

    def _field(self, key: str) -> Any:
        found = self._reader.fields.get(key)
        return None if found is None else found.contents()

    def _kept(self, source: ModelSource) -> dict[int, np.ndarray[Any, Any]]:
        """Return the numbers of the experts that are left, by block, by the rows of the routers."""
        decoder = source.shapes
        mixture = decoder.architecture.mixture
        assert mixture is not None
        stored = with_model_names(decoder.model, Checkpoint.open(Path(source.name))).tensors
        tensors, kept = {tensor.name: tensor for tensor in self._reader.tensors}, dict[int, np.ndarray[Any, Any]]()
        for index, shape in enumerate(decoder.shapes()):
            if not shape.experts:
                continue
            name = f"{ROUTER.format(bid=index)}.weight"
            if name not in tensors:
                raise InputError(f"{self.original} has no tensor {name}: give the GGUF file of the dense model")
            dense = torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
            left = stored[decoder.name(index, mixture.weight)].read()
            found = matching_rows(left, dense)
            if found is None:
                raise InputError(
                    f"the router of block {index} of {source.name} has rows that {self.original} does not have: "
                    "give the GGUF file of the model that was pruned"
                )
            kept[index] = found.numpy()
        return kept

    def write(self, source: ModelSource, draft: Path, on_event: OnEvent) -> Draft:
        reader, kept, number = self._reader, self._kept(source), source.shapes.experts_for_a_token
        count = max(shape.experts for shape in source.shapes.shapes())
        writer = GGUFWriter(None, self._architecture, use_temp_file=False, endianess=reader.endianess)
        new = {f"{self._architecture}.expert_count": count, f"{self._architecture}.expert_used_count": number}
        copy_metadata(reader, writer, new)
        by_name = {known.format(bid=index): numbers for index, numbers in kept.items() for known in BY_EXPERT}
        whole = {f"{ROUTER.format(bid=index)}.scale" for index in kept}  # a factor for each input of a router
        rows = {
            tensor.name: None if tensor.name in whole else by_name.get(tensor.name.rpartition(".")[0])
            for tensor in reader.tensors
        }
        for tensor in reader.tensors:
            shape = tensor.data.shape if rows[tensor.name] is None else (count, *tensor.data.shape[1:])
            size = tensor.data.nbytes // tensor.data.shape[0] * shape[0]
            writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, size, raw_dtype=tensor.tensor_type)
        digests = dict[str, str]()

        def parts() -> Iterator[np.ndarray[Any, Any]]:
            for tensor in reader.tensors:
                chosen = rows[tensor.name]
                part = np.ascontiguousarray(tensor.data if chosen is None else tensor.data[chosen])
                if not is_finite(part, tensor.tensor_type, ">" if reader.endianess == gguf.GGUFEndian.BIG else "<"):
                    raise InputError(
                        f"the tensor {tensor.name} of {self.original} holds NaN or infinity: fetch the file again, or "
                        "export the folder with --type instead of --original"
                    )
                digests[tensor.name] = _digest(part)
                yield part

        with draft.open("wb") as stream:
            write_content(writer, parts(), stream)
        removed = max(self._field(f"{self._architecture}.expert_count") - count, 0)
        summary = f"architecture {self._architecture}, {removed} experts fewer in a block, types as in {self.original}"
        return Draft(draft, draft.stat().st_size, summary, expected=digests)

    def check(self, source: ModelSource, draft: Draft, on_event: OnEvent) -> float | None:
        """Read the file back, and compare the bytes of all tensors with those that were to be kept."""
        expected: dict[str, str] = draft.expected
        found = {tensor.name: _digest(np.ascontiguousarray(tensor.data)) for tensor in PlainReader(draft.path).tensors}
        for name in expected.keys() | found.keys():
            if found.get(name) != expected.get(name):
                raise OptpruneError(f"the tensor {name} is not in the GGUF file as written: please report this")
        return None

    def work(self, source: ModelSource) -> Work:
        return Work(bytes=2 * max(int(tensor.n_bytes) for tensor in self._reader.tensors))


def matching_rows(left: Tensor, dense: Tensor) -> Tensor | None:
    """Return the numbers of the rows [kept] of `dense` [n, width] that `left` [kept, width] holds, in their order.

    None where a row is not there up to rounding, or the order is another one.
    """
    if left.shape[1] != dense.shape[1]:
        return None
    distances = torch.cdist(left.double(), dense.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest, numbers = distances.min(1)
    ordered = bool((numbers.diff() > 0).all())
    return numbers if ordered and bool((nearest <= ROUNDING * left.double().norm(dim=1)).all()) else None


def copy_metadata(reader: gguf.GGUFReader, writer: GGUFWriter, new: Mapping[str, int]) -> None:
    """Copy the metadata of a file, with other numbers for the keys in `new`."""
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue  # the writer adds them
        kind = field.types[0]
        part = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, new.get(field.name, field.contents()), kind, sub_type=part)


def _digest(numbers: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(numbers.data).hexdigest()
