"""Models: one architecture a file, mostly data; loading, saving, and the path of the calibration statistics."""

from optprune.models.architecture import PARTS, Architecture, BlockAllocation, BlockShape, Heads
from optprune.models.decoder import ARCHITECTURES, Decoder, LinkedLayers, architecture_of, is_stock
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
    open_model,
    stored_dtype,
    using_tokenizer,
)
from optprune.models.original import Original, layer_sizes, original_of, shares_kept
from optprune.models.propagation import POLICIES, Path, Propagation, Visit
from optprune.models.save import SavedModel, cast, check_output, save_model
from optprune.models.units import UNITS, Blocks, KvGroups, LinkedUnits, Mlp, Target, Units, Values, Weights

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "PARTS",
    "POLICIES",
    "UNITS",
    "Architecture",
    "BlockAllocation",
    "BlockShape",
    "Blocks",
    "Decoder",
    "Heads",
    "KvGroups",
    "LayerPattern",
    "LinkedLayers",
    "LinkedUnits",
    "LoadedModel",
    "Mlp",
    "Original",
    "Path",
    "Propagation",
    "SavedModel",
    "Target",
    "Units",
    "Values",
    "Visit",
    "Weights",
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
    "open_model",
    "original_of",
    "save_model",
    "shares_kept",
    "stored_dtype",
    "using_tokenizer",
]
