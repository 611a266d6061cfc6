"""Pruning: block by block, collect moments, state each layer's problem, solve it, write the answer back."""

from optprune.calibration.partial_sums import PartialSums
from optprune.calibration.peers import joined
from optprune.pruning.collecting import collect
from optprune.pruning.journal import Journal
from optprune.pruning.measured_plan import Measuring, plan
from optprune.pruning.one_layer import layer_loss, layer_problem
from optprune.pruning.pipeline import prune, run_program
from optprune.pruning.ray_workers import RayWorkers
from optprune.pruning.run import check_states
from optprune.pruning.workers import Layers, Processes, Serial, Workers, workers_of

__all__ = [
    "Journal",
    "Layers",
    "Measuring",
    "PartialSums",
    "Processes",
    "RayWorkers",
    "Serial",
    "Workers",
    "check_states",
    "collect",
    "joined",
    "layer_loss",
    "layer_problem",
    "plan",
    "prune",
    "run_program",
    "workers_of",
]
