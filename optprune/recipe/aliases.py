"""Aliases: the flat names that recipes had for what is in groups now, and what those are without their group."""

ALIASES = {
    "pattern": "units.weights",
    "width_multiple": "allocation.multiple",
    "budget": "allocation.currency",
    "budget_tokens": "allocation.tokens",
    "probe_tokens": "allocation.probe_tokens",
    "least_kept": "allocation.least",
    "most_kept": "allocation.most",
    "depth_parts": "allocation.parts",
    "depth_score": "allocation.score",
    "depth_tokens": "allocation.score_tokens",
    "output_metric": "metric.kind",
    "metric_tokens": "metric.tokens",
    "metric_width": "metric.width",
    "metric_damping": "metric.damping",
    "held_out": "refit.held_out",
    "refit_damping": "refit.dampings",
    "recovery": "refit.recovery",
    "recovery_steps": "refit.recovery.steps",
    "recovery_tokens": "refit.recovery.tokens",
    "recovery_damping": "refit.recovery.damping",
    "matching": "refit.matching",
    "matching_solver": "refit.matching.solver",
    "matching_rate": "refit.matching.rate",
    "matching_sequences": "refit.matching.sequences",
    "matching_pull": "refit.matching.pull",
    "matching_tokens": "refit.matching.tokens",
}
"""fields by the flat names that they had: either may be set; by a flat one, what its group has no use for does nothing,
as it always did"""
NEEDS = {
    "allocation.multiple": "a width multiple of {} does nothing here: only units that uniform or global shares narrow "
    "have one, not single weights, experts, whole sub-blocks or blocks that are given: leave it out",
    "allocation.currency": "a budget in {} is divided over widths: set allocation to global, and units to mlp, vo, "
    "kv-groups or all",
    "refit.dampings": "refit_damping is chosen on held-out tokens: set held_out, such as 0.125",
    "refit.recovery.rounds": "recovery needs held-out tokens to decide where to stop: set held_out, such as 0.125",
    "refit.matching.epochs": "matching needs held-out tokens to decide where to stop: set held_out, such as 0.125",
}
"""fields that ask for what only their group gives, however they are spelled, with what to say where it is not there"""
