"""The choice of the experts of a mixture to keep, with the exact change of the mixture's output for every choice.

The output of a mixture for token t is sum_j g_j(t) y_j(t): y_j(t) is the output of expert j, and g(t) the router's
weights, of which all but k are zero; they are a softmax of the outputs of its rows, or the sigmoid of each. Without
some experts the router has fewer rows: its softmax is over the rest, and some tokens go to other experts. g(t, K) are
its weights when the set K is kept. The output of a pruned mixture follows from the outputs of all experts for each
token, and its distance from the dense output even from their inner products.
"""

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError, check_count
from optprune.numerics.fingerprint import LATER, fingerprint
from optprune.numerics.tensors import all_finite, check_mask, check_real


def router_gates(logits: Float[Tensor, "tokens experts"], *, sigmoids: bool) -> Float[Tensor, "tokens experts"]:
    """Return a router's weights of all experts: the sigmoid of each logit, or the softmax over the experts."""
    return logits.sigmoid() if sigmoids else logits.softmax(1)


@final
@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """minimise f(K) = 1/2 mean_t |sum_j (g_j(t, K) - g_j(t)) y_j(t)|^2 over sets K of `keep` experts.

    The unit is (output)^2 per token; where the block adds the mixture's output, it is the error of the block. The
    problem is combinatorial and not submodular: the tokens of a removed expert go to the next best of the rest, so
    removals may cost more or less together than apart. REAP (arXiv 2510.13999, section 3) bounds the cost of one
    expert's removal by its own outputs, whoever takes its tokens.
    """

    kind: ClassVar[str] = "expert choice"
    """the name of this kind of problem in reports"""

    logits: Float[Tensor, "tokens experts"]
    """the router's output for each token"""
    products: Float[Tensor, "tokens experts experts"]
    """y_i(t)^T y_j(t)"""
    chosen: int
    """k, the number of experts that the router chooses for a token"""
    normalised: bool
    """whether the weights of the chosen experts are scaled to sum to one"""
    keep: int
    correction: Float[Tensor, "experts"] | None = field(default=None, metadata={LATER: True})
    """the numbers that a router by sigmoids adds to them for the choice; None for a router by a softmax"""

    def __post_init__(self) -> None:
        check_real("the router's output", self.logits, ("tokens", "experts"))
        tokens, experts = self.logits.shape
        for what, value, shape in (
            ("the router's output", self.logits, (tokens, experts)),
            ("the products of the experts' outputs", self.products, (tokens, experts, experts)),
            ("the router's correction", self.correction, (experts,)),
        ):
            if value is not None:
                check_real(what, value, shape)
                if not all_finite(value):
                    raise InputError(
                        f"{what} must be finite: look for NaN in the model, or load it with --dtype float32"
                    )
        check_count("the number of experts that the router chooses", self.chosen)
        check_count("the number of experts to keep", self.keep)
        if not 0 < self.chosen <= self.keep <= self.experts:
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
        correction: Float[Tensor, "experts"] | None = None,
    ) -> "ExpertChoice":
        """Return the problem from the output of every expert for every token, routed to it or not.

        The products of outputs in half precision are in float32.
        """
        if answers.dtype in (torch.float16, torch.bfloat16):
            answers = answers.float()
        return cls(logits, answers @ answers.mT, chosen, normalised, keep, correction)

    @property
    def tokens(self) -> int:
        return len(self.logits)

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    def routed(self, kept: Bool[Tensor, "experts"], tokens: Tensor | slice = slice(None)) -> Int[Tensor, "tokens k"]:
        """Return the experts that the router chooses among the kept ones, for all tokens or for some."""
        return self._order(tokens).where(kept, -torch.inf).topk(self.chosen, dim=1).indices

    def _order(self, tokens: Tensor | slice) -> Float[Tensor, "tokens experts"]:
        """Return the numbers of which the router chooses the largest."""
        logits = self.logits[tokens].double()
        return logits if self.correction is None else logits.sigmoid() + self.correction.double()

    def weights(
        self, kept: Bool[Tensor, "experts"], tokens: Tensor | slice = slice(None)
    ) -> Float[Tensor, "tokens experts"]:
        """Return g(t, K): the softmax over the kept experts at the chosen ones, with sum one if `normalised`.

        With a correction they are sigmoids in place of the softmax. Where no expert is kept all are 0.
        """
        logits = self.logits[tokens].double().where(kept, -torch.inf)
        if not bool(kept.any()):
            return torch.zeros_like(logits)
        places, shares = self.routed(kept, tokens), router_gates(logits, sigmoids=self.correction is not None)
        chosen = torch.zeros_like(logits).scatter_(1, places, shares.gather(1, places))
        return chosen / chosen.sum(1, keepdim=True) if self.normalised else chosen

    def errors(self, kept: Bool[Tensor, "experts"], tokens: Tensor | slice = slice(None)) -> Float[Tensor, "tokens"]:
        """Return half the squared change of the mixture's output for each of the tokens, in float64."""
        change = self.weights(kept, tokens) - self.weights(torch.ones_like(kept), tokens)
        # A change has at most 2 k entries that are not zero.
        places = change.abs().topk(min(2 * self.chosen, self.experts), dim=1).indices
        few, rows = change.gather(1, places), torch.arange(len(change), device=change.device)[:, None, None]
        products = self.products[tokens][rows, places[:, :, None], places[:, None, :]].double()
        return torch.einsum("ti,tij,tj->t", few, products, few).clamp_(min=0) / 2

    def objective(self, kept: Bool[Tensor, "experts"]) -> float:
        """Return f, in float64; InputError where the choice is no mask of the experts."""
        check_mask("the choice of experts", kept, (self.experts,))
        return float(self.errors(kept).mean())

    def violation(self, kept: Bool[Tensor, "experts"]) -> float:
        """Return how far the number of kept experts is from `keep`; 0 exactly when a choice is feasible."""
        return float(abs(int(kept.sum()) - self.keep))

    def relative_error(self, kept: Bool[Tensor, "experts"]) -> float:
        """Return the squared change over the squared output of the dense mixture, both summed over the tokens."""
        whole = self.dense_energy()
        return self.objective(kept) / whole if whole > 0 else 0.0

    def dense_energy(self) -> float:
        """Return half the mean squared output of the dense mixture."""
        dense = self.weights(torch.ones_like(self.start()))
        return float(torch.einsum("ti,tij,tj->t", dense, self.products.double(), dense).mean()) / 2

    def removal_costs(self, kept: Bool[Tensor, "experts"]) -> Float[Tensor, "experts"]:
        """Return f after the removal of each kept expert alone, infinite for the others.

        Where weights sum to one, or are sigmoids, only the tokens routed to an expert change by its removal, so that
        all removals take the work of k evaluations of f. Otherwise every token changes, and each removal takes one
        evaluation.
        """
        routed, now = self.routed(kept), self.errors(kept)
        costs = torch.full((self.experts,), torch.inf, dtype=torch.float64, device=now.device)
        every = torch.ones_like(routed[:, 0], dtype=torch.bool)
        for expert in (number for number in range(self.experts) if kept[number]):
            alone = self.normalised or self.correction is not None
            tokens = torch.any(routed == expert, 1) if alone else every
            without = kept.clone()
            without[expert] = False
            change = (self.errors(without, tokens) - now[tokens]).sum()
            costs[expert] = (now.sum() + change) / self.tokens
        return costs

    def start(self) -> Bool[Tensor, "experts"]:
        """Return a feasible choice that costs nothing to find: the first experts."""
        return torch.arange(self.experts, device=self.logits.device) < self.keep

    def fingerprint(self) -> str:
        """Return a hash of the problem's content, the same in every process."""
        return fingerprint(self)
