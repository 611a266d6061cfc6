"""Roles: which of a block's linear layers feed which, and what their rows are, by moving rows and looking behind."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optprune.models.architecture import BlockShape, Heads, rows_of_heads
from optprune.models.tracing.bench import MOVED, SEQUENCES, TOKENS, Bench

QUERY: str
KEY: str
VALUE: str
QUERY, KEY, VALUE = "query", "key", "value"


@dataclass(frozen=True)
class Fed:
    """A layer that adds to the hidden states, and what stands before it."""

    consumer: str
    producers: tuple[str, ...]
    mixes: bool
    """whether tokens see others on the way"""


def wiring(bench: Bench) -> tuple[list[Fed], dict[str, str]]:
    """Which layers add to the hidden states and which feed those alone; and what has no such place, with the reason."""
    linear, odd = bench.linear, dict[str, str]()
    quiet, still = bench.run({}, tuple(linear))
    feeds: dict[str, list[str]] = {}
    mixing, writers = set[tuple[str, str]](), list[str]()
    for path, call in linear.items():
        if call.left.shape[:-1].numel() != SEQUENCES * TOKENS:
            odd[path] = f"it runs on states of shape {list(call.left.shape)}, and not on those of every token"
            continue
        seen, output = bench.run({path: _moved_token}, tuple(linear))
        reached = [other for other in linear if not torch.equal(seen[other], quiet[other])]
        if not torch.equal(output, still):
            writers.append(path)
        else:
            feeds[path] = reached
            mixing |= {(path, other) for other in reached if _tokens(seen[other], quiet[other]) - {MOVED}}
    found = []
    for writer in writers:
        producers = tuple(path for path, reached in feeds.items() if writer in reached)
        mixes = any((path, writer) in mixing for path in producers)
        found.append(Fed(writer, producers, mixes))
        if not producers:
            odd[writer] = "it adds to the hidden states, and no linear layer stands before it"
    for path, reached in feeds.items():
        if len(reached) != 1 or reached[0] not in writers:
            others = ", ".join(reached) or "no linear layer"
            odd[path] = f"it leads to {others}, and not to one layer that adds to the hidden states"
    return found, odd


def rows_apart(bench: Bench, fed: Fed) -> int | None:
    """How many rows of each producer an MLP unit has, as far apart as there are units; None where they lie otherwise.

    Half of the units are moved, at all tokens: those columns of the consumer's input change, and no others.
    """
    width = bench.linear[fed.consumer].entered.shape[-1]
    counts = {bench.linear[path].left.shape[-1] / width for path in fed.producers}
    if len(counts) != 1 or (count := counts.pop()) != int(count):
        return None
    quiet, _ = bench.run({}, (fed.consumer,))
    half = torch.randperm(width, generator=torch.Generator().manual_seed(1)) < (width + 1) // 2
    for path in fed.producers:
        for part in range(int(count)):
            rows = torch.zeros(int(count), width, dtype=torch.bool)
            rows[part] = half
            seen, _ = bench.run({path: lambda out, rows=rows: out + 3 * _noise(out) * rows.flatten()}, (fed.consumer,))
            if not torch.equal(_columns(seen[fed.consumer], quiet[fed.consumer]), half):
                return None
    return int(count)


@dataclass(frozen=True)
class Attention:
    """What the rows before an attention's output layer are."""

    query: str
    key: str
    value: str
    joined: str
    coupled: bool
    """whether a row of queries, or of keys, changes all heads, as under one norm of them all"""


def attention_rows(bench: Bench, fed: Fed, heads: Heads) -> Attention | str:
    """The layers of queries, keys and values and how they lie there, or why that is not understood."""
    width = bench.linear[fed.consumer].entered.shape[-1]
    if width != heads.query * heads.dim:
        return f"{fed.consumer} reads {width} numbers, and not {heads.query} heads of {heads.dim}"
    if len(fed.producers) == 3:
        first = {path: _roles(bench, fed, heads, path, [0])[0][0] for path in fed.producers}
        by_role = {role: path for path, role in first.items()}
        guesses = [("", by_role)] if set(by_role) == {QUERY, KEY, VALUE} else []
    elif len(fed.producers) == 1:
        guesses = [(joined, dict.fromkeys((QUERY, KEY, VALUE), fed.producers[0])) for joined in ("parts", "heads")]
    else:
        guesses = []
    for joined, paths in guesses:
        coupled = _fits(bench, fed, heads, joined, paths)
        if coupled is not None:
            return Attention(paths[QUERY], paths[KEY], paths[VALUE], joined, coupled)
    return (
        f"the rows of {', '.join(fed.producers)} are not queries, keys and values of {heads} in an order that is known"
    )


def _fits(bench: Bench, fed: Fed, heads: Heads, joined: str, paths: dict[str, str]) -> bool | None:
    """Whether heads are coupled, where rows are what is guessed of them; else None. One of each head is moved."""
    rows = rows_of_heads(joined, heads, BlockShape(0, heads.kv, heads.dim), torch.device("cpu"))
    columns = torch.arange(heads.query * heads.dim).reshape(heads.kv, heads.group, heads.dim)
    sizes: dict[str, int] = {}
    for path, each in zip((paths[QUERY], paths[KEY], paths[VALUE]), rows, strict=True):
        sizes[path] = sizes.get(path, 0) + each.numel()
    if any(bench.linear[path].left.shape[-1] != size for path, size in sizes.items()):
        return None
    coupled = set[bool]()
    for role, each in zip((QUERY, KEY, VALUE), rows, strict=True):
        # Another dimension of each head, so that none of them is special.
        picked = [(head, (5 * head + 1) % heads.dim) for head in range(heads.kv)]
        places = [(head, dim + heads.dim * (head % heads.group)) for head, dim in picked] if role == QUERY else picked
        found = _roles(bench, fed, heads, paths[role], [int(each[head, place]) for head, place in places])
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


def _roles(bench: Bench, fed: Fed, heads: Heads, path: str, rows: Sequence[int]) -> list[tuple[str, Tensor]]:
    """What each of these rows of a layer is, and the columns of the consumer's input that it changes.

    A query changes what its own token gets. A value changes one column of each head that reads it, a key whole heads.
    """
    quiet, _ = bench.run({}, (fed.consumer,))
    found = []
    for start in range(0, len(rows), SEQUENCES):
        part = rows[start : start + SEQUENCES]

        def move(out: Tensor, part: Sequence[int] = part) -> Tensor:
            out = out.clone()
            for sequence, row in enumerate(part):
                out[sequence, MOVED, row] += 2 * out.std()
            return out

        seen, _ = bench.run({path: move}, (fed.consumer,))
        for sequence in range(len(part)):
            after, before = seen[fed.consumer][sequence][None], quiet[fed.consumer][sequence][None]
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
    """The columns that differ, as a bool mask."""
    return (after != before).flatten(0, -2).any(0)


def _tokens(after: Tensor, before: Tensor) -> set[int]:
    """The tokens at which anything differs."""
    return set((after != before).any(-1).any(0).nonzero().flatten().tolist())
