"""The cache of a pruned model, whose values may be narrower than its keys, also in transformers 4.57."""

import torch
import transformers
from transformers.cache_utils import StaticLayer

OLDER = int(transformers.__version__.partition(".")[0]) < 5
"""whether transformers is 4.57"""


def remembered(cache, layer, key, value, positions):
    """Return the keys and values of a layer for all tokens so far; the cache holds those before these."""
    if not OLDER:
        return cache.update(key, value, layer)
    static = [each for each in getattr(cache, "layers", ()) if isinstance(each, StaticLayer)]
    if static:
        own = cache.layers[layer]
        if not own.is_initialized:
            own.lazy_initialization(key)
        if own.values.shape[-1] != value.shape[-1]:  # it was allocated for values as wide as keys
            own.values = own.values.new_zeros(*own.values.shape[:-1], value.shape[-1])
            torch._dynamo.mark_static_address(own.values)
        for other in static:
            if not other.is_initialized:  # of a block without attention; the next text reads it from every layer
                other.max_batch_size = len(key)
    return cache.update(key, value, layer, {"cache_position": positions})
