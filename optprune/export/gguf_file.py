"""Exporter to GGUF for llama.cpp: models whose blocks are alike under their own architecture, others as deci."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from optprune.errors import InputError, OptpruneError
from optprune.export.exporter import Draft, Exporter, ModelSource, OnEvent
from optprune.export.ggml import BeyondType, check_ggml, packed
from optprune.export.gguf_families import LLAMA_CPP, UNEVEN, Family, family_of, has_windows
from optprune.export.gguf_tensors import IDLE_WIDTH, Target, Tensors
from optprune.export.gguf_types import SMALL_BLOCK, TYPES
from optprune.export.gguf_vocabulary import Vocabulary
from optprune.export.importance import Importance
from optprune.models import Decoder, is_gguf, need_tokenizer, using_tokenizer
from optprune.models.architecture import rope_types
from optprune.models.checkpoint import Checkpoint
from optprune.models.gguf import PlainReader
from optprune.models.registry import architecture_named
from optprune.work import Work

MAGIC = b"GGUF"
"""the first bytes of a GGUF file"""
UNTURNED = 1e30
"""rotary frequency divisor of a dimension that is not rotated"""


@dataclass(frozen=True, kw_only=True)
class GgufFile(Exporter):
    """GGUF file with the model, its vocabulary and its chat template.

    `kind` is the type of matrices, one of `TYPES`; vectors stay float32. llama.cpp's rules give some matrices another
    type (gguf_types.py). By an `importance` of the inputs, quantised types lose less where it counts. In a quantised
    file the hidden units of MLPs are filled up with zeros to whole blocks: the output is the same.

    Blocks that differ in shape are written under llama.cpp's architecture deci where they are otherwise Llama's: its
    head counts and MLP widths are arrays. Value dimensions that were removed are filled with zeros, since all heads of
    a file have the same: the output is the same, and the file is not smaller for them. One tensor is in memory at a
    time, or one kind of matrix of all experts of a block. Families, rotary scalings and tokenizers that llama.cpp does
    not support are refused.
    """

    name: ClassVar[str] = "gguf"
    description: ClassVar[str] = "a file for llama.cpp"
    is_folder: ClassVar[bool] = False
    magic: ClassVar[bytes] = MAGIC

    kind: str = "f16"
    importance: Importance | None = None
    """mean squares of the inputs of layers, as `importance_of` measures them"""

    def __post_init__(self) -> None:
        if self.kind not in TYPES:
            raise InputError(f"the type {self.kind!r} is unknown: give {', '.join(TYPES)}")
        if self.importance is not None and not TYPES[self.kind].quantised:
            raise InputError(f"the type {self.kind} rounds each number alone: an importance of inputs has no effect")

    def unsupported(self, source: ModelSource) -> str | None:
        if source.loaded is not None:
            return "a loaded model is not exported to GGUF: save it, and export the folder"
        if is_gguf(source.name):
            return f"{source.name} is already a GGUF file: give a model folder to export"
        try:
            check_ggml({TYPES[self.kind].kind})
            family_of(source.shapes)
            rotary_of(source.config)
            Vocabulary.of(need_tokenizer(source.tokenizer, source.name), source.config.vocab_size)
        except InputError as error:
            return str(error)
        return None

    def targets(self, source: ModelSource) -> list[Target]:
        """Return the tensors of the file of a model folder."""
        return list(self._content(source).targets())

    def _content(self, source: ModelSource) -> "_Content":
        return _Content.of(source.shapes, Checkpoint.open(Path(source.name)), self.kind, self.importance)

    def write(self, source: ModelSource, draft: Path, on_event: OnEvent) -> Draft:
        folder, tokenizer = Path(source.name), need_tokenizer(source.tokenizer, source.name)
        content = self._content(source)
        writer = GGUFWriter(None, content.family.name, use_temp_file=False)
        content.describe(writer)
        with using_tokenizer(source.name):
            Vocabulary.of(tokenizer, source.config.vocab_size).write(writer, tokenizer, folder)
        targets = list(content.targets())
        with draft.open("wb") as stream:
            write_tensors(writer, targets, stream, self.importance, partial(self._others, source))
        size = draft.stat().st_size
        return Draft(draft, size, f"architecture {content.family.name}", content.notes(targets), expected=targets)

    def _others(self, source: ModelSource, name: str) -> list[str]:
        """Return the types of files in which all numbers of a tensor are finite."""
        found = list[str]()
        for kind in TYPES:
            targets = replace(self, kind=kind, importance=None).targets(source)
            target = next(one for one in targets if one.name == name)
            with contextlib.suppress(InputError):  # beyond this type too, or it needs xllamacpp
                packed(target.make(), target.kind)
                found.append(kind)
        return found

    def check(self, source: ModelSource, draft: Draft, on_event: OnEvent) -> float | None:
        """Read the header back, and compare names, shapes and types of all tensors."""
        try:
            stored = {tensor.name: tensor for tensor in PlainReader(draft.path).tensors}
        except (ValueError, IndexError) as error:
            raise OptpruneError(f"the GGUF file cannot be read back ({error}): please report this") from error
        expected: list[Target] = draft.expected
        for target in expected:
            found = stored.pop(target.name, None)
            shape = None if found is None else tuple(int(size) for size in reversed(found.shape))
            if found is None or shape != target.shape or found.tensor_type != target.kind:
                raise OptpruneError(f"the tensor {target.name} is not in the GGUF file as written: please report this")
        if stored:
            raise OptpruneError(f"the GGUF file has a tensor {min(stored)} that was not written: please report this")
        return None

    def work(self, source: ModelSource) -> Work:
        # The largest tensor as it is stored, in float32, and packed.
        largest = max(parameter.numel() for parameter in source.shapes.model.parameters())
        return Work(bytes=12 * largest)


def write_tensors(
    writer: GGUFWriter,
    targets: list[Target],
    stream: BinaryIO,
    importance: Importance | None = None,
    others: Callable[[str], list[str]] = lambda name: [],
) -> None:
    """Write the header, the metadata and the tensors, one at a time.

    Raises InputError for a number that is not finite in the file; `others` returns the types of files that hold the
    tensor of a name.
    """

    def made(target: Target, own: Tensor | None) -> np.ndarray[Any, Any]:
        try:
            return packed(target.make(), target.kind, own)
        except BeyondType as error:
            held = others(target.name)
            advice = f"give --type {' or '.join(held)}" if held else "no type holds it, so prune or train again"
            raise InputError(f"{_described(target)} cannot be written, because {error}: {advice}") from error
        except InputError as error:
            raise InputError(f"{_described(target)} cannot be written: {error}") from error

    for target in targets:
        as_stored = np.dtype(np.float32)  # unused where the kind is given
        writer.add_tensor_info(target.name, target.shape, as_stored, target.bytes, raw_dtype=target.kind)
    weights = (None if importance is None else target.importance(importance.squares) for target in targets)
    numbers = (made(target, own) for target, own in zip(targets, weights, strict=True))
    write_content(writer, numbers, stream)


def _described(target: Target) -> str:
    """Return the name of a tensor in the file, with that in the model where it is made of one."""
    return f"the tensor {target.name}" + (f" ({target.sources[0][0]})" if len(target.sources) == 1 else "")


def write_content(writer: GGUFWriter, tensors: Iterable[np.ndarray[Any, Any]], stream: BinaryIO) -> None:
    """Write the header, the metadata, and the bytes of the tensors that were added to the writer, one at a time."""
    # The writer opens files by name unless it is given a stream and a state.
    writer.fout, writer.state = [stream], gguf.gguf_writer.WriterState.EMPTY  # type: ignore[list-item]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for numbers in tensors:
        # The writer's own `write_tensor_data` does not distinguish a full disk from other errors.
        writer.write_padding(stream, stream.tell())  # type: ignore[arg-type]
        stream.write(np.ascontiguousarray(numbers).data)
        writer.write_padding(stream, numbers.nbytes)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class _Content:
    """Metadata and tensors of a file, from a folder's config and weights."""

    decoder: Decoder
    family: Family
    tensors: Tensors
    importance: Importance | None

    @classmethod
    def of(cls, decoder: Decoder, checkpoint: Checkpoint, kind: str, importance: Importance | None) -> "_Content":
        """Return the content for a model and its tensors. Raises InputError where the family is not supported."""
        family = family_of(decoder)
        names = gguf.get_tensor_name_map(family.named_as, len(decoder.shapes()))
        tensors = Tensors(decoder, checkpoint, family, names, TYPES[kind], importance is not None)
        return cls(decoder, family, tensors.filled(), importance)

    def describe(self, writer: GGUFWriter) -> None:
        """Write the config into the metadata of the file."""
        config, shapes, heads = self.decoder.model.config, self.decoder.shapes(), self.decoder.heads
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(self.tensors.checkpoint.source).name or "model")
        writer.add_file_type(self.tensors.file.number)
        if self.importance is not None:
            writer.add_string("quantize.imatrix.dataset", self.importance.text)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(len(shapes))
        idle = 0 if self.family.single else IDLE_WIDTH
        widths = [self.tensors.width(shape.mlp_width or idle) for shape in shapes]
        beside = self.tensors.width_of_shared if self.family.dense else None
        dense = [beside() if beside and shape.experts else width for width, shape in zip(widths, shapes, strict=True)]
        writer.add_feed_forward_length(dense if self.family.lists else dense[0])
        self._describe_heads(writer)
        if hasattr(config, "rms_norm_eps"):
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rotary = rotary_of(self.decoder.model.config)
        if rotary:
            turned = heads.dim - heads.keys if self.decoder.architecture.latent else heads.dim
            if not heads.by_block:
                writer.add_rope_dimension_count(int(turned * rotary.get("partial_rotary_factor", 1.0)))
            writer.add_rope_freq_base(float(rotary["rope_theta"]))
        if rotary.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rotary["factor"]))
        mixture = self.decoder.architecture.mixture
        if mixture is not None and any(shape.experts for shape in shapes):
            writer.add_expert_count(max(shape.experts for shape in shapes))
            writer.add_expert_used_count(self.decoder.experts_for_a_token)
            own = zip(widths, shapes, strict=True)
            writer.add_expert_feed_forward_length(max(width for width, shape in own if shape.experts))
            if mixture.shared:
                writer.add_expert_shared_feed_forward_length(self.tensors.width_of_shared())
        self.family.describe(self._with_heads(), writer)

    def _with_heads(self) -> Any:
        """Return the config with the heads that recurrent mixers have left, which a pruned one lists by block."""
        config, mixer = copy(self.decoder.model.config), self.decoder.architecture.recurrent
        left = max(shape.recurrent for shape in self.decoder.shapes())
        if mixer is not None and left:
            mixer.record(config, left)
        return config

    def _describe_heads(self, writer: GGUFWriter) -> None:
        """Write the numbers and the sizes of heads into the metadata."""
        config, heads = self.decoder.model.config, self.decoder.heads
        kv = [shape.kv_heads for shape in self.decoder.shapes()]
        queries = [heads.query] * len(kv) if heads.by_block else [count * heads.group for count in kv]
        alike = self.family is not UNEVEN
        writer.add_head_count(max(queries) if alike else queries)
        if self.decoder.architecture.latent is not None:
            # All query heads read the one low-rank vector, behind which the rotated dimensions of the key stand.
            rank = int(config.kv_lora_rank)
            writer.add_head_count_kv(1)
            writer.add_key_length(rank + heads.dim - heads.keys)
            writer.add_value_length(rank)
            writer.add_key_length_mla(heads.dim)
            writer.add_value_length_mla(self.tensors.value_dim)
            return
        # A zero stands for a block with a recurrent mixer in many families.
        one = alike and not heads.by_block and (all(kv) or not self.family.zeros)
        writer.add_head_count_kv(max(kv) if one else kv)
        if heads.by_block:
            return  # the family says of which sizes
        writer.add_key_length(heads.dim)
        writer.add_value_length(heads.dim)

    def targets(self) -> Iterator[Target]:
        """Yield the tensors of the file."""
        config, heads = self.decoder.model.config, self.decoder.heads
        if heads.by_block:
            factors = proportions(config)
            yield Target("rope_freqs.weight", tuple(factors.shape), (), computed=lambda: factors)
        elif rotary_of(config).get("rope_type") == "llama3":
            yield Target("rope_freqs.weight", (heads.dim // 2,), (), computed=self._factors)
        yield from self.tensors.targets()

    def notes(self, targets: Sequence[Target]) -> tuple[str, ...]:
        """Return sentences that the user of the file should read."""
        shapes, config = self.decoder.shapes(), self.decoder.model.config
        found = list(self.family.rounded(config))
        if any(shape.kv_heads and self.tensors.missing(shape) for shape in shapes):
            found.append("removed value dimensions are filled with zeros, so they do not make the file smaller")
        if any(shape.pairs for shape in shapes):
            found.append(
                "removed pairs of queries and keys are filled with zeros, so they do not make the file smaller"
            )
        file, width = self.tensors.file, self.tensors.width
        odd = sorted({shape.mlp_width for shape in shapes if width(shape.mlp_width) != shape.mlp_width})
        if odd:
            filled = ", ".join(f"{one} to {width(one)}" for one in odd)
            found.append(
                f"hidden units of zeros fill up MLPs to whole blocks of {file.kind.name.lower()}, in units: {filled}; "
                f"multiples of {self.tensors.fill} need none"
            )
        wide = sorted({target.shape[-1] for target in targets if _is_plain(target)}) if file.quantised else []
        if wide:
            found.append(
                f"rows of {', '.join(map(str, wide))} numbers are not multiples of {SMALL_BLOCK} and stay float16"
            )
        short = sorted({target.shape[-1] for target in targets if _falls_back(target, file.block)})
        if file.block > SMALL_BLOCK and short:
            found.append(
                f"rows of {', '.join(map(str, short))} numbers are not multiples of {file.block} and have larger "
                "types, as llama.cpp gives them: q5_0 for q4_K, q5_1 for q5_K, q8_0 for q6_K"
            )
        if has_windows(config) and not self.family.windows:
            found.append(
                f"llama.cpp ignores the sliding windows of a {self.family.name} model: its answers differ beyond "
                f"{config.sliding_window} tokens"
            )
        return tuple(found)

    def _factors(self) -> Tensor:
        """Return the divisors of the rotary frequencies, for the scaling of Llama 3.1."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.decoder.model.config, torch.device("cpu"))
        exponents = torch.arange(0, self.decoder.heads.dim, 2, dtype=torch.float64) / self.decoder.heads.dim
        plain = float(rotary_of(self.decoder.model.config)["rope_theta"]) ** -exponents
        return plain / scaled.double()


def proportions(config: Any) -> Tensor:
    """Return the divisors of the rotary frequencies of blocks that see all tokens, for a part of each head."""
    rotary, dim = rotary_of(config), config.per_layer_config["full_attention"].head_dim
    share, factor = (rotary.get(name, 1.0) for name in ("partial_rotary_factor", "factor"))
    scaled = rotary["rope_type"] == "proportional"
    turned = int(share * dim // 2) if scaled else dim // 2
    divisors = torch.full((dim // 2,), UNTURNED)
    divisors[:turned] = factor if scaled else 1.0
    return divisors


def _is_plain(target: Target) -> bool:
    """Return whether a matrix has rows that no quantised type holds."""
    return target.kind == GGMLQuantizationType.F16 and target.shape[-1] % SMALL_BLOCK > 0


def _falls_back(target: Target, block: int) -> bool:
    """Return whether a matrix has another type for the length of its rows."""
    return target.kind != GGMLQuantizationType.F32 and target.shape[-1] % block > 0


def rotary_of(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of blocks that see all tokens; empty where there are none.

    Raises InputError where llama.cpp does not support their scaling.
    """
    known = LLAMA_CPP.scalings(architecture_named(config.model_type, config).model_type)
    for kind in rope_types(config):
        if kind not in known:
            raise InputError(f"rotary embeddings scaled by {kind} cannot be exported to GGUF, only {', '.join(known)}")
    rotary: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rotary.get("full_attention", rotary))
