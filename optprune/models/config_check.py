"""What a config must say before a model is made of it: errors of the libraries come late, and from anywhere."""

from typing import Any

import torch
from transformers import PretrainedConfig

from optprune.errors import InputError
from optprune.models.architecture import Architecture
from optprune.system.wording import shown

LARGEST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**20,
    "num_key_value_heads": 2**20,
    "hidden_size": 2**24,
    "head_dim": 2**24,
    "vocab_size": 2**31,
    "max_position_embeddings": 2**40,
}
"""the fields that are counts, with a number that no model exceeds"""
FIXED = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""what the forward pass must return"""


def check_config(config: PretrainedConfig, architecture: Architecture, source: str) -> None:
    """Raise InputError when a config's numbers do not make a model."""

    def refuse(name: str, value: Any, wanted: str) -> None:
        raise InputError(
            f"the config of {source} has {name} {shown(value)}, which is not {wanted}: correct config.json, or fetch "
            "it again"
        )

    for name, most in (LARGEST | {architecture.mlp_width: 2**24}).items():
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, int) and 1 <= value <= most):
            refuse(name, value, f"a whole number from 1 to {most}")
    for name, value in FIXED.items():
        if getattr(config, name, value) is not value:
            refuse(name, getattr(config, name), f"{value}, as it is here")
    _check_understood(config, architecture, source)
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        refuse("dtype", dtype, "a floating-point dtype")
    heads = architecture.heads(config)
    if heads.query % heads.kv:
        refuse("num_key_value_heads", heads.kv, f"a divisor of num_attention_heads {heads.query}")
    rotary: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rotary and heads.dim % 2:
        refuse("head_dim", heads.dim, "an even number, since the halves of a head are rotated")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and not (isinstance(window, int) and window >= 1):
        refuse("sliding_window", window, "a whole number of at least 1")


def _check_understood(config: PretrainedConfig, architecture: Architecture, source: str) -> None:
    """Raise InputError where fields say that a model computes what the description does not tell of."""
    wrong = [name for name in architecture.off if getattr(config, name, None)]
    wrong += [name for name, wanted in architecture.fixed.items() if getattr(config, name, wanted) != wanted]
    for name in wrong:
        raise InputError(
            f"the config of {source} has {name} {shown(getattr(config, name))}, and what a "
            f"{architecture.model_type} model computes then is not known: give one without it"
        )
