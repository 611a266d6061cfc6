"""The architectures that optprune knows, by the name that config.json calls them."""

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from optprune.errors import InputError
from optprune.models.architecture import Architecture
from optprune.models.draft import draft_in
from optprune.models.gemma2 import GEMMA2
from optprune.models.gemma3 import GEMMA3
from optprune.models.gpt2 import GPT2
from optprune.models.gpt_neox import GPT_NEOX
from optprune.models.granite import GRANITE
from optprune.models.llama import LLAMA
from optprune.models.mistral import MISTRAL
from optprune.models.mixtral import MIXTRAL
from optprune.models.olmo2 import OLMO2
from optprune.models.olmoe import OLMOE
from optprune.models.opt import OPT
from optprune.models.phi3 import PHI3
from optprune.models.qwen2 import QWEN2
from optprune.models.qwen2_moe import QWEN2_MOE
from optprune.models.qwen3 import QWEN3
from optprune.models.qwen3_moe import QWEN3_MOE
from optprune.models.smollm3 import SMOLLM3
from optprune.models.unknown import not_understood

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        *(GEMMA2, GEMMA3, GPT2, GPT_NEOX, GRANITE, LLAMA, MISTRAL, MIXTRAL, OLMO2, OLMOE),
        *(OPT, PHI3, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, SMOLLM3),
    )
}
SHAPES_FIELD = "optprune_shapes"
"""the config field that lists the blocks' shapes where the stock class cannot have them"""

for _architecture in ARCHITECTURES.values():
    assert _architecture.pruned is not None
    # So that transformers' own Auto classes find them, wherever optprune is imported; exist_ok for a second import.
    AutoConfig.register(_architecture.pruned.config.model_type, _architecture.pruned.config, exist_ok=True)
    AutoModelForCausalLM.register(_architecture.pruned.config, _architecture.pruned.model, exist_ok=True)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a config, or an InputError that lists those known, and what is not understood."""
    return architecture_called(config.model_type, config).of(config)


def is_known(config: PretrainedConfig) -> bool:
    """Whether there is an architecture of a config, described here or in a draft that it carries."""
    return _known(config.model_type, config) is not None


def architecture_called(model_type: object, config: PretrainedConfig | dict[str, object] | None = None) -> Architecture:
    """The architecture that config.json calls so, pruned or not; or an InputError that lists those known.

    The error names what of a block has no place in any of those, where transformers can make one of the `config`.
    """
    found = _known(model_type, config)
    if found is None:
        raise InputError(
            f"the architecture {model_type!r} is not known: optprune prunes {', '.join(sorted(ARCHITECTURES))} "
            f"(an architecture is one file of data in optprune/models){not_understood(config, ARCHITECTURES.values())}"
            "; optprune inspect MODEL drafts one for --architecture, where that is safe"
        )
    return found


def answer_of(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """The logits of a model whose head gives these: of one that is not known, those that its head gives."""
    found = _known(config.model_type, config)
    return logits if found is None else found.answer(config, logits)


def is_stock(config: PretrainedConfig) -> bool:
    """Whether plain transformers can hold a model of this config."""
    return getattr(config, SHAPES_FIELD, None) is None


def _known(model_type: object, config: PretrainedConfig | dict[str, object] | None) -> Architecture | None:
    draft = draft_in(config)
    if draft is not None:
        return draft.architecture()
    return next((one for one in ARCHITECTURES.values() if model_type in one.model_types), None)
