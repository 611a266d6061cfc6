"""Dense model as the teacher of a model with a smaller vocabulary."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.measure.teacher import Teacher
from optprune.models import scale_logits
from optprune.numerics.fingerprint import fingerprint
from optprune.tokens.replacing import with_removed
from optprune.tokens.rows import TokenRows
from optprune.tokens.targets import PushForward
from optprune.tokens.tokenizer import SmallerVocabulary

CHECKED, LEAST_SHARE = 4, 0.9
"""the windows in which tokens are compared, and the least share of tokens that must be written by their pieces"""
LEAST = 1e-30
"""the least probability, for its logarithm"""
UNCHANGED = 0.5
"""the share of the training windows in which no tokens are replaced"""


@dataclass(frozen=True, eq=False)
class PushedTeacher(Teacher):
    """Dense model whose predictions are pushed forward to a smaller vocabulary.

    A window of the student's ids is read as the longest tokens of the teacher that it can be the pieces of. Behind a
    whole token the targets are the push-forward of the teacher's prediction; inside of one they are the continuations
    of the tokens that begin so (see `PushForward`). For that the teacher reads the window twice, by its tokens and by
    their pieces. The states are the logarithms of the targets: 4 bytes for each position and token that stays.
    """

    decides: ClassVar[str] = "perplexity"  # behind pieces that begin others, targets say little of a text
    smaller: SmallerVocabulary = field(kw_only=True)
    precision: Callable[[], AbstractContextManager] = field(kw_only=True)
    """returns the context in which the model is run, such as torch.autocast"""

    @property
    def vocabulary(self) -> int:
        return len(self.smaller.kept)

    @cached_property
    def rows(self) -> TokenRows:
        """The teacher's rows of embedding and head."""
        return TokenRows.of(self.model)

    @cached_property
    def push(self) -> PushForward:
        """The map from the teacher's predictions to those of the tokens that stay."""
        return PushForward(self.smaller, self.rows.count, every=True)

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        return torch.stack([self._targets(window).clamp(min=LEAST).log() for window in ids.cpu()])

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        return hidden

    @torch.no_grad()
    def training_windows(self, ids: Tensor, seed: int) -> Tensor:
        """Return windows of the same size, half of them with removed tokens in place of some, drawn from predictions.

        A text has few of the tokens that it needs least, so that it teaches little about their pieces. Replaced evenly,
        it has more different ones. The other half of the windows has them where texts do.
        """
        generator = torch.Generator().manual_seed(seed)
        found = list[Tensor]()
        for window in ids.cpu():
            if torch.rand((), generator=generator) < UNCHANGED:
                found.append(window)
                continue
            old = self.push.old_ids(window)
            new, _ = with_removed(self.push, old, self._probabilities(old), generator, evenly=True)
            found.append(self.push.new_ids(new)[: len(window)])
        return torch.stack(found) if found else ids

    def check(self, ids: Tensor) -> None:
        """Raise InputError where many tokens of the teacher in a text are not written by their pieces."""
        before, after, shares = self.smaller.before, self.smaller.tokenizer, list[float]()
        for window in ids[:CHECKED].tolist():
            text = after.decode(window, clean_up_tokenization_spaces=False)
            new = torch.tensor(after(text, add_special_tokens=False)["input_ids"])
            tokens, read = before(text, add_special_tokens=False)["input_ids"], self.push.old_ids(new).tolist()
            shares.append(SequenceMatcher(None, tokens, read, autojunk=False).ratio())
        if sum(shares) < LEAST_SHARE * len(shares):
            raise InputError(
                f"only {sum(shares) / len(shares):.0%} of the teacher's tokens in a text are written by their pieces "
                "in the model's tokenizer, so its predictions do not carry over: give the model before pruning as the "
                "teacher"
            )

    def digest(self) -> str:
        return fingerprint([("model", super().digest()), ("kept", torch.tensor(self.smaller.kept))])

    def _targets(self, window: Tensor) -> Tensor:
        """Return the probabilities [length, kept] of the tokens behind each of the ids [length]."""
        push, tokens = self.push, self.push.old_ids(window)
        inside = ~push.ends(tokens)
        between = self._probabilities(torch.tensor(self.smaller.kept)[window])[inside.to(self.model.device)]
        return push.targets(tokens, self._probabilities(tokens), between)

    def _probabilities(self, ids: Tensor) -> Tensor:
        """Return the teacher's probabilities [length, rows] behind each of its own ids [length]."""
        with self.precision():
            hidden = self.model.base_model(input_ids=ids[None].to(self.model.device), use_cache=False)
            logits = scale_logits(self.model.config, self.rows.head(hidden.last_hidden_state[0]))
        return self.push.probabilities(logits)
