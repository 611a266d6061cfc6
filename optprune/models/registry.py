"""The architectures that optprune knows, by the name that config.json calls them."""

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from optprune.errors import InputError
from optprune.models.architecture import Architecture
from optprune.models.llama import LLAMA
from optprune.models.opt import OPT
from optprune.models.qwen2 import QWEN2

ARCHITECTURES = {architecture.model_type: architecture for architecture in (LLAMA, OPT, QWEN2)}
SHAPES_FIELD = "optprune_shapes"
"""the config field that lists the blocks' shapes where the stock class cannot have them"""

for _architecture in ARCHITECTURES.values():
    # So that transformers' own Auto classes find them, wherever optprune is imported; exist_ok for a second import.
    AutoConfig.register(_architecture.pruned.config.model_type, _architecture.pruned.config, exist_ok=True)
    AutoModelForCausalLM.register(_architecture.pruned.config, _architecture.pruned.model, exist_ok=True)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a config, or an InputError that lists those known."""
    return architecture_called(config.model_type)


def architecture_called(model_type: object) -> Architecture:
    """The architecture that config.json calls so, pruned or not; or an InputError that lists those known."""
    for architecture in ARCHITECTURES.values():
        if model_type in (architecture.model_type, architecture.pruned.config.model_type):
            return architecture
    raise InputError(
        f"the architecture {model_type!r} is not known: optprune prunes {', '.join(sorted(ARCHITECTURES))} "
        "(an architecture is one file of data in optprune/models)"
    )


def is_stock(config: PretrainedConfig) -> bool:
    """Whether plain transformers can hold a model of this config."""
    return getattr(config, SHAPES_FIELD, None) is None
