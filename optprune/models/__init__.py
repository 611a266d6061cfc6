"""Models: one architecture a file, mostly data; loading, saving, and the path of the calibration statistics."""

from optprune.models.architecture import Architecture, BlockShape, Heads
from optprune.models.decoder import ARCHITECTURES, PARTS, Decoder, LinkedLayers, architecture_of, is_stock
from optprune.models.inspect import LayerPattern, layer_pattern, model_patterns
from optprune.models.load import (
    DTYPES,
    LoadedModel,
    check_dtype,
    device_of,
    load,
    load_config,
    load_model,
    load_shapes,
    load_tokenizer,
    need_tokenizer,
    stored_dtype,
    using_tokenizer,
)
from optprune.models.original import Original, layer_sizes, original_of, shares_kept
from optprune.models.propagation import POLICIES, Path, Propagation, Visit
from optprune.models.save import SavedModel, cast, check_output, save_model

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "PARTS",
    "POLICIES",
    "Architecture",
    "BlockShape",
    "Decoder",
    "Heads",
    "LayerPattern",
    "LinkedLayers",
    "LoadedModel",
    "Original",
    "Path",
    "Propagation",
    "SavedModel",
    "Visit",
    "architecture_of",
    "cast",
    "check_dtype",
    "check_output",
    "device_of",
    "is_stock",
    "layer_pattern",
    "layer_sizes",
    "load",
    "load_config",
    "load_model",
    "load_shapes",
    "load_tokenizer",
    "model_patterns",
    "need_tokenizer",
    "original_of",
    "save_model",
    "shares_kept",
    "stored_dtype",
    "using_tokenizer",
]
