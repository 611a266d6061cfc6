"""Rounding of a budget: how far the counts that blocks and layers keep are from what was asked."""

from optprune.allocation import Allocation
from optprune.patterns import InGroups, InMatrix, InRows
from optprune.program.program import Program

SLACK = 0.01
"""the share of the weights to remove by which rounding may miss them without a note"""
HALF = 0.5
"""the largest such share where one weight, or one unit that is removed whole, is more than that"""
WHY = {
    InRows: (
        "every row loses a whole number of its weights: ask for a sparsity that rows of so many inputs can have, or "
        "for the pattern unstructured"
    ),
    InMatrix: "every layer loses a whole number of its weights: ask for another sparsity",
    InGroups: "a layer has the whole pattern or stays dense: ask for another sparsity",
}
"""the reason why single weights miss a budget, and what to do, by the family of their pattern"""
BY_UNITS = "units are removed whole, in multiples of some: ask for another sparsity, or for other units"


def rounded_budget(program: Program, allocation: Allocation | None) -> tuple[str, ...]:
    """Return a sentence where an allocation misses the budget by more than a hundredth and one step of the allocator.

    A step is one weight, or what goes when one unit goes, but no more than half of the budget. A budget in operations
    or time is not one of weights, and the allocation itself says what it saves. None is one that is not known yet.
    """
    decoder, given = program.decoder, program.allocation is not None
    if allocation is None or allocation.saves:
        return ()
    total = decoder.linear_weights()
    asked = (allocation.sparsity if given else program.sparsity) * total
    removed = _removed(program, allocation)
    step = 1.0 if given else program.allocator.step(decoder)
    if abs(removed - asked) <= max(SLACK * asked, min(step, HALF * asked)):
        return ()
    why = WHY.get(type(program.units.family), BY_UNITS)
    reached, wanted = (f"{100 * weights / total:.3g}%" for weights in (removed, asked))
    return (f"the budget is rounded: {reached} of the decoder's linear weights are removed, not {wanted}, as {why}",)


def _removed(program: Program, allocation: Allocation) -> int:
    """Return the number of linear weights that an allocation removes, with what each layer's pattern rounds."""
    decoder, family = program.decoder, program.units.family
    removed = decoder.linear_weights()
    for index, block in enumerate(allocation.blocks):
        removed -= decoder.weights_of(block.shape)
        for path, share in block.shares.items():
            if family is not None and share < 1:
                outputs, inputs = decoder.layer(index, path).weight.shape
                removed += outputs * inputs - family.keep(outputs, inputs, share)
    return removed
