"""Roles of a block's linear layers and of their rows, found by changing outputs and comparing later inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optprune.models.architecture import BlockShape, Heads, rows_of_heads
from optprune.models.tracing.traced_model import MOVED, SEQUENCES, TOKENS, TracedModel

QUERY: str = "query"
KEY: str = "key"
VALUE: str = "value"


@dataclass(frozen=True)
class ResidualBranch:
    """A layer that adds to the hidden states, with the linear layers before it."""

    consumer: str
    producers: tuple[str, ...]
    mixes: bool
    """whether tokens are mixed on the way"""


def wiring(traced: TracedModel) -> tuple[list[ResidualBranch], dict[str, str]]:
    """Return the layers that add to the hidden states with those that feed them, and the other layers with reasons."""
    linear, unplaced = traced.linear, dict[str, str]()
    baseline, baseline_output = traced.run({}, tuple(linear))
    feeds: dict[str, list[str]] = {}
    mixing, writers = set[tuple[str, str]](), list[str]()
    for path, call in linear.items():
        if call.output.shape[:-1].numel() != SEQUENCES * TOKENS:
            unplaced[path] = f"it runs on states of shape {list(call.output.shape)}, and not on those of every token"
            continue
        inputs, output = traced.run({path: _moved_token}, tuple(linear))
        reached = [other for other in linear if not torch.equal(inputs[other], baseline[other])]
        if not torch.equal(output, baseline_output):
            writers.append(path)
        else:
            feeds[path] = reached
            mixing |= {(path, other) for other in reached if _tokens(inputs[other], baseline[other]) - {MOVED}}
    found = []
    for writer in writers:
        producers = tuple(path for path, reached in feeds.items() if writer in reached)
        mixes = any((path, writer) in mixing for path in producers)
        found.append(ResidualBranch(writer, producers, mixes))
        if not producers:
            unplaced[writer] = "it adds to the hidden states, and no linear layer stands before it"
    for path, reached in feeds.items():
        if len(reached) != 1 or reached[0] not in writers:
            others = ", ".join(reached) or "no linear layer"
            unplaced[path] = f"it leads to {others}, and not to one layer that adds to the hidden states"
    return found, unplaced


def rows_apart(traced: TracedModel, branch: ResidualBranch) -> int | None:
    """Return the rows of each producer that an MLP unit has, as far apart as there are units; None for other layouts.

    Half of the units are changed at all tokens: exactly those columns of the consumer's input must change.
    """
    width = traced.linear[branch.consumer].input.shape[-1]
    counts = {traced.linear[path].output.shape[-1] / width for path in branch.producers}
    if len(counts) != 1 or (count := counts.pop()) != int(count):
        return None
    baseline, _ = traced.run({}, (branch.consumer,))
    half = torch.randperm(width, generator=torch.Generator().manual_seed(1)) < (width + 1) // 2
    for path in branch.producers:
        for part in range(int(count)):
            rows = torch.zeros(int(count), width, dtype=torch.bool)
            rows[part] = half
            change = {path: lambda out, rows=rows: out + 3 * _noise(out) * rows.flatten()}
            inputs, _ = traced.run(change, (branch.consumer,))
            if not torch.equal(_columns(inputs[branch.consumer], baseline[branch.consumer]), half):
                return None
    return int(count)


@dataclass(frozen=True)
class Attention:
    """The layers of queries, keys and values of an attention, and the layout of their rows."""

    query: str
    key: str
    value: str
    joined: str
    coupled: bool
    """whether a row of queries, or of keys, changes all heads, as under one norm of them all"""


def attention_rows(traced: TracedModel, branch: ResidualBranch, heads: Heads) -> Attention | str:
    """Return the layers of queries, keys and values and their layout, or the reason why it is not understood."""
    width = traced.linear[branch.consumer].input.shape[-1]
    if width != heads.query * heads.dim:
        return f"{branch.consumer} reads {width} numbers, and not {heads.query} heads of {heads.dim}"
    if len(branch.producers) == 3:
        first = {path: _roles(traced, branch, heads, path, [0])[0][0] for path in branch.producers}
        by_role = {role: path for path, role in first.items()}
        guesses = [("", by_role)] if set(by_role) == {QUERY, KEY, VALUE} else []
    elif len(branch.producers) == 1:
        guesses = [(joined, dict.fromkeys((QUERY, KEY, VALUE), branch.producers[0])) for joined in ("parts", "heads")]
    else:
        guesses = []
    for joined, paths in guesses:
        coupled = _fits(traced, branch, heads, joined, paths)
        if coupled is not None:
            return Attention(paths[QUERY], paths[KEY], paths[VALUE], joined, coupled)
    producers = ", ".join(branch.producers)
    return f"the rows of {producers} are not queries, keys and values of {heads} in an order that is known"


def _fits(traced: TracedModel, branch: ResidualBranch, heads: Heads, joined: str, paths: dict[str, str]) -> bool | None:
    """Return whether heads are coupled if the guessed layout holds, else None. One row of each head is changed."""
    rows = rows_of_heads(joined, heads, BlockShape(0, heads.kv, heads.dim), torch.device("cpu"))
    columns = torch.arange(heads.query * heads.dim).reshape(heads.kv, heads.group, heads.dim)
    sizes: dict[str, int] = {}
    for path, each in zip((paths[QUERY], paths[KEY], paths[VALUE]), rows, strict=True):
        sizes[path] = sizes.get(path, 0) + each.numel()
    if any(traced.linear[path].output.shape[-1] != size for path, size in sizes.items()):
        return None
    coupled = set[bool]()
    for role, each in zip((QUERY, KEY, VALUE), rows, strict=True):
        # Another dimension of each head, so that none of them is special.
        picked = [(head, (5 * head + 1) % heads.dim) for head in range(heads.kv)]
        places = [(head, dim + heads.dim * (head % heads.group)) for head, dim in picked] if role == QUERY else picked
        found = _roles(traced, branch, heads, paths[role], [int(each[head, place]) for head, place in places])
        for (head, dim), (is_role, changed) in zip(picked, found, strict=True):
            own = {
                QUERY: columns[head, head % heads.group].flatten(),
                KEY: columns[head].flatten(),
                VALUE: columns[head, :, dim].flatten(),
            }[role]
            wanted = torch.zeros(columns.numel(), dtype=torch.bool)
            wanted[own] = True
            if is_role != role or not (torch.equal(changed, wanted) or (role != VALUE and bool(changed.all()))):
                return None
            if role != VALUE:
                coupled.add(not torch.equal(changed, wanted))
    return None if len(coupled) != 1 else coupled.pop()


def _roles(
    traced: TracedModel, branch: ResidualBranch, heads: Heads, path: str, rows: Sequence[int]
) -> list[tuple[str, Tensor]]:
    """Return the role of each of these rows of a layer, and the columns of the consumer's input that it changes.

    A query changes only its own token. A value changes one column of each head that reads it, a key whole heads.
    """
    baseline, _ = traced.run({}, (branch.consumer,))
    found = []
    for start in range(0, len(rows), SEQUENCES):
        part = rows[start : start + SEQUENCES]

        def move(out: Tensor, part: Sequence[int] = part) -> Tensor:
            out = out.clone()
            for sequence, row in enumerate(part):
                out[sequence, MOVED, row] += 2 * out.std()
            return out

        inputs, _ = traced.run({path: move}, (branch.consumer,))
        for sequence in range(len(part)):
            after, before = inputs[branch.consumer][sequence][None], baseline[branch.consumer][sequence][None]
            columns, tokens = _columns(after, before), _tokens(after, before)
            behind = VALUE if int(columns.sum()) == heads.group else KEY
            role = QUERY if tokens == {MOVED} else behind
            found.append((role, columns))
    return found


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(2)) * like.std()


def _moved_token(out: Tensor) -> Tensor:
    out = out.clone()
    out[:, MOVED] += 2 * _noise(out)[:, MOVED]
    return out


def _columns(after: Tensor, before: Tensor) -> Tensor:
    """Return the columns that differ, as a bool mask."""
    return (after != before).flatten(0, -2).any(0)


def _tokens(after: Tensor, before: Tensor) -> set[int]:
    """Return the tokens at which anything differs."""
    return set((after != before).any(-1).any(0).nonzero().flatten().tolist())
