"""Tracing: a draft of a description, from what a small model of a config does when it is run."""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from optprune.errors import InputError, is_out_of_memory
from optprune.models.draft import OF_STOCK, Draft, NotUnderstood
from optprune.models.tracing import fields, parts
from optprune.models.tracing.bench import Bench, by_block, shapes_only
from optprune.models.tracing.laws import broken_laws, holds
from optprune.models.tracing.roles import Attention, Fed, attention_rows, rows_apart, wiring
from optprune.models.units import KvGroups
from optprune.system.wording import one_line

COUPLED = "one norm goes over the queries of all heads, so that without a head the rest are others"


def trace(config: PretrainedConfig) -> Draft:
    """A draft of the architecture of a config's models, and what of a block it does not understand.

    A model with two blocks of the config's widths and random weights is run, in float32 and on the CPU; laws take three
    of them. No file is read. Layers are told apart by what they read and by what changes where their outputs are moved.
    What the draft claims is then tried: units cut off must equal zeroed columns, what leaves the blocks must give the
    logits. A claim that fails is among what is not understood. InputError where transformers cannot make or run such a
    model.
    """
    try:
        bench = Bench(config)
        draft = _drafted(bench)
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = config.model_type
        raise InputError(f"a {kind} model cannot be made and run to trace it: {one_line(error)}") from error
    broken: list[str] = []
    if not draft.not_understood:
        draft = _with_heads(draft, bench)
        broken = broken_laws(draft, config)
    kind = type(bench.block).__name__
    failed = tuple(NotUnderstood(f"{bench.blocks}.0", kind, sentence) for sentence in broken)
    return replace(draft, not_understood=(*draft.not_understood, *failed))


def _drafted(bench: Bench) -> Draft:
    config, linear = bench.whole, bench.linear
    feds, odd = wiring(bench)
    mixing, local = ([fed for fed in feds if fed.mixes is mixes and fed.producers] for mixes in (True, False))
    whole: list[str] = []
    for what, found in (("an attention", mixing), ("an MLP", local)):
        if len(found) != 1:
            layers = ", ".join(fed.consumer for fed in found) or "none"
            whole.append(f"there is one last layer of {what} where blocks are understood, and here {layers}")
    claims = _empty(config, bench)
    if len(mixing) == 1:
        claims |= _of_attention(bench, mixing[0], odd)
    if len(local) == 1:
        claims |= _of_mlp(bench, local[0], odd)
    claims["recoverable"] += claims.pop("of_mlp", ())
    known = {path for fed in (*mixing[:1], *local[:1]) for path in (*fed.producers, fed.consumer)}
    order = [path for path in linear if path in known]
    stages: list[list[str]] = []
    for path in order:
        if stages and parts.same(linear[stages[-1][0]].entered, linear[path].entered):
            stages[-1].append(path)
        else:
            stages.append([path])
    behind = fields.after_blocks(bench)
    answered = fields.answer(bench, behind)
    if answered is None:
        whole.append("what becomes of the logits behind the head is not known")
    prefix, kind = f"{bench.blocks}.0", type(bench.block).__name__
    answers: dict[str, Any] = {**claims, **(answered or {})}
    return Draft(
        after_blocks=behind,
        stages=tuple(map(tuple, stages)),
        ends_with_norm=parts.ends_with_norm(bench),
        transposed=tuple(path for path in order if type(linear[path].module) is Conv1D),
        stored_names=fields.stored_names(bench),
        not_understood=(
            *parts.left_over(bench, known, odd),
            *parts.differing(shapes_only(config), bench.blocks),
            *(NotUnderstood(prefix, kind, why) for why in whole),
        ),
        **answers,
    )


def _empty(config: PretrainedConfig, bench: Bench) -> dict[str, Any]:
    """What is claimed of any model, and the names of what may not be found."""
    names = ("mlp_consumer", "mlp_width", "attention", "query", "key", "value", "output")
    sets = ("mlp_producers", "attention_parts", "mlp_parts", "recoverable")
    return (
        dict.fromkeys(names, "")
        | dict.fromkeys(sets, ())
        | {
            "model_type": config.model_type,
            "blocks": bench.blocks,
            "heads": {},
            "head_dim_is_free": False,
            "by_block": tuple(dict.fromkeys(("layer_types", *by_block(config)))),
        }
    )


def _of_attention(bench: Bench, fed: Fed, odd: dict[str, str]) -> dict[str, Any]:
    module = parts.common((*fed.producers, fed.consumer))
    tried = [(*layout, attention_rows(bench, fed, layout[1])) for layout in fields.heads_of(bench.whole)]
    names, heads, rows = next((each for each in tried if not isinstance(each[2], str)), tried[0])
    if isinstance(rows, str):
        odd[fed.consumer] = rows
        return {}
    if not module:
        odd[fed.consumer] = "the layers of the attention are in no module of their own"
    free = fields.head_dim_is_free(bench, heads, fed.consumer)
    return {
        "attention": module,
        "query": rows.query,
        "key": rows.key,
        "value": rows.value,
        "joined": rows.joined,
        "output": fed.consumer,
        "heads": names | ({"dim": fields.HEADS["dim"]} if free else {}),
        "head_dim_is_free": free,
        "attention_parts": parts.parts_of(bench, fed, module),
        "recoverable": _recoverable(bench, fed, module),
        "indivisible": _indivisible(rows, free),
    }


def _indivisible(rows: Attention, free: bool) -> dict[str, str]:
    if rows.coupled:
        return {"kv_heads": COUPLED}
    return {} if free else {"kv_heads": OF_STOCK}


def _of_mlp(bench: Bench, fed: Fed, odd: dict[str, str]) -> dict[str, Any]:
    module = parts.common((*fed.producers, fed.consumer))
    apart = rows_apart(bench, fed)
    width = fields.mlp_width(bench, fed.consumer)
    if apart is None:
        odd[fed.consumer] = (
            f"its columns are not one for each row of {', '.join(fed.producers)}, or for some that lie apart"
        )
    elif width is None:
        odd[fed.consumer] = "no field of the config says how many columns it has"
    return {
        "mlp_producers": fed.producers,
        "mlp_consumer": fed.consumer,
        "mlp_width": width or "",
        "rows_of_unit": apart or 1,
        "mlp_parts": parts.parts_of(bench, fed, module),
        "of_mlp": _recoverable(bench, fed, module),
    }


def _recoverable(bench: Bench, fed: Fed, module: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The sub-module with the layers in which it is affine, where those are more than its last one."""
    if not module:
        return ()
    layers = parts.affine(bench, module, (*fed.producers, fed.consumer))
    return ((module, layers),) if len(layers) > 1 else ()


def _with_heads(draft: Draft, bench: Bench) -> Draft:
    """The draft, with heads that all stay where the stock class cannot run or hold fewer."""
    if "kv_heads" in draft.indivisible:
        return draft
    config = bench.config
    draft.put_into(config)
    heads = draft.architecture().heads(config)
    if heads.kv == 1 or holds(KvGroups(), config):
        return draft
    return replace(draft, indivisible={"kv_heads": OF_STOCK})
