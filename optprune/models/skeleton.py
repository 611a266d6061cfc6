"""Skeletons: models whose decoder blocks have shapes only, and whose other weights are read from a checkpoint."""

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from optprune.errors import InputError
from optprune.models.architecture import Mixture
from optprune.models.checkpoint import Checkpoint, InFiles
from optprune.models.mixture import expert_tensors, separate
from optprune.models.registry import architecture_of
from optprune.models.surgery import as_parameters
from optprune.models.vision import SHAPES
from optprune.system.wording import counted

OLD_BUFFER = r"rotary_emb\.inv_freq"
"""a tensor that older checkpoints hold in every block, and that transformers ignores"""


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of a config whose weights have shapes only; its buffers have their values."""
    cls: Any = AutoModelForCausalLM
    architecture = architecture_of(config)
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(config, dtype=dtype, trust_remote_code=False)
    for block in model.get_submodule(architecture.blocks):
        if architecture.mixture is not None:  # files hold experts one by one
            separate(block, architecture.mixture)
        as_parameters(block, architecture.buffers)
    return model


def keep_block(config: PretrainedConfig, index: int) -> None:
    """Make a config one of a model that has only the block with a number, in place."""
    architecture = architecture_of(config)
    wide, own = architecture.wide(config), config.to_dict().get("per_layer_config") or {}
    for field in (*architecture.by_block, SHAPES):
        if getattr(config, field, None):
            setattr(config, field, [getattr(config, field)[index]])
    if wide:
        setattr(config, architecture.mlp_width, getattr(config, architecture.mlp_width) * wide[index])
    for field, value in architecture.alone.items():
        setattr(config, field, value)
    config.num_hidden_layers = 1
    if own:  # numbers of blocks are words in files
        named = {int(number): fields for number, fields in own.items()}
        config.per_layer_config = {0: named[index]} if index in named else {}


def one_block_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, index: int = 0
) -> PreTrainedModel:
    """Return a model of a config with one block of random weights, for measuring time and memory.

    It has the kind of the block with a number, as the lists of the config say.
    """
    config = copy.deepcopy(config)
    keep_block(config, index)
    for field, value in architecture_of(config).first_dense(0, 1).items():
        setattr(config, field, value)
    model = skeleton(config, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        parent, _, own = name.rpartition(".")
        if not weight.is_floating_point():  # of rotary pairs any will do
            model.get_submodule(parent)._parameters[own] = nn.Parameter(torch.zeros_like(weight, device=device), False)
            continue
        value = torch.ones(weight.shape, dtype=dtype, device=device)
        if weight.ndim > 1:
            value.normal_(0, 0.02, generator=generator)
        model.get_submodule(parent)._parameters[own] = nn.Parameter(value)
    model.tie_weights()
    return model.eval()


def fill(model: PreTrainedModel, checkpoint: Checkpoint, blocks: str, device: torch.device) -> Checkpoint:
    """Read the weights of a skeleton outside its `blocks`, tie the tied ones, and check the rest.

    Return the checkpoint with the model's names for its tensors. InputError where it is not one of this model.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    checkpoint = with_model_names(model, checkpoint)
    there, unknown = checkpoint.tensors, unexpected_tensors(model, checkpoint)
    absent = weights.keys() - there.keys()
    misshapen = [
        f"{name} ({list(there[name].shape)}, not {list(weight.shape)})"
        for name, weight in weights.items()
        if name in there and there[name].shape != weight.shape
    ]
    check_whole(checkpoint.source, model.config.model_type, misshapen, unknown)
    for name, weight in weights.items():
        if name in there and not name.startswith(f"{blocks}."):
            parent, _, own = name.rpartition(".")
            value = checkpoint.read(parent, [own], weight.dtype)[own].to(device)
            model.get_submodule(parent)._parameters[own] = nn.Parameter(value)
    # As in from_pretrained: a weight that is present stands in for a missing one, and two that differ are not tied.
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    check_whole(checkpoint.source, model.config.model_type, sorted(absent), ())
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return checkpoint


def with_model_names(model: PreTrainedModel, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the names and shapes of a model, where its architecture stores others.

    In a checkpoint of the base model alone, without the head, names lack the base model's prefix, which is added.
    """
    architecture = architecture_of(model.config)
    tensors = {architecture.model_name(name): at for name, at in checkpoint.tensors.items()}
    if architecture.mixture is not None:
        tensors = split_experts(tensors, architecture.mixture)
    prefix = f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in tensors):
        weights = dict(model.named_parameters(remove_duplicate=False))
        named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        tensors = {name: tensor for name, tensor in named.items() if name in weights} or named
    transposed = {name: at.transposed() for name, at in tensors.items() if architecture.is_transposed(name)}
    return replace(checkpoint, tensors=tensors | transposed)


def split_experts(tensors: Mapping[str, InFiles], mixture: Mixture) -> dict[str, InFiles]:
    """Return the tensors with the parameters of each expert, as parts of the tensors that hold all experts."""
    found: dict[str, InFiles] = {}
    kinds = {kind.name: kind for kind in expert_tensors(mixture.layout)}
    for name, tensor in tensors.items():
        place, _, own = name.rpartition(".")
        kind = kinds.get(own) if place.endswith(f".{mixture.experts}") else None
        if kind is None or len(tensor.shape) != kind.dimensions:
            found[name] = tensor
            continue
        for number in range(tensor.shape[0]):
            one = tensor.item(number)
            one = one.transposed() if kind.transposed else one
            for part, rows in kind.rows(one.shape[0], mixture.layout).items():
                found[f"{place}.{number}.{part}"] = one.rows(rows)
    return found


def unexpected_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> list[str]:
    """Return the tensors of a checkpoint that are not in a model, except those that transformers ignores too."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    ignored = re.compile("|".join([OLD_BUFFER, *(model._keys_to_ignore_on_load_unexpected or ())]))
    return [name for name in checkpoint.tensors if name not in weights and not ignored.search(name)]


def check_whole(source: str, model_type: str, absent: Collection[str], unknown: Collection[str]) -> None:
    """Raise InputError where tensors of a checkpoint are missing or misshapen, or have no place in the model."""
    if unknown:
        raise InputError(
            f"the weights of {source} hold {counted(len(unknown), 'tensor')} that a {model_type} model does not have, "
            f"such as {min(unknown)}: merge adapters into the weights before pruning"
        )
    if absent:
        raise InputError(
            f"the weights of {source} are incomplete: {counted(len(absent), 'tensor is', 'tensors are')} missing or "
            f"misshapen, such as {next(iter(absent))}: copy the folder again"
        )
