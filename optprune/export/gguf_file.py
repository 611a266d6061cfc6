"""A model folder as a GGUF file for llama.cpp: blocks that are alike as what they are, others as deci."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from optprune.errors import InputError
from optprune.export.gguf_families import LLAMA_CPP, UNEVEN, Family, family_of, has_windows
from optprune.export.gguf_tensors import BLOCK_OF_Q8, IDLE_WIDTH, Target, Tensors
from optprune.export.gguf_vocabulary import Vocabulary
from optprune.export.own_files import check_own_files
from optprune.export.place import delete_left_drafts, hold_draft
from optprune.models import (
    Decoder,
    is_gguf,
    load_config,
    load_shapes,
    load_tokenizer,
    need_tokenizer,
    using_tokenizer,
)
from optprune.models.architecture import rope_types
from optprune.models.checkpoint import Checkpoint
from optprune.system.files import real_path, write_whole

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class GgufFile:
    """A file that was written."""

    file: Path
    architecture: str
    """the name by which llama.cpp knows it"""
    bytes: int
    notes: tuple[str, ...]


def export_gguf(folder: str | Path, file: str | Path, *, kind: str = "f16", overwrite: bool = True) -> GgufFile:
    """Write the model of a folder, with its vocabulary and chat template, as one GGUF file, whole or not at all.

    `kind` is f32, f16 or q8_0; vectors stay float32. Blocks that differ in shape go out under llama.cpp's architecture
    deci where they are Llama's but for that: its head counts and MLP widths are arrays. Fewer value dimensions than a
    head has are filled up with zeros, since there all heads of a file are alike: the answers are the same, the file is
    no smaller for them. One tensor is in memory at a time, or one kind of matrix of all experts of a block. InputError
    for what llama.cpp has no words for: a family, a rotary scaling, a tokenizer; and where a file is there already and
    `overwrite` is false.
    """
    if kind not in TYPES:
        raise InputError(f"the type {kind!r} is unknown: give {', '.join(TYPES)}")
    if is_gguf(folder):
        raise InputError(f"{folder} is GGUF already, which llama.cpp reads as it is: give a model folder to export")
    folder, place = Path(folder), real_path(Path(file))
    check_own_files(folder)
    config = load_config(folder)
    decoder = load_shapes(folder, config)
    tokenizer = need_tokenizer(load_tokenizer(folder), str(folder))
    vocabulary = Vocabulary.of(tokenizer, config.vocab_size)
    plan = _Plan.of(decoder, Checkpoint.open(folder), kind)
    writer = GGUFWriter(None, plan.family.name, use_temp_file=False)
    plan.describe(writer)
    with using_tokenizer(str(folder)):
        vocabulary.write(writer, tokenizer, folder)
    targets = list(plan.targets())
    delete_left_drafts(place)
    write_whole(place, lambda stream: _write(writer, targets, stream), lasting=False, replace=overwrite)
    return GgufFile(place, plan.family.name, place.stat().st_size, plan.notes())


def _write(writer: GGUFWriter, targets: list[Target], stream: Any) -> None:
    hold_draft(stream)
    for target in targets:
        size = math.prod(gguf.quant_shape_to_byte_shape(target.shape, target.kind))
        as_stored = np.dtype(np.float32)  # not looked at where the kind is given
        writer.add_tensor_info(target.name, target.shape, as_stored, size, raw_dtype=target.kind)
    # The writer would open files by name; what it writes goes to a stream that is renamed when it is whole.
    writer.fout, writer.state = [stream], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target in targets:
        numbers = gguf.quantize(target.make().to(torch.float32).contiguous().numpy(), target.kind)
        # As `write_tensor_data` does, whose own writing does not tell a full disk from other faults.
        writer.write_padding(stream, stream.tell())
        stream.write(np.ascontiguousarray(numbers).data)
        writer.write_padding(stream, numbers.nbytes)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a file says and holds, from a folder's config and tensors."""

    decoder: Decoder
    family: Family
    tensors: Tensors
    kind: str

    @classmethod
    def of(cls, decoder: Decoder, checkpoint: Checkpoint, kind: str) -> "_Plan":
        """Of a folder's model and its tensors; InputError where llama.cpp has no words for what it is."""
        family = family_of(decoder)
        names = gguf.get_tensor_name_map(family.named_as, len(decoder.shapes()))
        return cls(decoder, family, Tensors(decoder, checkpoint, family, names, TYPES[kind][0]), kind)

    def describe(self, writer: GGUFWriter) -> None:
        """Have the file say what the config says."""
        config, shapes, heads = self.decoder.model.config, self.decoder.shapes(), self.decoder.heads
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(self.tensors.checkpoint.source).name or "model")
        writer.add_file_type(TYPES[self.kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(len(shapes))
        widths = [shape.mlp_width or IDLE_WIDTH for shape in shapes]
        kv = [shape.kv_heads for shape in shapes]
        queries = [count * heads.group for count in kv]
        alike = self.family is not UNEVEN
        writer.add_feed_forward_length(widths[0] if alike else widths)
        writer.add_head_count(queries[0] if alike else queries)
        writer.add_head_count_kv(kv[0] if alike else kv)
        writer.add_key_length(heads.dim)
        writer.add_value_length(heads.dim)
        if hasattr(config, "rms_norm_eps"):
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rotary = self._rotary()
        if rotary:
            writer.add_rope_dimension_count(int(heads.dim * rotary.get("partial_rotary_factor", 1.0)))
            writer.add_rope_freq_base(float(rotary["rope_theta"]))
        if rotary.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rotary["factor"]))
        mixture = self.decoder.architecture.mixture
        if mixture is not None:
            writer.add_expert_count(shapes[0].experts)
            writer.add_expert_used_count(self.decoder.experts_for_a_token)
            if hasattr(config, "moe_intermediate_size"):
                writer.add_expert_feed_forward_length(widths[0])
            if mixture.shared:
                writer.add_expert_shared_feed_forward_length(int(getattr(config, mixture.shared_width)))
        self.family.says(config, writer)

    def targets(self) -> Iterator[Target]:
        """The tensors of the file."""
        if self._rotary().get("rope_type") == "llama3":
            shape = (self.decoder.heads.dim // 2,)
            yield Target("rope_freqs.weight", shape, GGMLQuantizationType.F32, self._factors)
        yield from self.tensors.targets()

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the file."""
        found, shapes, config = [], self.decoder.shapes(), self.decoder.model.config
        if any(shape.kv_heads and shape.value_dim != self.decoder.heads.dim for shape in shapes):
            found.append(
                "value dimensions that were removed are filled up with zeros: the file is not smaller for them"
            )
        odd = sorted({shape.mlp_width for shape in shapes if shape.mlp_width % BLOCK_OF_Q8})
        if self.kind == "q8_0" and odd:
            found.append(
                f"rows of {', '.join(map(str, odd))} numbers are no multiple of {BLOCK_OF_Q8} and stay float16: prune "
                f"with --width-multiple {BLOCK_OF_Q8}"
            )
        if has_windows(config) and not self.family.windows:
            found.append(
                f"llama.cpp lets tokens of a {self.family.name} model see all before them: behind the "
                f"{config.sliding_window} of this model's sliding windows its answers are others"
            )
        return tuple(found)

    def _rotary(self) -> dict[str, Any]:
        """How queries and keys are rotated, in blocks that see all tokens; nothing where they are not."""
        config = self.decoder.model.config
        for kind in rope_types(config):
            if kind not in LLAMA_CPP.rotary:
                raise InputError(
                    f"rotary embeddings scaled by {kind} are not exported to GGUF: {', '.join(LLAMA_CPP.rotary)} are"
                )
        rotary: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
        return dict(rotary.get("full_attention", rotary))

    def _factors(self) -> Tensor:
        """By what llama.cpp divides each frequency, for the scaling of Llama 3.1."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.decoder.model.config, torch.device("cpu"))
        exponents = torch.arange(0, self.decoder.heads.dim, 2, dtype=torch.float64) / self.decoder.heads.dim
        plain = float(self._rotary()["rope_theta"]) ** -exponents
        return plain / scaled.double()
