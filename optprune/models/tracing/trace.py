"""Derivation of a draft from runs of a small model of a config."""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from optprune.errors import InputError, is_out_of_memory
from optprune.models.draft import OF_STOCK, Draft, NotUnderstood
from optprune.models.tracing import fields, parts
from optprune.models.tracing.laws import broken_laws, holds
from optprune.models.tracing.roles import Attention, ResidualBranch, attention_rows, rows_apart, wiring
from optprune.models.tracing.traced_model import TracedModel, by_block, shapes_only
from optprune.models.units import KvGroups
from optprune.system.wording import one_line

COUPLED = "one norm goes over the queries of all heads, so removing a head changes the others"


def trace(config: PretrainedConfig) -> Draft:
    """Return a draft of the architecture of a config's models, with the modules of a block that are not understood.

    A model with two blocks of the config's widths and random weights runs in float32 on the CPU; the laws use three
    such models. No file is read. Layers are identified by their inputs, and by the inputs that change when their
    outputs are changed. The claims of the draft are then tested: removed units must equal zeroed columns, and the
    logits must follow from the output of the last block. A failed claim is listed among the things that are not
    understood. InputError where transformers cannot build or run such a model.
    """
    try:
        traced = TracedModel(config)
        draft = _drafted(traced)
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = config.model_type
        raise InputError(f"a {kind} model cannot be made and run to trace it: {one_line(error)}") from error
    broken: list[str] = []
    if not draft.not_understood:
        draft = _with_heads(draft, traced)
        broken = broken_laws(draft, config)
    kind = type(traced.block).__name__
    failed = tuple(NotUnderstood(f"{traced.blocks}.0", kind, sentence) for sentence in broken)
    return replace(draft, not_understood=(*draft.not_understood, *failed))


def _drafted(traced: TracedModel) -> Draft:
    config, linear = traced.whole, traced.linear
    branches, unplaced = wiring(traced)
    fed = [branch for branch in branches if branch.producers]
    mixing, local = ([branch for branch in fed if branch.mixes is mixes] for mixes in (True, False))
    problems: list[str] = []
    for what, found in (("an attention", mixing), ("an MLP", local)):
        if len(found) != 1:
            layers = ", ".join(branch.consumer for branch in found) or "none"
            problems.append(f"{what} has one last layer in blocks that are understood, and here {layers}")
    claims = _initial_fields(config, traced)
    if len(mixing) == 1:
        claims |= _attention_fields(traced, mixing[0], unplaced)
    if len(local) == 1:
        claims |= _mlp_fields(traced, local[0], unplaced)
    claims["recoverable"] += claims.pop("mlp_recoverable", ())
    known = {path for branch in (*mixing[:1], *local[:1]) for path in (*branch.producers, branch.consumer)}
    order = [path for path in linear if path in known]
    stages: list[list[str]] = []
    for path in order:
        if stages and parts.same(linear[stages[-1][0]].input, linear[path].input):
            stages[-1].append(path)
        else:
            stages.append([path])
    behind = fields.after_blocks(traced)
    scaling = fields.logit_fields(traced, behind)
    if scaling is None:
        problems.append("the computation of the logits behind the head is not known")
    prefix, kind = f"{traced.blocks}.0", type(traced.block).__name__
    claims |= scaling or {}
    return Draft(
        after_blocks=behind,
        stages=tuple(map(tuple, stages)),
        ends_with_norm=parts.ends_with_norm(traced),
        transposed=tuple(path for path in order if type(linear[path].module) is Conv1D),
        stored_names=fields.stored_names(traced),
        not_understood=(
            *parts.unplaced_modules(traced, known, unplaced),
            *parts.differing_blocks(shapes_only(config), traced.blocks),
            *(NotUnderstood(prefix, kind, why) for why in problems),
        ),
        **claims,
    )


def _initial_fields(config: PretrainedConfig, traced: TracedModel) -> dict[str, Any]:
    """Return the fields of any draft, empty where they are still to be found."""
    names = ("mlp_consumer", "mlp_width", "attention", "query", "key", "value", "output")
    sets = ("mlp_producers", "attention_parts", "mlp_parts", "recoverable")
    return (
        dict.fromkeys(names, "")
        | dict.fromkeys(sets, ())
        | {
            "model_type": config.model_type,
            "blocks": traced.blocks,
            "heads": {},
            "head_dim_is_free": False,
            "by_block": tuple(dict.fromkeys(("layer_types", *by_block(config)))),
        }
    )


def _attention_fields(traced: TracedModel, branch: ResidualBranch, unplaced: dict[str, str]) -> dict[str, Any]:
    module = parts.common_module((*branch.producers, branch.consumer))
    tried = [(*layout, attention_rows(traced, branch, layout[1])) for layout in fields.heads_of(traced.whole)]
    names, heads, rows = next((each for each in tried if not isinstance(each[2], str)), tried[0])
    if isinstance(rows, str):
        unplaced[branch.consumer] = rows
        return {}
    if not module:
        unplaced[branch.consumer] = "the layers of the attention are in no module of their own"
    free = fields.head_dim_is_free(traced, heads, branch.consumer)
    return {
        "attention": module,
        "query": rows.query,
        "key": rows.key,
        "value": rows.value,
        "joined": rows.joined,
        "output": branch.consumer,
        "heads": names | ({"dim": fields.HEADS["dim"]} if free else {}),
        "head_dim_is_free": free,
        "attention_parts": parts.parts_of(traced, branch, module),
        "recoverable": _recoverable(traced, branch, module),
        "indivisible": _indivisible(rows, free),
    }


def _indivisible(rows: Attention, free: bool) -> dict[str, str]:
    if rows.coupled:
        return {"kv_heads": COUPLED}
    return {} if free else {"kv_heads": OF_STOCK}


def _mlp_fields(traced: TracedModel, branch: ResidualBranch, unplaced: dict[str, str]) -> dict[str, Any]:
    module = parts.common_module((*branch.producers, branch.consumer))
    apart = rows_apart(traced, branch)
    width = fields.mlp_width(traced, branch.consumer)
    if apart is None:
        unplaced[branch.consumer] = (
            f"its columns are not one for each row of {', '.join(branch.producers)}, or for some that lie apart"
        )
    elif width is None:
        unplaced[branch.consumer] = "no field of the config says how many columns it has"
    return {
        "mlp_producers": branch.producers,
        "mlp_consumer": branch.consumer,
        "mlp_width": width or "",
        "rows_of_unit": apart or 1,
        "mlp_parts": parts.parts_of(traced, branch, module),
        "mlp_recoverable": _recoverable(traced, branch, module),
    }


def _recoverable(traced: TracedModel, branch: ResidualBranch, module: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the sub-module with the layers in which it is affine, where there is more than its last layer."""
    if not module:
        return ()
    layers = parts.affine_layers(traced, module, (*branch.producers, branch.consumer))
    return ((module, layers),) if len(layers) > 1 else ()


def _with_heads(draft: Draft, traced: TracedModel) -> Draft:
    """Return the draft, with indivisible heads where the stock class cannot run or hold fewer."""
    if "kv_heads" in draft.indivisible:
        return draft
    config = traced.config
    draft.put_into(config)
    heads = draft.architecture().heads(config)
    if heads.kv == 1 or holds(KvGroups(), config):
        return draft
    return replace(draft, indivisible={"kv_heads": OF_STOCK})
