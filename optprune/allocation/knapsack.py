"""Division of one budget between layers by their costs: pure arithmetic on tensors, without a model.

Costs must be in one unit. The plain layer loss is not; under an output metric it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optprune.errors import InputError


def global_threshold(costs: Mapping[str, Tensor], keep: int, low: float = 0.0, high: float = 1.0) -> dict[str, int]:
    """Return the number of entries that each layer keeps when the `keep` most costly entries of all layers stay.

    Each layer keeps at least the share `low` of its entries and at most the share `high`; the counts add up to `keep`
    exactly, and no other counts within these limits keep a larger sum of costs, rounded to float32. Ties go to the
    layer named first.
    """
    if not 0 <= low <= high <= 1:
        raise InputError(f"layers must keep a share between {low:g} and {high:g}, which is not a range within [0, 1]")
    if any(bool((~(cost >= 0)).any()) for cost in costs.values()):
        raise InputError("a cost is negative or NaN, so entries cannot be ranked: look for NaN in weights or moments")
    least = {name: math.ceil(low * cost.numel()) for name, cost in costs.items()}
    most = {name: max(math.floor(high * cost.numel()), least[name]) for name, cost in costs.items()}
    if not sum(least.values()) <= keep <= sum(most.values()):
        raise InputError(
            f"{keep} entries cannot be kept when layers keep {low:g} to {high:g} of theirs: "
            f"that is {sum(least.values())} to {sum(most.values())} in all"
        )

    def counts(bits: int) -> dict[str, int]:
        """Return the number of entries that each layer keeps above a threshold, given by its bits."""
        threshold = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        return {
            name: min(max(int((cost.float() > threshold.to(cost.device)).sum()), least[name]), most[name])
            for name, cost in costs.items()
        }

    # Floats that are not negative are ordered like their bits. -1 stands for a threshold below zero.
    below, above = -1, int(torch.tensor(math.inf).view(torch.int32))
    kept, more = counts(above), most
    while above - below > 1:
        middle = (below + above) // 2
        found = counts(middle)
        if sum(found.values()) <= keep:
            above, kept = middle, found
        else:
            below, more = middle, found
    missing = keep - sum(kept.values())
    for name in kept:
        tied = min(more[name] - kept[name], missing)
        kept[name] += tied
        missing -= tied
    return kept


@dataclass(frozen=True, eq=False)
class Curve:
    """Cost curve of a layer: choice k takes prices[k] of the budget and leaves the error errors[k].

    Prices rise from choice to choice. Errors of a greedy method need not fall; a choice that costs more and is worse
    is never chosen.
    """

    prices: Float[Tensor, " choices"] | Int[Tensor, " choices"]
    errors: Float[Tensor, " choices"]

    def __post_init__(self) -> None:
        if self.prices.shape != self.errors.shape or self.prices.numel() == 0:
            raise InputError(
                f"a curve needs a price for each error, not {self.prices.numel()} for {self.errors.numel()}"
            )
        if bool((self.prices.diff() <= 0).any()):
            raise InputError("the prices of a curve must rise from choice to choice")
        if not bool(torch.isfinite(self.errors).all()):
            raise InputError("an error of a curve is NaN or infinite")

    def hull(self) -> list[int]:
        """Return the choices on the lower convex hull whose errors fall; the gain for a price never rises along it."""
        prices, errors = self.prices.tolist(), self.errors.tolist()
        corners: list[int] = []
        for choice, (price, error) in enumerate(zip(prices, errors, strict=True)):
            while len(corners) > 1:
                first, last = corners[-2], corners[-1]
                before = (errors[first] - errors[last]) * (price - prices[last])
                if before >= (errors[last] - error) * (prices[last] - prices[first]):
                    break
                corners.pop()
            if not corners or error < errors[corners[-1]]:
                corners.append(choice)
        return corners


def share_budget(curves: Mapping[str, Curve], budget: float) -> dict[str, int]:
    """Return the choice of each layer, greedy by the fall of the error for its price, along the lower convex hulls.

    The total price is at most `budget`. No choices of the same total price or less have a smaller total error
    (Lagrange; Everett, 1963), so only the unspent rest of the budget could still lower the error. The first step that
    does not fit ends the search.
    """
    hulls = {name: curve.hull() for name, curve in curves.items()}
    spent = sum(float(curve.prices[hulls[name][0]]) for name, curve in curves.items())
    if spent > budget:
        raise InputError(f"the least that all layers can take is {spent:g}, more than the budget of {budget:g}")
    steps = []
    for order, (name, hull) in enumerate(hulls.items()):
        curve = curves[name]
        for last, choice in pairwise(hull):
            price = float(curve.prices[choice] - curve.prices[last])
            gain = float(curve.errors[last] - curve.errors[choice])
            steps.append((-gain / price, order, price, name, choice))
    chosen = {name: hull[0] for name, hull in hulls.items()}
    # Within a layer gains fall, so that sorting keeps the order of its steps.
    for _, _, price, name, choice in sorted(steps, key=lambda step: step[:2]):
        if spent + price > budget:
            break
        spent += price
        chosen[name] = choice
    return chosen


def fill_budget(curves: Mapping[str, Curve], chosen: Mapping[str, int], budget: float) -> dict[str, int]:
    """Return the choices after the rest of a budget is spent, each time on the change that gains most for its price.

    This helps where hulls have few corners. The result is better than `chosen`, but not proved optimal.
    """
    found = dict(chosen)
    left = budget - sum(float(curve.prices[found[name]]) for name, curve in curves.items())
    while True:
        best: tuple[float, str, int] | None = None
        for name, curve in curves.items():
            prices, errors = curve.prices.double(), curve.errors.double()
            price, gain = prices - prices[found[name]], errors[found[name]] - errors
            fits = (gain > 0) & (price <= left)
            if not bool(fits.any()):
                continue
            # A gain for no price has an infinite rate.
            rate = torch.where(fits, gain / price.clamp(min=0), -math.inf)
            choice = int(rate.argmax())
            if best is None or float(rate[choice]) > best[0]:
                best = float(rate[choice]), name, choice
        if best is None:
            return found
        _, name, choice = best
        left -= float(curves[name].prices[choice] - curves[name].prices[found[name]])
        found[name] = choice
