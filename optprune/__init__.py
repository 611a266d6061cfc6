"""optprune: weight pruning of language models as optimisation.

A layer's pruning is a problem object that can be printed, measured, hashed and solved; a solver is anything that
returns a better feasible weight; a model is where problems come from and answers go back to.

Conventions, obeyed everywhere:

- weights are [out, in]; averages are over tokens; x* is the input a layer will really get, x its dense input
- a mask is True where a weight is kept; problems count what they keep, only recipes speak of sparsity
- sparsity is counted over the linear weights of the decoder blocks, without biases, embeddings and norms
- the loss is half the mean squared output error per token plus the damping term; the relative error
  E|V x* - W x|^2 / E|W x|^2 is reported without damping
- products are accumulated in float32 or better with TF32 off; objectives are measured in float64
"""

from typing import TYPE_CHECKING, Any

from optprune.system.version import VERSION

if TYPE_CHECKING:
    from optprune.allocation import Allocation
    from optprune.calibration import Statistics
    from optprune.cli import prune_model
    from optprune.comparison import Comparison, compare
    from optprune.export import save_model, save_pruned
    from optprune.healing import HealingSettings, HealReport, KeepZeros, Masks, heal, keep_zeros, masks
    from optprune.measure import perplexity
    from optprune.models import load_model, open_model
    from optprune.objectives import LayerContext
    from optprune.problems import load_problem, save_problem, to_cvxpy
    from optprune.pruning import collect, find_sparsity, layer_loss, layer_problem, prune
    from optprune.recipe import Recipe, load_recipe
    from optprune.report import Audit, audit
    from optprune.solvers import choose, load_solution, save_solution, solve
    from optprune.texts import begin_tokens, calibration_batches, evaluation_windows, read_documents, tokenise

_HOMES = {
    "Allocation": "optprune.allocation",
    "Audit": "optprune.report",
    "Comparison": "optprune.comparison",
    "HealReport": "optprune.healing",
    "HealingSettings": "optprune.healing",
    "KeepZeros": "optprune.healing",
    "LayerContext": "optprune.objectives",
    "Masks": "optprune.healing",
    "Recipe": "optprune.recipe",
    "Statistics": "optprune.calibration",
    "audit": "optprune.report",
    "begin_tokens": "optprune.texts",
    "calibration_batches": "optprune.texts",
    "choose": "optprune.solvers",
    "collect": "optprune.pruning",
    "compare": "optprune.comparison",
    "evaluation_windows": "optprune.texts",
    "find_sparsity": "optprune.pruning",
    "heal": "optprune.healing",
    "keep_zeros": "optprune.healing",
    "layer_loss": "optprune.pruning",
    "layer_problem": "optprune.pruning",
    "load_model": "optprune.models",
    "load_problem": "optprune.problems",
    "load_recipe": "optprune.recipe",
    "load_solution": "optprune.solvers",
    "masks": "optprune.healing",
    "open_model": "optprune.models",
    "perplexity": "optprune.measure",
    "prune": "optprune.pruning",
    "prune_model": "optprune.cli",
    "read_documents": "optprune.texts",
    "save_model": "optprune.export",
    "save_problem": "optprune.problems",
    "save_pruned": "optprune.export",
    "save_solution": "optprune.solvers",
    "solve": "optprune.solvers",
    "to_cvxpy": "optprune.problems",
    "tokenise": "optprune.texts",
}

__all__ = [
    "Allocation",
    "Audit",
    "Comparison",
    "HealReport",
    "HealingSettings",
    "KeepZeros",
    "LayerContext",
    "Masks",
    "Recipe",
    "Statistics",
    "audit",
    "begin_tokens",
    "calibration_batches",
    "choose",
    "collect",
    "compare",
    "evaluation_windows",
    "find_sparsity",
    "heal",
    "keep_zeros",
    "layer_loss",
    "layer_problem",
    "load_model",
    "load_problem",
    "load_recipe",
    "load_solution",
    "masks",
    "open_model",
    "perplexity",
    "prune",
    "prune_model",
    "read_documents",
    "save_model",
    "save_problem",
    "save_pruned",
    "save_solution",
    "solve",
    "to_cvxpy",
    "tokenise",
]


def _load(folder: str, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """Return the transformers model alone."""
    from optprune.models import load_model

    return load_model(folder, dtype=dtype, device=device).model


_DEPRECATED = {"load": ("optprune.load(X) is optprune.load_model(X).model now", _load)}
"""names of the version before, each with the sentence that names the new one"""
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """Import on first use, so that `optprune --help` and the solvers do not wait for transformers."""
    if name in _DEPRECATED:
        import warnings

        sentence, function = _DEPRECATED[name]
        warnings.warn(f"{sentence}; the old name goes with the next version", DeprecationWarning, stacklevel=2)
        return globals().setdefault(name, function)  # a second use of the name does not come here
    if name not in _HOMES:
        raise AttributeError(f"module 'optprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return all names, also those that are not imported yet."""
    return sorted({*globals(), *__all__, "__version__"})
