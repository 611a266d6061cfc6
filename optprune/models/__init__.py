"""Models: one architecture a file, mostly data; what can go together in them; loading."""

from optprune.models.architecture import PARTS, Architecture, BlockAllocation, BlockShape, Heads
from optprune.models.decoder import Decoder, LinkedLayers
from optprune.models.draft import Draft, NotUnderstood
from optprune.models.granularities import UNITS, Blocks, Experts, Weights
from optprune.models.load import (
    DTYPES,
    LoadedModel,
    check_dtype,
    device_of,
    gguf_tensors,
    is_gguf,
    load,
    load_config,
    load_model,
    load_shapes,
    load_tokenizer,
    need_tokenizer,
    open_model,
    stored_dtype,
    traceable_config,
    using_tokenizer,
)
from optprune.models.registry import ARCHITECTURES, answer_of, architecture_of, is_known, is_stock
from optprune.models.reordering import reorderable
from optprune.models.tracing import trace
from optprune.models.units import KvGroups, LinkedUnits, Mlp, Target, Units, Values
from optprune.models.weights_files import has_weights

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "PARTS",
    "UNITS",
    "Architecture",
    "BlockAllocation",
    "BlockShape",
    "Blocks",
    "Decoder",
    "Draft",
    "Experts",
    "Heads",
    "KvGroups",
    "LinkedLayers",
    "LinkedUnits",
    "LoadedModel",
    "Mlp",
    "NotUnderstood",
    "Target",
    "Units",
    "Values",
    "Weights",
    "answer_of",
    "architecture_of",
    "check_dtype",
    "device_of",
    "gguf_tensors",
    "has_weights",
    "is_gguf",
    "is_known",
    "is_stock",
    "load",
    "load_config",
    "load_model",
    "load_shapes",
    "load_tokenizer",
    "need_tokenizer",
    "open_model",
    "reorderable",
    "stored_dtype",
    "trace",
    "traceable_config",
    "using_tokenizer",
]
