"""What is not understood of a model whose architecture is not known: those modules of its block that no other has."""

import copy
from collections.abc import Collection, Iterable
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from optprune.models.architecture import Architecture

MOST = 6
"""so many modules are named"""


def not_understood(config: PretrainedConfig | dict[str, Any] | None, known: Collection[Architecture]) -> str:
    """What of a block has no place in the architecture that is nearest, as the end of a sentence.

    Of a config, or of what config.json holds. Nothing where transformers has no model of it; no code is run but its.
    """
    try:
        place, layers = _layers_of(config)
    except Exception:  # whatever a config that nobody knows leads to, there is nothing to say of its modules
        return ""
    nearest = max(known, key=lambda one: len(layers.keys() & set(one.layers)))
    left = [f"{path} ({kind})" for path, kind in layers.items() if path not in nearest.layers]
    absent = [path for path in nearest.layers if path not in layers]
    if not left and not absent:
        return f"; the linear layers of {place} are where {nearest.model_type} has them, so that the file may be short"
    found = [f"does not account for {_listed(left)}"] if left else []
    found += [f"asks for {_listed(absent)}"] if absent else []
    return f"; of {place} the nearest, {nearest.model_type}, {' and '.join(found)}"


def _layers_of(config: PretrainedConfig | dict[str, Any] | None) -> tuple[str, dict[str, str]]:
    """The place of the first block, and its modules that have a matrix of their own, with their classes."""
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
    more = f" and {len(every) - MOST} more" if len(every) > MOST else ""
    return ", ".join(every[:MOST]) + more
