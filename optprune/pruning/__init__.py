"""Pruning block by block: collect moments, state each layer's problem, solve it and write the answer back."""

from typing import TYPE_CHECKING

from optprune.system.names import lazy_names

if TYPE_CHECKING:
    from optprune.calibration.partial_sums import PartialSums
    from optprune.calibration.peers import joined
    from optprune.pruning.collecting import collect
    from optprune.pruning.goal import find_sparsity
    from optprune.pruning.journal import Journal
    from optprune.pruning.measured_plan import Measuring, plan
    from optprune.pruning.one_layer import layer_loss, layer_problem
    from optprune.pruning.pipeline import prune, run_program, workers_of
    from optprune.pruning.ray_workers import RayWorkers
    from optprune.pruning.run import check_states
    from optprune.pruning.saved_problems import save_problems
    from optprune.pruning.workers import Layers, Processes, Serial, Workers

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
    "find_sparsity",
    "joined",
    "layer_loss",
    "layer_problem",
    "plan",
    "prune",
    "run_program",
    "save_problems",
    "workers_of",
]

# One prune needs neither journals nor plans nor Ray.
__getattr__, __dir__ = lazy_names(
    "optprune.pruning",
    {
        "calibration.partial_sums": ("PartialSums",),
        "calibration.peers": ("joined",),
        "pruning.collecting": ("collect",),
        "pruning.goal": ("find_sparsity",),
        "pruning.journal": ("Journal",),
        "pruning.measured_plan": ("Measuring", "plan"),
        "pruning.one_layer": ("layer_loss", "layer_problem"),
        "pruning.pipeline": ("prune", "run_program", "workers_of"),
        "pruning.ray_workers": ("RayWorkers",),
        "pruning.run": ("check_states",),
        "pruning.saved_problems": ("save_problems",),
        "pruning.workers": ("Layers", "Processes", "Serial", "Workers"),
    },
    renamed={"Lanes": "PartialSums"},
)
