"""Meaning of config fields, found by setting them and comparing the models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from optprune.models.architecture import Heads
from optprune.models.draft import heads_from_fields
from optprune.models.tracing.parts import nearly, same
from optprune.models.tracing.traced_model import TracedModel, shapes_only, small_config
from optprune.numerics.tensors import first_output

HEADS = {"query": "num_attention_heads", "kv": "num_key_value_heads", "dim": "head_dim"}
"""their names in transformers, in every config that has them or maps an attribute to them"""


def _sizes(config: PretrainedConfig, blocks: str, **changes: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the weights in the first block of a changed config; None where there is no such model."""
    try:
        block = shapes_only(small_config(config, **changes)).get_submodule(f"{blocks}.0")
    except Exception:  # a config with other numbers may fail anywhere in the library
        return None
    return {name: tuple(weight.shape) for name, weight in block.named_parameters()}


def mlp_width(traced: TracedModel, consumer: str) -> str | None:
    """Return the field that holds the MLP's width: with another number there, the last layer's input has that width."""
    width = traced.linear[consumer].input.shape[-1]
    fields = traced.whole.to_dict()
    named = [name for name, value in fields.items() if type(value) is int and value == width]
    unset = [name for name, value in fields.items() if value is None and "token" not in name]
    usual = _sizes(traced.whole, traced.blocks)
    for name in (*sorted(named, key=lambda name: "inter" not in name), *unset):
        # Several widths are tried, since some fields hold a divisor of the width.
        if usual is not None and all(
            _so_wide(traced, usual, consumer, name, other) for other in (2 * width, width + 8, max(8, width // 4))
        ):
            return name
    return None


def _so_wide(traced: TracedModel, usual: dict[str, tuple[int, ...]], consumer: str, name: str, width: int) -> bool:
    """Return whether a width in a field becomes the input width of the MLP's last layer and changes nothing else."""
    sizes = _sizes(traced.whole, traced.blocks, **{name: width})
    if sizes is None or sizes.keys() != usual.keys():
        return False
    before = traced.linear[consumer].input.shape[-1]
    wanted = [width if length == before else length for length in usual[f"{consumer}.weight"]]
    moved = {path for path, size in sizes.items() if size != usual[path]}
    return list(sizes[f"{consumer}.weight"]) == wanted and not any("norm" in path for path in moved)


def heads_of(config: PretrainedConfig) -> list[tuple[dict[str, str], Heads]]:
    """Return the head layouts that a config may mean, with their fields; some configs have a field without effect."""
    known = {role: name for role, name in HEADS.items() if role == "query" or getattr(config, name, None) is not None}
    layouts = [known, *({k: v for k, v in known.items() if k != role} for role in ("kv", "dim") if role in known)]
    return [(names, heads_from_fields(names, config)) for names in layouts]


def head_dim_is_free(traced: TracedModel, heads: Heads, output: str) -> bool:
    """Return whether a config with twice the heads, of unchanged dimension, gives a model with twice the heads."""
    changes = {HEADS["query"]: 2 * heads.query, HEADS["dim"]: heads.dim}
    if getattr(traced.whole, HEADS["kv"], None) is not None:
        changes[HEADS["kv"]] = 2 * heads.kv
    usual, sizes = _sizes(traced.whole, traced.blocks), _sizes(traced.whole, traced.blocks, **changes)
    if usual is None or sizes is None or sizes.keys() != usual.keys():
        return False
    width = heads.query * heads.dim
    once, twice = usual[f"{output}.weight"], sizes[f"{output}.weight"]
    return (
        sorted(twice) == sorted((*(size for size in once if size != width), 2 * width))
        if len(set(once)) > 1
        else (sorted(twice) == sorted((width, 2 * width)))
    )


def after_blocks(traced: TracedModel) -> tuple[str, ...]:
    """Return the modules that change the hidden states between the last block and the head, in order."""
    listed: Any = traced.model.get_submodule(traced.blocks)
    head = traced.model.get_output_embeddings()
    last = max(index for index, call in enumerate(traced.calls) if call.module is listed[-1])
    found = []
    for call in traced.calls[last + 1 :]:
        if call.module is head:
            break
        if not any(call.module.children()) and not same(call.input, call.output):
            found.append(call.path)
    return tuple(found)


def logit_fields(traced: TracedModel, modules: tuple[str, ...]) -> Mapping[str, str] | None:
    """Return the field that divides, multiplies or caps the head's output, by its role; None where neither fits."""
    hidden = traced.outputs[-1]
    head: nn.Module | None = traced.model.get_output_embeddings()  # type: ignore[assignment]
    if head is None:
        return None
    with torch.no_grad():
        for module in (*map(traced.model.get_submodule, modules), head):
            hidden = first_output(module(hidden))
    numbers = {
        name: value
        for name, value in traced.config.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1)
    }
    if nearly(hidden, traced.logits):
        return {}
    for name, value in numbers.items():
        for role, logits in _rescaled(hidden, value).items():
            if nearly(logits, traced.logits):
                return {role: name}
    return None


def _rescaled(logits: Tensor, value: float) -> dict[str, Tensor]:
    return {
        "logits_divisor": logits / value,
        "logits_factor": logits * value,
        "logits_cap": (logits / value).tanh() * value,
    }


def stored_names(traced: TracedModel) -> dict[str, str]:
    """Return the tensors whose names in files differ from those in the model, with the names in files."""
    from transformers.core_model_loading import revert_weight_conversion

    state = traced.model.state_dict()
    stored = revert_weight_conversion(traced.model, dict(state))
    new = {name: tensor for name, tensor in stored.items() if name not in state}
    renamed = [name for name in state if name not in stored]
    pairs = {name: [other for other, tensor in new.items() if tensor is state[name]] for name in renamed}
    return {name: others[0] for name, others in pairs.items() if others}
