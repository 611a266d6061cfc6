"""States of restoration: hidden states behind the pieces of a text, with the predictions to which rows are fitted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optprune.measure.evaluate import evaluating
from optprune.models import LoadedModel
from optprune.tokens.rows import TokenRows
from optprune.tokens.targets import PushForward

REPLACED = 0.15
"""the share of the tokens of a text that are replaced by removed ones"""
MOST = 0.5
"""the largest probability with which a token is replaced"""
TOKENS_AT_ONCE = 1024
"""the number of tokens in a forward pass"""


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

    A text has few of the removed tokens, and each only seldom. So some of its tokens are replaced by removed tokens,
    drawn from the dense model's predictions there, and the states inside these weigh less by as much.
    """
    rows, model = TokenRows.of(loaded.model), loaded.model
    generator = torch.Generator().manual_seed(seed)
    found, done = list[States](), 0
    with evaluating(model), loaded.decoder().running():
        for batch in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
            _, logits = _passed(loaded, rows.head, batch)
            replaced = [_replaced(push, ids, scores, generator) for ids, scores in zip(batch, logits, strict=True)]
            _, logits = _passed(loaded, rows.head, torch.stack([ids for ids, _ in replaced]))
            found += _of_windows(loaded, push, rows, replaced, logits)
            done += len(batch)
            on_window(done, len(windows))
    return States.joined(found)


def _replaced(push: PushForward, ids: Tensor, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the ids [length] with some replaced by removed tokens, and the weight of the inside of each token."""
    among = push.probabilities(logits[:-1])[:, push.removed.to(logits.device)].cpu()
    chance = among.sum(1)
    hit = (REPLACED * chance / chance.mean().clamp(min=1e-30)).clamp(max=MOST)
    places = (torch.rand(len(hit), generator=generator) < hit).nonzero()[:, 0]
    new, weights = ids.clone(), torch.ones(len(ids))
    for place in places.tolist():
        new[place + 1] = push.removed[torch.multinomial(among[place], 1, generator=generator)]
        weights[place + 1] = chance[place] / hit[place]
    return new, weights


def _of_windows(
    loaded: LoadedModel, push: PushForward, rows: TokenRows, replaced: Sequence[tuple[Tensor, Tensor]], logits: Tensor
) -> Iterator[States]:
    """Yield the states of each window, from the dense model's logits and a pass over the pieces."""
    kept = torch.tensor(push.vocabulary.kept)
    new = [push.new_ids(ids) for ids, _ in replaced]
    padded = nn.utils.rnn.pad_sequence(new, batch_first=True)
    hidden, own = _passed(loaded, rows.head, kept[padded])
    others = torch.ones(push.rows, dtype=torch.bool, device=own.device)
    others[kept[push.receiving].to(own.device)] = False
    others[push.removed.to(own.device)] = False
    others &= ~push.without_token.to(own.device)
    for number, (ids, inside) in enumerate(replaced):
        count = len(new[number])
        ends, weights = _ends(push, ids, inside)
        scores = own[number, :count]
        targets = push.targets(ids, push.probabilities(logits[number]), push.probabilities(scores[~ends]))
        rest = scores.float().masked_fill(~others, -torch.inf).logsumexp(-1)
        yield States(hidden[number, :count].float(), targets.bfloat16(), rest, weights.to(rest.device))


def _ends(push: PushForward, ids: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each piece of tokens [n] whether it ends its token, and its weight: `inside` where it does not."""
    counts = torch.tensor([len(push.vocabulary.pieces[token]) for token in ids.tolist()])
    ends = torch.zeros(int(counts.sum()), dtype=torch.bool)
    ends[counts.cumsum(0) - 1] = True
    return ends, torch.where(ends, 1.0, inside.repeat_interleave(counts))


def _passed(loaded: LoadedModel, head: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs of the head [batch, length, hidden] and the model's logits [batch, length, rows]."""
    with _inputs_of(head) as found:
        logits = loaded.model(input_ids=ids.to(loaded.model.device), use_cache=False).logits
    return found[0], logits


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets the inputs of a module within the context."""
    found = list[Tensor]()
    handle = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    try:
        yield found
    finally:
        handle.remove()
