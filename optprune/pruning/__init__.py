"""Pruning: block by block, collect moments, state each layer's problem, solve it, write the answer back."""

from optprune.pruning.journal import Journal
from optprune.pruning.one_layer import layer_loss, layer_problem
from optprune.pruning.pipeline import prune

__all__ = ["Journal", "layer_loss", "layer_problem", "prune"]
