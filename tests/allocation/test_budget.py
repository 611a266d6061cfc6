"""One budget for all layers: exact counts, limits, and the best choices by exhaustion and by dynamic programming."""

import sys
from itertools import pairwise, product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from optprune.allocation.knapsack import Curve, fill_budget, global_threshold, share_budget
from optprune.errors import InputError
from tests.helpers.faults import noticed

LIMITS = ((0.0, 1.0), (0.2, 0.8), (0.3, 0.3), (0.5, 1.0))


@st.composite
def layers(draw):
    """A few layers with costs that tie often, some zero."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    return {
        f"layer {number}": torch.tensor(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))).float()
        for number, size in enumerate(sizes)
    }


def limits_of(costs, low, high):
    pairs = {}
    for name, cost in costs.items():
        least = -int(-low * cost.numel() // 1)
        pairs[name] = (least, max(int(high * cost.numel()), least))
    return pairs


def kept_cost(costs, counts):
    return sum(float(cost.flatten().sort(descending=True).values[: counts[name]].sum()) for name, cost in costs.items())


@given(layers(), st.sampled_from(LIMITS), st.data())
def test_counts_are_exact_and_the_best_within_the_limits(costs, limits, data):
    allowed = limits_of(costs, *limits)
    keep = data.draw(st.integers(sum(a for a, _ in allowed.values()), sum(b for _, b in allowed.values())))
    counts = global_threshold(costs, keep, *limits)
    assert sum(counts.values()) == keep
    assert all(allowed[name][0] <= counts[name] <= allowed[name][1] for name in costs)
    every = product(*(range(least, most + 1) for least, most in allowed.values()))
    best = max(kept_cost(costs, dict(zip(costs, choice, strict=True))) for choice in every if sum(choice) == keep)
    # Costs are small integers, so sums are exact.
    assert kept_cost(costs, counts) == best


@given(layers(), st.data())
def test_without_limits_it_is_one_ranking_of_all_entries(costs, data):
    total = sum(cost.numel() for cost in costs.values())
    keep = data.draw(st.integers(0, total))
    counts = global_threshold(costs, keep)
    ranked = torch.cat([cost.flatten() for cost in costs.values()]).sort(descending=True).values
    assert kept_cost(costs, counts) == float(ranked[:keep].sum())


def test_costs_of_any_size_and_dtype_are_ranked():
    costs = {"a": torch.tensor([1e-40, 1e-30]), "b": torch.tensor([[0.0, 1e38, 1e-35]], dtype=torch.float64)}
    assert global_threshold(costs, 2) == {"a": 1, "b": 1}
    assert global_threshold(costs, 3) == {"a": 1, "b": 2}
    assert global_threshold({"a": torch.full((5,), torch.inf), "b": torch.zeros(5)}, 3) == {"a": 3, "b": 0}


def test_scaling_all_costs_changes_nothing_but_scaling_one_layer_does():
    generator = torch.Generator().manual_seed(0)
    costs = {name: torch.rand(50, generator=generator) for name in "abc"}
    counts = global_threshold(costs, 75, 0.2, 0.8)
    assert global_threshold({name: 8 * cost for name, cost in costs.items()}, 75, 0.2, 0.8) == counts
    assert global_threshold({**costs, "a": 8 * costs["a"]}, 75, 0.2, 0.8)["a"] == 40


def test_bad_budgets_are_refused():
    costs = {"a": torch.ones(10)}
    with pytest.raises(InputError, match="9 entries cannot be kept"):
        global_threshold(costs, 9, 0.2, 0.8)
    with pytest.raises(InputError, match="not a range"):
        global_threshold(costs, 5, 0.8, 0.2)
    with pytest.raises(InputError, match="negative or NaN"):
        global_threshold({"a": torch.tensor([1.0, torch.nan])}, 1)
    with pytest.raises(InputError, match="more than the budget"):
        share_budget({"a": Curve(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]))}, 1.0)
    with pytest.raises(InputError, match="rise"):
        Curve(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
    with pytest.raises(InputError, match="NaN or infinite"):
        Curve(torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]))


# -- curves


@st.composite
def some_curves(draw, convex=False):
    """A few curves over at most five choices; integers, so that sums are exact and ties are frequent."""
    found = {}
    for number in range(draw(st.integers(1, 3))):
        choices = draw(st.integers(1, 5))
        if convex:
            falls = sorted(draw(st.lists(st.integers(0, 9), min_size=choices, max_size=choices)), reverse=True)
            errors = sum(falls) - torch.tensor([0, *falls]).cumsum(0)
            prices = torch.arange(len(errors))
        else:
            errors = torch.tensor(draw(st.lists(st.integers(0, 20), min_size=choices, max_size=choices)))
            prices = torch.tensor(draw(st.lists(st.integers(1, 4), min_size=choices, max_size=choices))).cumsum(0)
        found[f"layer {number}"] = Curve(prices, errors.float())
    return found


def knapsack(curves, budget):
    """The least total error at every total price up to the budget, by dynamic programming over the layers."""
    best = {0: 0.0}
    for curve in curves.values():
        after = {}
        for spent, error in best.items():
            for price, more in zip(curve.prices.tolist(), curve.errors.tolist(), strict=True):
                if spent + price <= budget:
                    after[spent + price] = min(after.get(spent + price, float("inf")), error + more)
        best = after
    return min(best.values(), default=None)


def totals(curves, chosen):
    price = sum(float(curve.prices[chosen[name]]) for name, curve in curves.items())
    return price, sum(float(curve.errors[chosen[name]]) for name, curve in curves.items())


@given(some_curves(), st.integers(0, 40))
def test_no_other_choices_of_the_same_price_are_better(curves, budget):
    assume(sum(int(curve.prices[0]) for curve in curves.values()) <= budget)
    price, error = totals(curves, share_budget(curves, budget))
    assert price <= budget
    assert error == knapsack(curves, price)
    assert error >= knapsack(curves, budget)


@given(some_curves(), st.integers(0, 40))
def test_less_than_one_step_of_the_hull_is_lost(curves, budget):
    assume(sum(int(curve.prices[0]) for curve in curves.values()) <= budget)
    _, error = totals(curves, share_budget(curves, budget))
    steps = [float(curve.errors[a] - curve.errors[b]) for curve in curves.values() for a, b in pairwise(curve.hull())]
    assert error - knapsack(curves, budget) <= max(steps, default=0.0)


@given(some_curves(), st.integers(0, 40))
def test_what_is_left_is_spent_until_no_change_of_one_layer_gains(curves, budget):
    assume(sum(int(curve.prices[0]) for curve in curves.values()) <= budget)
    chosen = share_budget(curves, budget)
    filled = fill_budget(curves, chosen, budget)
    price, error = totals(curves, filled)
    assert price <= budget
    assert error <= totals(curves, chosen)[1]
    for name, curve in curves.items():
        for choice in range(len(curve.prices)):
            if price - curve.prices[filled[name]] + curve.prices[choice] <= budget:
                assert curve.errors[choice] >= curve.errors[filled[name]]


def test_a_choice_that_takes_all_that_is_left_is_taken():
    """The greedy division takes no step of the hull, 3 for a fall of 9, and 1 is left for the choice between."""
    curves = {"a": Curve(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 8.0, 1.0]))}
    chosen = share_budget(curves, 2.0)
    assert chosen == {"a": 0}
    assert fill_budget(curves, chosen, 2.0) == {"a": 1}


def test_what_a_cheaper_choice_gives_back_is_spent():
    """From choices that are not the greedy division's: the better one of a costs 1 less, which b then takes."""
    curves = {
        "a": Curve(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 1.0, 5.0])),
        "b": Curve(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 0.0])),
    }
    assert fill_budget(curves, {"a": 2, "b": 0}, 4.0) == {"a": 1, "b": 1}


@given(some_curves(convex=True), st.integers(0, 20))
def test_convex_curves_with_equal_prices_are_shared_optimally(curves, budget):
    _, error = totals(curves, share_budget(curves, budget))
    assert error == knapsack(curves, budget)


@given(some_curves())
def test_the_hull_is_convex_falls_and_lies_below_every_choice(curves):
    for curve in curves.values():
        hull = curve.hull()
        prices, errors = curve.prices.double(), curve.errors.double()
        slopes = (errors[hull].diff() / prices[hull].diff()).tolist()
        assert all(slope < 0 for slope in slopes)
        assert slopes == sorted(slopes)
        assert float(errors[hull[-1]]) == float(errors.min())
        for choice in range(len(prices)):
            under = [i for i in hull if prices[i] <= prices[choice]][-1]
            over = next((i for i in hull if prices[i] >= prices[choice]), under)
            share = 0.0 if over == under else float((prices[choice] - prices[under]) / (prices[over] - prices[under]))
            level = float(errors[under] * (1 - share) + errors[over] * share)
            # A few roundings of numbers up to 20.
            assert float(errors[choice]) >= level - 1e-12


# -- faults planted

threshold = global_threshold


def limits_forgotten(costs, keep, low=0.0, high=1.0):
    return threshold(costs, keep)


FAULTS = {
    "limits forgotten": (
        sys.modules[__name__],
        "global_threshold",
        limits_forgotten,
        test_counts_are_exact_and_the_best_within_the_limits,
    ),
    "hull of all choices": (
        Curve,
        "hull",
        lambda self: list(range(len(self.prices))),
        test_the_hull_is_convex_falls_and_lies_below_every_choice,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    noticed(monkeypatch, *FAULTS[fault])
