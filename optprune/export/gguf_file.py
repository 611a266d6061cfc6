"""A model folder as a GGUF file for llama.cpp: stock shapes as what they are, uneven ones as its architecture deci."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PretrainedConfig

from optprune.errors import InputError
from optprune.export.gguf_vocabulary import Vocabulary
from optprune.models import Decoder, load_config, load_shapes, load_tokenizer, need_tokenizer
from optprune.models.architecture import BlockShape
from optprune.models.checkpoint import Checkpoint
from optprune.recipe import RUNTIMES
from optprune.system.files import real_path, write_whole

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
BLOCK_OF_Q8 = 32
"""how many numbers share a scale in q8_0: rows of another length are float16"""
IDLE_WIDTH = 32
"""the width of the MLP of zeros in a block that has none: under deci such a block would lose its attention, too"""
LLAMA_CPP = RUNTIMES["gguf"]
"""what llama.cpp takes"""


@dataclass(frozen=True)
class GgufFile:
    """A file that was written."""

    file: Path
    architecture: str
    """the name by which llama.cpp knows it"""
    bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Target:
    """A tensor to come: its name in the file, its shape and type, and how it is made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[], Tensor]


def export_gguf(folder: str | Path, file: str | Path, *, kind: str = "f16") -> GgufFile:
    """Write the model of a folder, with its vocabulary and chat template, as one GGUF file, whole or not at all.

    `kind` is f32, f16 or q8_0; vectors stay float32. Blocks that differ in shape go out under llama.cpp's architecture
    deci, whose head counts and MLP widths are arrays. Fewer value dimensions than a head has are filled up with zeros,
    since there all heads of a file are alike: the answers are the same, the file is no smaller for them. One tensor is
    in memory at a time. InputError for what llama.cpp has no words for: a family, a rotary scaling, a tokenizer.
    """
    if kind not in TYPES:
        raise InputError(f"the type {kind!r} is unknown: give {', '.join(TYPES)}")
    folder, place = Path(folder), real_path(Path(file))
    config = load_config(folder)
    family = config.model_type.removeprefix("pruned_")
    decoder = load_shapes(folder, config)
    if decoder.architecture.model_type not in LLAMA_CPP.families:
        raise InputError(f"models of the kind {family} are not exported to GGUF: {', '.join(LLAMA_CPP.families)} are")
    tokenizer = need_tokenizer(load_tokenizer(folder), str(folder))
    vocabulary = Vocabulary.of(tokenizer, config.vocab_size)
    plan = _Plan(config, decoder, Checkpoint.open(folder), kind)
    writer = GGUFWriter(None, plan.name, use_temp_file=False)
    plan.describe(writer)
    vocabulary.write(writer, tokenizer, folder)
    targets = list(plan.targets())
    write_whole(place, lambda stream: _write(writer, targets, stream), lasting=False)
    return GgufFile(place, plan.name, place.stat().st_size, plan.notes())


def _write(writer: GGUFWriter, targets: "list[_Target]", stream: Any) -> None:
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
        numbers = target.make().to(torch.float32).contiguous().numpy()
        writer.write_tensor_data(gguf.quantize(numbers, target.kind))


class _Plan:
    """What a file says and holds, from a folder's config and tensors."""

    def __init__(self, config: PretrainedConfig, decoder: Decoder, checkpoint: Checkpoint, kind: str) -> None:
        self.config, self.decoder, self.checkpoint, self.kind = config, decoder, checkpoint, kind
        self.shapes, self.heads = decoder.shapes(), decoder.heads
        even = len({(shape.mlp_width, shape.kv_heads) for shape in self.shapes}) == 1
        family = decoder.architecture.model_type
        whole = all(shape.parts == ("attention", "mlp") for shape in self.shapes)
        self.name = family if even and whole else "deci"
        known = gguf.MODEL_ARCH.QWEN2 if self.name == "qwen2" else gguf.MODEL_ARCH.LLAMA
        self.names = gguf.get_tensor_name_map(known, len(self.shapes))
        self.turned = self.name != "qwen2"
        """whether llama.cpp rotates neighbours, where transformers rotates halves"""

    def describe(self, writer: GGUFWriter) -> None:
        """Have the file say what the config says."""
        config, shapes = self.config, self.shapes
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(self.checkpoint.source).name or "model")
        writer.add_file_type(TYPES[self.kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(len(shapes))
        widths = [shape.mlp_width or IDLE_WIDTH for shape in shapes]
        kv = [shape.kv_heads for shape in shapes]
        queries = [count * self.heads.group for count in kv]
        alike = self.name != "deci"
        writer.add_feed_forward_length(widths[0] if alike else widths)
        writer.add_head_count(queries[0] if alike else queries)
        writer.add_head_count_kv(kv[0] if alike else kv)
        writer.add_key_length(self.heads.dim)
        writer.add_value_length(self.heads.dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.heads.dim)
        rotary = self._rotary()
        writer.add_rope_freq_base(float(rotary["rope_theta"]))
        if rotary.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rotary["factor"]))

    def targets(self) -> Iterator[_Target]:
        """The tensors, in the order of the checkpoint."""
        if self._rotary().get("rope_type") == "llama3":
            yield _Target("rope_freqs.weight", (self.heads.dim // 2,), GGMLQuantizationType.F32, self._factors)
        for name, stored in self.checkpoint.tensors.items():
            path = name.rpartition(".")[0].rpartition(".")[2]
            known = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise InputError(f"llama.cpp has no place for the tensor {name} of {self.checkpoint.source}")
            block = name.split(".layers.")[1].split(".")[0] if ".layers." in name else ""
            shape, make = stored.shape, stored.read
            if block:
                own = self.shapes[int(block)]
                if path in ("q_proj", "k_proj") and self.turned:
                    count = own.kv_heads * (self.heads.group if path == "q_proj" else 1)
                    make = _turned(make, count)
                elif path in ("v_proj", "o_proj") and own.value_dim != self.heads.dim and own.kv_heads:
                    shape, make = self._filled(path, own, shape, make)
            yield _Target(known, shape, self._kind(shape), make)
        for index, own in enumerate(self.shapes):
            if not own.mlp_width:
                yield from self._idle(index)

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the file."""
        found = []
        if any(shape.kv_heads and shape.value_dim != self.heads.dim for shape in self.shapes):
            found.append(
                "value dimensions that were removed are filled up with zeros: the file is not smaller for them"
            )
        odd = sorted({shape.mlp_width for shape in self.shapes if shape.mlp_width % BLOCK_OF_Q8})
        if self.kind == "q8_0" and odd:
            found.append(
                f"rows of {', '.join(map(str, odd))} numbers are no multiple of {BLOCK_OF_Q8} and stay float16: prune "
                f"with --width-multiple {BLOCK_OF_Q8}"
            )
        return tuple(found)

    def _rotary(self) -> dict[str, Any]:
        rotary: dict[str, Any] = dict(self.config.rope_parameters or {})
        kind = rotary.get("rope_type", "default")
        if kind not in LLAMA_CPP.rotary:
            raise InputError(
                f"rotary embeddings scaled by {kind} are not exported to GGUF: {', '.join(LLAMA_CPP.rotary)} are"
            )
        if rotary.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError("rotary embeddings of a part of a head are not exported to GGUF")
        return rotary

    def _factors(self) -> Tensor:
        """By what llama.cpp divides each frequency, for the scaling of Llama 3.1."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        exponents = torch.arange(0, self.heads.dim, 2, dtype=torch.float64) / self.heads.dim
        plain = float(self._rotary()["rope_theta"]) ** -exponents
        return plain / scaled.double()

    def _filled(
        self, path: str, own: BlockShape, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
        """A value or output layer with zeros for the value dimensions that are gone."""
        dim, missing = self.heads.dim, self.heads.dim - own.value_dim

        def filled() -> Tensor:
            tensor = make()
            if path == "v_proj":
                rows = tensor.unflatten(0, (own.kv_heads, own.value_dim))
                return torch.cat([rows, rows.new_zeros(own.kv_heads, missing, *rows.shape[2:])], dim=1).flatten(0, 1)
            columns = tensor.unflatten(1, (-1, own.value_dim))
            return torch.nn.functional.pad(columns, (0, missing)).flatten(1, 2)

        if path == "v_proj":
            return (own.kv_heads * dim, *shape[1:]), filled
        return (shape[0], own.kv_heads * self.heads.group * dim), filled

    def _idle(self, block: int) -> Iterator[_Target]:
        """The tensors of an MLP that adds nothing."""
        hidden = int(self.config.hidden_size)
        wide = (IDLE_WIDTH, hidden)
        shapes = {"ffn_norm": (hidden,), "ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}
        for name, shape in shapes.items():
            yield _Target(f"blk.{block}.{name}.weight", shape, self._kind(shape), partial(torch.zeros, shape))

    def _kind(self, shape: tuple[int, ...]) -> GGMLQuantizationType:
        if len(shape) == 1:
            return GGMLQuantizationType.F32
        kind = TYPES[self.kind][0]
        return GGMLQuantizationType.F16 if kind == GGMLQuantizationType.Q8_0 and shape[-1] % BLOCK_OF_Q8 else kind


def _turned(make: Callable[[], Tensor], count: int) -> Callable[[], Tensor]:
    """Rows of so many heads, in which the two halves of each head alternate, as llama.cpp rotates neighbours."""

    def turned() -> Tensor:
        return make().unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)

    return turned
