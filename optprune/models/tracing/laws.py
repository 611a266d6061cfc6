"""Laws: what a description promises of the models of a config, tried on a small one with random weights."""

import json
from functools import lru_cache

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from optprune.errors import InputError, is_out_of_memory
from optprune.models.decoder import Decoder
from optprune.models.draft import Draft
from optprune.models.surgery import write
from optprune.models.tracing.bench import Bench, drawn, of_config
from optprune.models.tracing.parts import left_over, same
from optprune.models.units import KvGroups, LinkedUnits, Mlp
from optprune.system.wording import one_line

ROUNDING = 1e-4
"""the share of the largest logit that float32 may explain: sums skip exact zeros, so that their order differs"""


def check_laws(draft: Draft, config: PretrainedConfig) -> None:
    """Raise InputError where a small model of a config is not what a draft says; it takes seconds."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    broken = _broken(json.dumps(draft.to_dict(), sort_keys=True), text)
    if broken:
        raise InputError(f"the architecture file of {draft.model_type} is wrong: {broken[0]}; see optprune inspect")


def broken_laws(draft: Draft, config: PretrainedConfig) -> list[str]:
    """What a draft says and is not so, in words: of the first law that it breaks."""
    small = of_config(config)
    draft.put_into(small)
    for law in (_layers, _inputs, _logits, _slicing):
        try:
            broken = law(draft, small)
        except Exception as error:  # a draft may name anything, which the library answers in many ways
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
    """Each module of a block with weights is a linear layer that is named, or a norm, and so in all blocks."""
    bench = Bench(config)
    named = {path for stage in draft.stages for path in stage}
    roles = {*draft.mlp_producers, draft.mlp_consumer, draft.query, draft.key, draft.value, draft.output}
    if bench.blocks != draft.blocks:
        return [f"the blocks are {bench.blocks}, and not {draft.blocks}"]
    if roles != named or named - bench.linear.keys():
        return [f"the linear layers of a block are {sorted(bench.linear)}, and it names {sorted(named | roles)}"]
    left = left_over(bench, named, {})
    return [f"it passes over {each.module} ({each.kind}): {each.why}" for each in left[:1]]


def _inputs(draft: Draft, config: PretrainedConfig) -> list[str]:
    """Layers run stage by stage, and those of one stage read the same input."""
    linear = Bench(config).linear
    order = [path for path in linear if any(path in stage for stage in draft.stages)]
    place = {path: number for number, stage in enumerate(draft.stages) for path in stage}
    if sorted(order, key=place.__getitem__) != order:
        return [f"the layers run in the order {order}"]
    for stage in draft.stages:
        for path in stage[1:]:
            if not same(linear[path].entered, linear[stage[0]].entered):
                return [f"{path} does not read what {stage[0]} reads"]
    return []


def _logits(draft: Draft, config: PretrainedConfig) -> list[str]:
    """What leaves the last block gives the model's logits."""
    bench = Bench(config)
    draft.put_into(bench.model.config)
    with torch.no_grad():
        found = Decoder(bench.model).logits(bench.outputs[-1])
    return [] if _close(found, bench.logits) else ["what leaves the last block does not give the logits"]


def _slicing(draft: Draft, config: PretrainedConfig) -> list[str]:
    """Units that are cut off are units whose columns are zero, also in a model of the stock class."""
    kinds = [kind for kind in (Mlp(), KvGroups()) if kind.field not in draft.indivisible]
    return [
        f"units {kind.name} that are cut off are not units whose columns are zero"
        for kind in kinds
        if not holds(kind, config)
    ]


def holds(kind: LinkedUnits, config: PretrainedConfig) -> bool:
    """Whether units cut off equal zeroed columns, in place and in a fresh model of the config that comes of it.

    The config is that of a small model, and carries the draft.
    """
    cut, zeroed = (Decoder(drawn(config)) for _ in range(2))
    try:
        for block in range(len(cut.blocks)):
            for layers in kind.layers(cut, block):
                choice = torch.arange(layers.link.units) % 2 == 0
                consumer = zeroed.layer(block, layers.consumer)
                mask = layers.link.column_mask(choice, consumer.in_features)
                write(consumer, consumer.weight * mask)
                cut.keep_units(block, layers, choice)
        expected = _answered(zeroed.model)
        if not _close(_answered(cut.model), expected):
            return False
        cut.record_shapes()
        fresh = drawn(cut.model.config)
        fresh.load_state_dict(cut.model.state_dict())
        return _close(_answered(fresh), expected) and Decoder(fresh).shapes() == cut.shapes()
    except Exception:  # a stock class that cannot run, or hold, fewer of them says so in any way
        return False


def _answered(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= ROUNDING * other.abs().max())
