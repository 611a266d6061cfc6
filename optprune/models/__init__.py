"""Models: their architectures as data, the units that can be removed from them, and how they are loaded."""

from optprune.system.environment import check_docstrings

check_docstrings()  # before transformers is imported

from optprune.models.architecture import PARTS, Architecture, BlockAllocation, BlockShape, Heads, rope_types
from optprune.models.checkpoint import has_weights
from optprune.models.decoder import Decoder, LinkedLayers
from optprune.models.draft import Draft, NotUnderstood
from optprune.models.families import ARCHITECTURES
from optprune.models.images import ImageFeatures, image_features, load_processor
from optprune.models.load import (
    DTYPES,
    LoadedModel,
    check_dtype,
    device_of,
    gguf_tensors,
    load_config,
    load_model,
    load_shapes,
    open_model,
    stored_dtype,
    traceable_config,
    vision_folder,
)
from optprune.models.registry import architecture_of, is_known, is_stock, scale_logits
from optprune.models.sources import is_gguf
from optprune.models.tokenizer import load_tokenizer, need_tokenizer, using_tokenizer
from optprune.models.tracing import trace
from optprune.models.units import (
    UNITS,
    Blocks,
    Experts,
    KvGroups,
    LinkedUnits,
    Mlp,
    Pairs,
    RecurrentHeads,
    Target,
    Units,
    Values,
    Weights,
    reorderable,
    unit_kinds,
)

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
    "ImageFeatures",
    "KvGroups",
    "LinkedLayers",
    "LinkedUnits",
    "LoadedModel",
    "Mlp",
    "NotUnderstood",
    "Pairs",
    "RecurrentHeads",
    "Target",
    "Units",
    "Values",
    "Weights",
    "architecture_of",
    "check_dtype",
    "device_of",
    "gguf_tensors",
    "has_weights",
    "image_features",
    "is_gguf",
    "is_known",
    "is_stock",
    "load_config",
    "load_model",
    "load_processor",
    "load_shapes",
    "load_tokenizer",
    "need_tokenizer",
    "open_model",
    "reorderable",
    "rope_types",
    "scale_logits",
    "stored_dtype",
    "trace",
    "traceable_config",
    "unit_kinds",
    "using_tokenizer",
    "vision_folder",
]
