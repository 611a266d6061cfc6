"""States of restoration: hidden states behind the pieces of a text, with the predictions to which rows are fitted."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from optprune.measure.evaluate import evaluating
from optprune.models import LoadedModel
from optprune.program.program import VOCABULARY_TOKENS
from optprune.tokens.replacing import with_removed
from optprune.tokens.rows import TokenRows
from optprune.tokens.targets import PushForward
from optprune.tokens.token_models import Counts


@dataclass(frozen=True, eq=False)
class States:
    """Inputs of the head behind the pieces of a text, with the targets of the rows that receive probability."""

    hidden: Tensor
    """h [n, hidden], float32"""
    targets: Tensor
    """q [n, receiving], the probabilities of the receiving tokens, bfloat16"""
    others: Tensor
    """z0 [n], the logarithm of the sum of exp(logits) of all other kept tokens, float32"""
    weights: Tensor
    """w [n], how often a text has such a state, float32"""

    @classmethod
    def joined(cls, parts: "Sequence[States]") -> "States":
        """Return the states of several texts as one."""
        names = ("hidden", "targets", "others", "weights")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def __getitem__(self, places: "slice | Tensor") -> "States":
        """Return some of the states."""
        return States(self.hidden[places], self.targets[places], self.others[places], self.weights[places])

    def __len__(self) -> int:
        return len(self.hidden)


@torch.no_grad()
def read_states(
    loaded: LoadedModel,
    push: PushForward,
    windows: Tensor,
    *,
    seed: int = 0,
    on_window: Callable[[int, int], None] = lambda done, windows: None,
) -> States:
    """Return the states of the dense model behind the pieces of windows of old token ids [n, length].

    They are the states behind each token of the text, and states behind the first pieces of removed tokens. A text has
    few of these tokens, and each only seldom. So some of its tokens are replaced by removed tokens, drawn from the
    dense model's predictions there, and the states inside these weigh as much as the model expects of the text.
    """
    rows = TokenRows.of(loaded.model)
    generator, found = torch.Generator().manual_seed(seed), list[States]()
    for batch in _batches(loaded, windows, on_window):
        reading = _Reading(loaded, push, rows)
        hidden, logits = reading.passed(batch)
        replaced = [
            with_removed(push, ids, push.probabilities(scores), generator)
            for ids, scores in zip(batch, logits, strict=True)
        ]
        inside = reading.inside([ids for ids, _ in replaced], [weights for _, weights in replaced])
        behind = (reading.behind(*each) for each in zip(batch, hidden, logits, strict=True))
        found += [States.joined(pair) for pair in zip(behind, inside, strict=True)]
    return States.joined(found)


@torch.no_grad()
def expected_counts(
    loaded: LoadedModel, windows: Tensor, on_window: Callable[[int, int], None] = lambda done, windows: None
) -> Counts:
    """Return how often a model expects each of its tokens [rows] behind the tokens of windows of ids [n, length].

    These are sums of probabilities, so that tokens which the windows lack have counts too.
    """
    model, total = loaded.model, None
    for batch in _batches(loaded, windows, on_window):
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits
        found = logits.float().softmax(-1).sum((0, 1), dtype=torch.float64).cpu()
        total = found if total is None else total + found
    assert total is not None
    return total.numpy()


def _batches(loaded: LoadedModel, windows: Tensor, on_window: Callable[[int, int], None]) -> Iterator[Tensor]:
    """Yield windows [n, length] in batches while the model can compute, and report how many of them are done."""
    done = 0
    on_window(done, len(windows))
    with evaluating(loaded.model), loaded.decoder().running():
        for batch in windows.split(max(1, VOCABULARY_TOKENS // windows.shape[1])):
            yield batch
            done += len(batch)
            on_window(done, len(windows))


@dataclass(frozen=True, eq=False)
class _Reading:
    """Passes of a dense model, and the states in them."""

    loaded: LoadedModel
    push: PushForward
    rows: TokenRows

    def passed(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the head [batch, length, hidden] and the model's logits [batch, length, rows]."""
        with _inputs_of(self.rows.head) as found:
            logits = self.loaded.model(input_ids=ids.to(self.loaded.model.device), use_cache=False).logits
        return found[0], logits

    def behind(self, ids: Tensor, hidden: Tensor, logits: Tensor) -> States:
        """Return the states behind each token of a text of ids [length]."""
        ends = self.push.ends(ids)
        unused = logits.new_zeros(int((~ends).sum()), self.push.rows, dtype=torch.float32)
        targets = self.push.targets(ids, self.push.probabilities(logits), unused)[ends.to(logits.device)]
        return self._states(hidden, logits, targets, torch.ones(len(ids)))

    def inside(self, texts: Sequence[Tensor], weights: Sequence[Tensor]) -> list[States]:
        """Return for each text the states behind the first pieces of its tokens with a weight."""
        _, dense = self.passed(torch.stack(list(texts)))
        # A text has more pieces than tokens, and perhaps more than the model has positions.
        limit = getattr(self.loaded.model.config, "max_position_embeddings", None) or math.inf
        fitting = [int((self.push.counts(ids).cumsum(0) <= limit).sum()) for ids in texts]
        texts, weights, dense = (
            [one[:count] for one, count in zip(every, fitting, strict=True)] for every in (texts, weights, dense)
        )
        kept, new = torch.tensor(self.push.vocabulary.kept), [self.push.new_ids(ids) for ids in texts]
        hidden, logits = self.passed(kept[nn.utils.rnn.pad_sequence(new, batch_first=True)])
        found = list[States]()
        for number, (ids, weight) in enumerate(zip(texts, weights, strict=True)):
            ends = self.push.ends(ids)
            own, every = logits[number, : len(ends)], weight.repeat_interleave(self.push.counts(ids))
            between = self.push.probabilities(own[~ends])
            targets = self.push.targets(ids, self.push.probabilities(dense[number]), between)
            taken = ~ends & (every > 0)
            found.append(self._states(hidden[number, : len(ends)][taken], own[taken], targets[taken], every[taken]))
        return found

    def _states(self, hidden: Tensor, logits: Tensor, targets: Tensor, weights: Tensor) -> States:
        rest = logits.float().masked_fill(~self._others.to(logits.device), -torch.inf).logsumexp(-1)
        return States(hidden.float(), targets.bfloat16(), rest, weights.to(rest.device))

    @cached_property
    def _others(self) -> Tensor:
        """A mask [rows] of the kept tokens that receive nothing."""
        push = self.push
        others = ~push.without_token
        others[torch.tensor(push.vocabulary.kept)[push.receiving]] = False
        others[push.removed] = False
        return others


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets the inputs of a module within the context."""
    found = list[Tensor]()
    handle = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    try:
        yield found
    finally:
        handle.remove()
