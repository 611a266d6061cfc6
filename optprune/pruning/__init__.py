"""Pruning: block by block, collect moments, state each layer's problem, solve it, write the answer back."""

from optprune.pruning.pipeline import prune

__all__ = ["prune"]
