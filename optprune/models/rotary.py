"""Rotary embeddings: what a config says of their scaling."""

from transformers import PretrainedConfig


def scalings(config: PretrainedConfig) -> tuple[str, ...]:
    """The scalings of a model's rotary embeddings by name: one, or more where each kind of attention has its own."""
    found = getattr(config, "rope_parameters", None) or {}
    each = list(found.values()) if found and all(isinstance(value, dict) for value in found.values()) else [found]
    return tuple(dict.fromkeys(one.get("rope_type", "default") for one in each))
