"""Which experts of a mixture to keep: the exact change of what it answers, whatever set of them is left.

A mixture answers sum_j g_j(t) y_j(t) to token t: y_j(t) is what expert j makes of it, and g(t) the router's weights, of
which all but k are zero. Without some experts the router has fewer rows, so that its softmax is over the rest and some
tokens go to others: g(t, K) are its weights when the set K is kept. What a pruned mixture answers is known from the
answers of all experts to each token, and how far it is from the dense one even from their products.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError
from optprune.numerics.fingerprint import fingerprint


@final
@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """minimise f(K) = 1/2 mean_t |sum_j (g_j(t, K) - g_j(t)) y_j(t)|^2 over sets K of `keep` experts.

    In (output)^2 per token, and the error of the whole block behind it where it adds what the mixture answers. It is
    combinatorial and not submodular: an expert that is gone sends its tokens to the next best of the rest, so removals
    may cost more together than apart, or less. REAP (arXiv 2510.13999, section 3) bounds the cost of one expert's
    absence by its own answers, and does not ask who takes its tokens.
    """

    kind: ClassVar[str] = "expert choice"
    """the name of this kind of problem in reports"""

    logits: Float[Tensor, "tokens experts"]
    """what the router makes of each token"""
    products: Float[Tensor, "tokens experts experts"]
    """y_i(t)^T y_j(t)"""
    chosen: int
    """k, how many experts the router chooses for a token"""
    normalised: bool
    """whether the weights of those chosen are scaled to add up to one"""
    keep: int

    def __post_init__(self) -> None:
        if not self.chosen <= self.keep <= self.experts:
            raise InputError(
                f"{self.keep} of {self.experts} experts cannot be kept: the router chooses {self.chosen} for each "
                f"token; keep {self.chosen} to {self.experts}"
            )

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "tokens experts"],
        answers: Float[Tensor, "tokens experts out"],
        chosen: int,
        normalised: bool,
        keep: int,
    ) -> "ExpertChoice":
        """From what each expert answers to each token, whether the router sends it there or not."""
        return cls(logits, answers @ answers.mT, chosen, normalised, keep)

    @property
    def tokens(self) -> int:
        return len(self.logits)

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    def routed(self, kept: Bool[Tensor, "experts"], tokens: Tensor | slice = slice(None)) -> Int[Tensor, "tokens k"]:
        """The experts that a router of these alone chooses for some of the tokens, or for all."""
        return self.logits[tokens].double().where(kept, -torch.inf).topk(self.chosen, dim=1).indices

    def weights(
        self, kept: Bool[Tensor, "experts"], tokens: Tensor | slice = slice(None)
    ) -> Float[Tensor, "tokens experts"]:
        """g(t, K): the softmax over the experts kept, of those chosen, scaled to a sum of one where that is so."""
        logits = self.logits[tokens].double().where(kept, -torch.inf)
        places = logits.topk(self.chosen, dim=1).indices
        chosen = torch.zeros_like(logits).scatter_(1, places, logits.softmax(1).gather(1, places))
        return chosen / chosen.sum(1, keepdim=True) if self.normalised else chosen

    def errors(self, kept: Bool[Tensor, "experts"], tokens: Tensor | slice = slice(None)) -> Float[Tensor, "tokens"]:
        """Half the squared change of the mixture's answer to each of the tokens, in float64."""
        change = self.weights(kept, tokens) - self.weights(torch.ones_like(kept), tokens)
        # A change has at most 2 k entries that are not zero.
        places = change.abs().topk(min(2 * self.chosen, self.experts), dim=1).indices
        few, rows = change.gather(1, places), torch.arange(len(change), device=change.device)[:, None, None]
        products = self.products[tokens][rows, places[:, :, None], places[:, None, :]].double()
        return torch.einsum("ti,tij,tj->t", few, products, few).clamp_(min=0) / 2

    def objective(self, kept: Bool[Tensor, "experts"]) -> float:
        """f, in float64."""
        return float(self.errors(kept).mean())

    def violation(self, kept: Bool[Tensor, "experts"]) -> float:
        """By how many the number of experts is wrong; 0 exactly when a choice is feasible."""
        return float(abs(int(kept.sum()) - self.keep))

    def relative_error(self, kept: Bool[Tensor, "experts"]) -> float:
        """The squared change over the squared answer of the dense mixture, both summed over the tokens."""
        whole = self.answered()
        return self.objective(kept) / whole if whole > 0 else 0.0

    def answered(self) -> float:
        """1/2 mean_t |what the dense mixture answers|^2."""
        dense = self.weights(torch.ones_like(self.start()))
        return float(torch.einsum("ti,tij,tj->t", dense, self.products.double(), dense).mean()) / 2

    def removals(self, kept: Bool[Tensor, "experts"]) -> Float[Tensor, "experts"]:
        """f without each one of the experts kept, infinite for the others.

        Where weights add up to one only tokens that go to an expert notice its absence, so that all removals take the
        work of k evaluations of f. Else its row is missing in the softmax of every token, and they take one each.
        """
        routed, now = self.routed(kept), self.errors(kept)
        costs = torch.full((self.experts,), torch.inf, dtype=torch.float64, device=now.device)
        every = torch.ones_like(routed[:, 0], dtype=torch.bool)
        for expert in (number for number in range(self.experts) if kept[number]):
            tokens = torch.any(routed == expert, 1) if self.normalised else every
            without = kept.clone()
            without[expert] = False
            change = (self.errors(without, tokens) - now[tokens]).sum()
            costs[expert] = (now.sum() + change) / self.tokens
        return costs

    def start(self) -> Bool[Tensor, "experts"]:
        """A feasible choice that costs nothing to find: the first ones."""
        return torch.arange(self.experts, device=self.logits.device) < self.keep

    def fingerprint(self) -> str:
        """A hash of the problem's content: the same problem has the same hash in every process."""
        return fingerprint(self)
