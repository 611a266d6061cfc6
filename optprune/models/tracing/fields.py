"""Fields: which of a config's fields say what of a model, found by setting them and looking at what changes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from optprune.models.architecture import Heads
from optprune.models.draft import heads_from_fields
from optprune.models.tracing.bench import Bench, of_config, shapes_only
from optprune.models.tracing.parts import nearly, same
from optprune.numerics.modules import first_output

HEADS = {"query": "num_attention_heads", "kv": "num_key_value_heads", "dim": "head_dim"}
"""what transformers calls them, in every config that has them or an attribute map to them"""


def _sizes(config: PretrainedConfig, blocks: str, **changes: Any) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the weights in the first block of a config that is changed; None where there is no such model."""
    try:
        block = shapes_only(of_config(config, **changes)).get_submodule(f"{blocks}.0")
    except Exception:  # what a config of other numbers leads to is up to the library
        return None
    return {name: tuple(weight.shape) for name, weight in block.named_parameters()}


def mlp_width(bench: Bench, consumer: str) -> str | None:
    """The field that says how wide the MLP is: with another number there, the input of its last layer is as wide."""
    width = bench.linear[consumer].entered.shape[-1]
    fields = bench.whole.to_dict()
    named = [name for name, value in fields.items() if type(value) is int and value == width]
    unset = [name for name, value in fields.items() if value is None and "token" not in name]
    usual = _sizes(bench.whole, bench.blocks)
    for name in (*sorted(named, key=lambda name: "inter" not in name), *unset):
        # Several widths, since some fields are only a multiple of it.
        if usual is not None and all(
            _so_wide(bench, usual, consumer, name, other) for other in (2 * width, width + 8, max(8, width // 4))
        ):
            return name
    return None


def _so_wide(bench: Bench, usual: dict[str, tuple[int, ...]], consumer: str, name: str, width: int) -> bool:
    """Whether with this width in a field the MLP's last layer reads so much, and hidden states are as before."""
    sizes = _sizes(bench.whole, bench.blocks, **{name: width})
    if sizes is None or sizes.keys() != usual.keys():
        return False
    before = bench.linear[consumer].entered.shape[-1]
    wanted = [width if length == before else length for length in usual[f"{consumer}.weight"]]
    moved = {path for path, size in sizes.items() if size != usual[path]}
    return list(sizes[f"{consumer}.weight"]) == wanted and not any("norm" in path for path in moved)


def heads_of(config: PretrainedConfig) -> list[tuple[dict[str, str], Heads]]:
    """The head layouts that a config may mean, with the fields that say it; some have a field that says nothing."""
    there = {what: name for what, name in HEADS.items() if what == "query" or getattr(config, name, None) is not None}
    layouts = [there, *({k: v for k, v in there.items() if k != what} for what in ("kv", "dim") if what in there)]
    return [(names, heads_from_fields(names, config)) for names in layouts]


def head_dim_is_free(bench: Bench, heads: Heads, output: str) -> bool:
    """Whether a config with twice the heads, of the dimension that they have, makes a model that has them."""
    changes = {HEADS["query"]: 2 * heads.query, HEADS["dim"]: heads.dim}
    if getattr(bench.whole, HEADS["kv"], None) is not None:
        changes[HEADS["kv"]] = 2 * heads.kv
    usual, sizes = _sizes(bench.whole, bench.blocks), _sizes(bench.whole, bench.blocks, **changes)
    if usual is None or sizes is None or sizes.keys() != usual.keys():
        return False
    width = heads.query * heads.dim
    once, twice = usual[f"{output}.weight"], sizes[f"{output}.weight"]
    return (
        sorted(twice) == sorted((*(size for size in once if size != width), 2 * width))
        if len(set(once)) > 1
        else (sorted(twice) == sorted((width, 2 * width)))
    )


def after_blocks(bench: Bench) -> tuple[str, ...]:
    """The modules that change the hidden states between the last block and the head, in order."""
    listed: Any = bench.model.get_submodule(bench.blocks)
    head = bench.model.get_output_embeddings()
    last = max(index for index, call in enumerate(bench.calls) if call.module is listed[-1])
    found = []
    for call in bench.calls[last + 1 :]:
        if call.module is head:
            break
        if not any(call.module.children()) and not same(call.entered, call.left):
            found.append(call.path)
    return tuple(found)


def answer(bench: Bench, behind: tuple[str, ...]) -> Mapping[str, str] | None:
    """What becomes of the head's logits: the fields of a divisor, a factor or a cap; None where it is not known."""
    hidden = bench.outputs[-1]
    head: nn.Module | None = bench.model.get_output_embeddings()  # type: ignore[assignment]
    if head is None:
        return None
    with torch.no_grad():
        for module in (*map(bench.model.get_submodule, behind), head):
            hidden = first_output(module(hidden))
    numbers = {
        name: value
        for name, value in bench.config.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1)
    }
    if nearly(hidden, bench.logits):
        return {}
    for name, value in numbers.items():
        for what, answered in _answers(hidden, value).items():
            if nearly(answered, bench.logits):
                return {what: name}
    return None


def _answers(logits: Tensor, value: float) -> dict[str, Tensor]:
    return {
        "logits_divisor": logits / value,
        "logits_factor": logits * value,
        "logits_cap": (logits / value).tanh() * value,
    }


def stored_names(bench: Bench) -> dict[str, str]:
    """What files call the tensors that they do not call as the model does."""
    from transformers.core_model_loading import revert_weight_conversion

    state = bench.model.state_dict()
    stored = revert_weight_conversion(bench.model, dict(state))
    new = {name: tensor for name, tensor in stored.items() if name not in state}
    gone = [name for name in state if name not in stored]
    pairs = {name: [other for other, tensor in new.items() if tensor is state[name]] for name in gone}
    return {name: others[0] for name, others in pairs.items() if others}
