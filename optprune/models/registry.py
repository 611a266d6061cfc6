"""The architecture of a config: found among the families or in a draft, and the config checked against it."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from optprune.errors import InputError
from optprune.models.architecture import PART_FIELD, Architecture, register
from optprune.models.draft import draft_in
from optprune.models.families import ARCHITECTURES
from optprune.models.vision import SHAPES, VISION_FAMILIES
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
"""the config fields that are counts, each with a number that no model exceeds"""
REQUIRED = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""the values of the config fields that say what the forward pass returns"""
MOST_NAMED = 6
"""the most modules that one error message names"""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the architecture of a config; InputError that lists the known ones and what is not understood."""
    found = architecture_named(config.model_type, config).for_config(config)
    whole = VISION_FAMILIES.get(getattr(config, PART_FIELD, ""))
    if whole is None:
        return found
    alike = found.model_type not in whole.uneven
    return replace(found, part_of=whole.model_type, part_alike=alike, ordered=whole.ordered)


def is_known(config: PretrainedConfig) -> bool:
    """Return whether a config has an architecture, in the table of families or in a draft that it carries."""
    return _known(config.model_type, config) is not None


def architecture_named(model_type: object, config: PretrainedConfig | dict[str, object] | None = None) -> Architecture:
    """Return the architecture of a model_type in config.json, pruned or not; InputError where it is not known.

    The error names the modules of a block that no known architecture has, if transformers can build the `config`.
    """
    found = _known(model_type, config)
    if found is None:
        raise InputError(
            f"the architecture {model_type!r} is not known: optprune prunes {', '.join(sorted(ARCHITECTURES))} and the "
            f"language part of {', '.join(sorted(VISION_FAMILIES))} (an "
            f"architecture is an entry of optprune/models/families.py){not_understood(config)}"
            "; optprune inspect MODEL drafts one for --architecture, where that is safe"
        )
    return found


def scale_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """Return a model's logits from its head's output; for an architecture that is not known they are the output."""
    found = _known(config.model_type, config)
    return logits if found is None else found.scale_logits(config, logits)


def is_stock(config: PretrainedConfig) -> bool:
    """Return whether plain transformers can hold a model of this config."""
    return getattr(config, SHAPES, None) is None


def _known(model_type: object, config: PretrainedConfig | dict[str, object] | None) -> Architecture | None:
    draft = draft_in(config)
    if draft is not None:
        return draft.architecture()
    found = next((one for one in ARCHITECTURES.values() if model_type in one.model_types), None)
    if found is not None and found.pruned is not None:
        register(found.pruned, AutoModelForCausalLM)
    return found


# -- architectures that are not known


def not_understood(config: PretrainedConfig | dict[str, Any] | None) -> str:
    """Return the end of a sentence that names the modules of a block that the nearest architecture does not have.

    It takes a config, or the contents of config.json. The answer is empty where transformers has no such model; only
    code of transformers is run.
    """
    try:
        path, layers = _matrices_of(config)
    except Exception:  # an unknown config may fail in any way, and then its modules cannot be named
        return ""
    nearest = max(ARCHITECTURES.values(), key=lambda one: len(layers.keys() & set(one.layers)))
    left = [f"{layer} ({kind})" for layer, kind in layers.items() if layer not in nearest.layers]
    absent = [layer for layer in nearest.layers if layer not in layers]
    if not left and not absent:
        return f"; the linear layers of {path} are those of {nearest.model_type}, so the entry may be short"
    found = [f"lacks {_listed(left)}"] if left else []
    found += [f"needs {_listed(absent)}"] if absent else []
    return f"; the nearest architecture to {path}, {nearest.model_type}, {' and '.join(found)}"


def _matrices_of(config: PretrainedConfig | dict[str, Any] | None) -> tuple[str, dict[str, str]]:
    """Return the path of the first block, and its modules that have a matrix of their own, with their classes."""
    if isinstance(config, dict):
        fields = {name: value for name, value in config.items() if name not in ("auto_map", "quantization_config")}
        config = AutoConfig.for_model(**fields)
    config = copy.deepcopy(config)
    assert config is not None
    config.num_hidden_layers = 1
    cls: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(config, trust_remote_code=False)
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    name, blocks = max(lists, key=lambda each: sum(weight.numel() for weight in each[1].parameters()))
    return f"{name}.0", {
        path: type(module).__name__
        for path, module in blocks[0].named_modules()
        if any(weight.ndim > 1 for weight in module.parameters(recurse=False))
    }


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else ""
    return ", ".join(every[:MOST_NAMED]) + more


# -- the numbers of a config


def check_config(config: PretrainedConfig, architecture: Architecture, source: str) -> None:
    """Raise InputError unless the numbers of a config make a model, because the libraries would fail late."""

    def refuse(name: str, value: Any, wanted: str) -> None:
        raise InputError(
            f"the config of {source} has {name} {shown(value)}, which is not {wanted}: correct config.json, or fetch "
            "it again"
        )

    for name, most in (LARGEST | {architecture.mlp_width: 2**24}).items():
        for value in values_of(config, name):
            if value is not None and not (isinstance(value, int) and 1 <= value <= most):
                refuse(name, value, f"a whole number from 1 to {most}")
    for name, value in REQUIRED.items():
        if getattr(config, name, value) is not value:
            refuse(name, getattr(config, name), f"{value}")
    listed = getattr(config, "auto_map", None)
    if listed is not None and not isinstance(listed, dict):
        refuse("auto_map", listed, "an object with the names of classes")
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


def values_of(config: PretrainedConfig, name: str) -> list[Any]:
    """Return the values of a config field: one, or where blocks have their own those of all blocks."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:  # transformers wants to know which block is meant
        return [getattr(one, name, None) for one in config.per_layer_config]


def _check_understood(config: PretrainedConfig, architecture: Architecture, source: str) -> None:
    """Raise InputError where config fields switch on a computation that the architecture does not describe."""
    wrong = [name for name in architecture.off if getattr(config, name, None)]
    wrong += [name for name, wanted in architecture.fixed.items() if getattr(config, name, wanted) != wanted]
    for name in wrong:
        raise InputError(
            f"the config of {source} has {name} {shown(getattr(config, name))}, which is not supported for a "
            f"{architecture.model_type} model: give a model without it"
        )
