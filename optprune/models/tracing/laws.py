"""Laws that a description must keep, tested on a small model of a config with random weights."""

import json
from functools import lru_cache

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from optprune.errors import InputError, is_out_of_memory
from optprune.models.decoder import Decoder
from optprune.models.draft import Draft
from optprune.models.surgery import write
from optprune.models.tracing.parts import same, unplaced_modules
from optprune.models.tracing.traced_model import TracedModel, random_model, small_config
from optprune.models.units import KvGroups, LinkedUnits, Mlp
from optprune.system.wording import one_line

ROUNDING = 1e-4
"""the difference allowed to float32, relative to the largest logit: sums that skip exact zeros have another order"""


def check_laws(draft: Draft, config: PretrainedConfig) -> None:
    """Raise InputError where a small model of a config contradicts a draft; it takes seconds."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    broken = _broken(json.dumps(draft.to_dict(), sort_keys=True), text)
    if broken:
        raise InputError(f"the architecture file of {draft.model_type} is wrong: {broken[0]}; see optprune inspect")


def broken_laws(draft: Draft, config: PretrainedConfig) -> list[str]:
    """Return the claims of a draft that are wrong, in words, for the first law that it breaks."""
    small = small_config(config)
    draft.put_into(small)
    for law in (_layers, _inputs, _logits, _slicing):
        try:
            broken = law(draft, small)
        except Exception as error:  # a draft may name anything, and the library fails in many ways
            if is_out_of_memory(error):
                raise
            broken = [f"no model can be read by it ({one_line(error)})"]
        if broken:
            return broken
    return []


@lru_cache(maxsize=8)
def _broken(draft: str, config: str) -> tuple[str, ...]:
    found = AutoConfig.for_model(**json.loads(config))
    return tuple(broken_laws(Draft.from_dict(json.loads(draft), "the draft"), found))


def _layers(draft: Draft, config: PretrainedConfig) -> list[str]:
    """Check that each module with weights is a norm or a linear layer that the draft names."""
    traced = TracedModel(config)
    named = {path for stage in draft.stages for path in stage}
    roles = {*draft.mlp_producers, draft.mlp_consumer, draft.query, draft.key, draft.value, draft.output}
    if traced.blocks != draft.blocks:
        return [f"the blocks are {traced.blocks}, and not {draft.blocks}"]
    if roles != named or named - traced.linear.keys():
        return [f"the linear layers of a block are {sorted(traced.linear)}, and it names {sorted(named | roles)}"]
    left = unplaced_modules(traced, named, {})
    return [f"it leaves out {each.module} ({each.kind}): {each.why}" for each in left[:1]]


def _inputs(draft: Draft, config: PretrainedConfig) -> list[str]:
    """Check that layers run stage by stage, and that the layers of one stage read the same input."""
    linear = TracedModel(config).linear
    order = [path for path in linear if any(path in stage for stage in draft.stages)]
    place = {path: number for number, stage in enumerate(draft.stages) for path in stage}
    if sorted(order, key=place.__getitem__) != order:
        return [f"the layers run in the order {order}"]
    for stage in draft.stages:
        for path in stage[1:]:
            if not same(linear[path].input, linear[stage[0]].input):
                return [f"{path} does not read what {stage[0]} reads"]
    return []


def _logits(draft: Draft, config: PretrainedConfig) -> list[str]:
    """Check that the model's logits follow from the output of the last block."""
    traced = TracedModel(config)
    draft.put_into(traced.model.config)
    with torch.no_grad():
        found = Decoder(traced.model).logits(traced.outputs[-1])
    return [] if _close(found, traced.logits) else ["the logits do not follow from the output of the last block"]


def _slicing(draft: Draft, config: PretrainedConfig) -> list[str]:
    """Check that removed units equal units whose columns are zero, also in a model of the stock class."""
    kinds = [kind for kind in (Mlp(), KvGroups()) if kind.field not in draft.indivisible]
    return [
        f"removed units {kind.name} do not equal units whose columns are zero"
        for kind in kinds
        if not holds(kind, config)
    ]


def holds(kind: LinkedUnits, config: PretrainedConfig) -> bool:
    """Return whether removed units equal zeroed columns, in place and in a fresh model of the resulting config.

    The config is that of a small model, and holds the draft.
    """
    cut, zeroed = (Decoder(random_model(config)) for _ in range(2))
    try:
        for block in range(len(cut.blocks)):
            for layers in kind.layers(cut, block):
                choice = torch.arange(layers.channels.units) % 2 == 0
                consumer = zeroed.layer(block, layers.consumer)
                mask = layers.channels.column_mask(choice, consumer.in_features)
                write(consumer, consumer.weight * mask)
                cut.keep_units(block, layers, choice)
        expected = _model_logits(zeroed.model)
        if not _close(_model_logits(cut.model), expected):
            return False
        cut.record_shapes()
        fresh = random_model(cut.model.config)
        fresh.load_state_dict(cut.model.state_dict())
        return _close(_model_logits(fresh), expected) and Decoder(fresh).shapes() == cut.shapes()
    except Exception:  # a stock class that cannot run with fewer units fails in any way
        return False


def _model_logits(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= ROUNDING * other.abs().max())
