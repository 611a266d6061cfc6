"""Types of a GGUF file, and the rules by which llama.cpp gives each tensor its type.

The rules are those of llama_tensor_get_type_impl, tensor_type_fallback and tensor_allows_quantization in
src/llama-quant.cpp of llama.cpp, at commit 007dbbf3; a test compares the files with those of its llama_model_quantize.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Kind

SMALL_BLOCK = 32
"""numbers of a row that share a scale in q8_0, q5_0 and q4_0; a row of another length stays float16"""
MIXED = (LlamaFileType.MOSTLY_Q4_K_M, LlamaFileType.MOSTLY_Q5_K_M)
"""file types that store some layers in more bits"""
FALLBACK = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""types for rows that are no multiple of 256"""
GUARDED = {Kind.Q4_0: Kind.Q4_1, Kind.Q5_0: Kind.Q5_1}
"""types of the first down projections where there is an importance matrix"""
FEW_EXPERTS = 8
"""number of experts of Mixtral, for which there are rules of their own"""
LARGE = 80
"""blocks of Llama 2 70B, where 8 query heads share a value head"""


@dataclass(frozen=True)
class FileType:
    """Type of a file: that of most matrices, and the number in the metadata."""

    kind: Kind
    number: LlamaFileType

    @property
    def quantised(self) -> bool:
        """Whether numbers share a scale."""
        return self.block > 1

    @property
    def block(self) -> int:
        """The numbers of a row that are packed together."""
        return GGML_QUANT_SIZES[self.kind][0]


TYPES = {
    "f32": FileType(Kind.F32, LlamaFileType.ALL_F32),
    "f16": FileType(Kind.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": FileType(Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_K": FileType(Kind.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_K": FileType(Kind.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q5_0": FileType(Kind.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_K": FileType(Kind.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_0": FileType(Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
"""types by their names in `--type`; q4_K and q5_K are the mixes Q4_K_M and Q5_K_M, as in llama-quantize"""


class Role(Enum):
    """Role of a matrix in the model, as far as its type depends on it."""

    OUTPUT = auto()
    EMBEDDING = auto()
    VALUE = auto()
    KEY = auto()
    ATTENTION_OUTPUT = auto()
    DOWN = auto()
    OTHER = auto()


ROLES = {
    "output.weight": Role.OUTPUT,
    "token_embd.weight": Role.EMBEDDING,
    "attn_qkv.weight": Role.VALUE,
    "attn_v.weight": Role.VALUE,
    "attn_k.weight": Role.KEY,
    "attn_output.weight": Role.ATTENTION_OUTPUT,
}
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
EXACT = ("ffn_gate_inp.weight", "shortconv.conv.weight", "ssm_conv1d.weight", "ssm_norm.weight")
"""matrices that stay float32"""
PLAIN = ("position_embd.weight", "token_types.weight", "per_layer_model_proj.weight")
"""matrices that are never quantised"""


@dataclass(frozen=True)
class Choice:
    """Rules for the tensors of one file."""

    file: FileType
    shapes: Mapping[str, tuple[int, ...]]
    """shapes of all tensors by name"""
    blocks: int
    experts: int = 0
    shared_heads: bool = False
    """whether several query heads share a KV head"""
    importance: bool = False
    """whether there is an importance matrix"""

    def kinds(self) -> dict[str, Kind]:
        """Return the type of every tensor."""
        valued = sorted(number for name in self.shapes for role, number in [_place(name)] if role is Role.VALUE)
        turns = {number: turn for turn, number in enumerate(valued)}
        return {name: self._kind(name, shape, turns) for name, shape in self.shapes.items()}

    def _kind(self, name: str, shape: tuple[int, ...], turns: Mapping[int, int]) -> Kind:
        if len(shape) == 1 or name.endswith(EXACT) or not name.endswith("weight"):
            return Kind.F32
        if not self.file.quantised:
            return self.file.kind
        if name.endswith(PLAIN):
            return Kind.F16
        return fallback(self._wanted(name, shape, turns), shape[-1])

    def _wanted(self, name: str, shape: tuple[int, ...], turns: Mapping[int, int]) -> Kind:
        """Return the type for a role in the file, whatever the length of its rows."""
        role, number = _place(name)
        base = self.file.kind
        if role is Role.EMBEDDING and "output.weight" in self.shapes:
            return base
        if role in (Role.OUTPUT, Role.EMBEDDING):
            return Kind.Q8_0 if shape[-1] % self.file.block or base is Kind.Q8_0 else Kind.Q6_K
        if role is Role.VALUE:
            return self._of_values(turns[number], len(turns))
        if role is Role.DOWN:
            return self._of_down(number)
        if self.experts == FEW_EXPERTS and role is Role.KEY:
            return Kind.Q8_0
        few = self.experts == FEW_EXPERTS and self.file.number == LlamaFileType.MOSTLY_Q4_K_M
        return Kind.Q5_K if few and role is Role.ATTENTION_OUTPUT else base

    def _of_values(self, turn: int, count: int) -> Kind:
        if self.experts == FEW_EXPERTS:
            return Kind.Q8_0
        kind = Kind.Q6_K if self.file.number in MIXED and _more_bits(turn, count) else self.file.kind
        large = self.blocks == LARGE and self.shared_heads
        return Kind.Q5_K if large and kind is Kind.Q4_K else kind

    def _of_down(self, number: int) -> Kind:
        if self.file.number in MIXED and _more_bits(number, self.blocks):
            return Kind.Q6_K
        guarded = self.importance and number < self.blocks // 8
        return GUARDED.get(self.file.kind, self.file.kind) if guarded else self.file.kind


def fallback(kind: Kind, columns: int) -> Kind:
    """Return the type for rows of a length: another one where the length is no multiple of the type's block."""
    if columns % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    other = FALLBACK.get(kind, Kind.F16)
    return Kind.F16 if columns % GGML_QUANT_SIZES[other][0] else other


def _more_bits(number: int, count: int) -> bool:
    """Return whether a layer is among those with more bits: the first eighth, the last, and every third between."""
    return number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2


def _place(name: str) -> tuple[Role, int]:
    """Return the role of a tensor and the number of its block, -1 outside of blocks."""
    found = BLOCK.fullmatch(name)
    own, number = (found[2], int(found[1])) if found else (name, -1)
    return (Role.DOWN if own.startswith("ffn_down") else ROLES.get(own, Role.OTHER)), number
