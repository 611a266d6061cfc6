"""Readers and writers of the recipe fields that a file names: objectives, units, patterns, policies and solvers."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from optprune import solvers
from optprune.calibration import POLICIES, Propagation
from optprune.errors import InputError
from optprune.models import UNITS, Units
from optprune.objectives import OBJECTIVES, Objective
from optprune.patterns import ANYWHERE, PatternFamily, pattern_family
from optprune.solvers import Chain, ExpertSolver, Solver
from optprune.system.wording import shown, suggestion

SOLVERS: dict[str, type[Solver] | type[ExpertSolver]] = {
    "admm": solvers.Admm,
    "channel_swaps": solvers.ChannelSwaps,
    "conjugate_gradients": solvers.ConjugateGradients,
    "expert_elimination": solvers.ExpertElimination,
    "expert_frequency": solvers.ExpertFrequency,
    "fasp_metric": solvers.FaspMetric,
    "fista": solvers.Fista,
    "fista_path": solvers.FistaPath,
    "fistapruner": solvers.FistaPruner,
    "flap_metric": solvers.FlapMetric,
    "given_scores": solvers.GivenScores,
    "gptq": solvers.Gptq,
    "greedy_obs": solvers.GreedyObs,
    "grid_descent": solvers.GridDescent,
    "hard_threshold": solvers.HardThreshold,
    "magnitude": solvers.Magnitude,
    "perspective_bound": solvers.PerspectiveBound,
    "proximal_admm": solvers.ProximalAdmm,
    "random": solvers.Random,
    "reap": solvers.Reap,
    "refitted_swaps": solvers.RefittedSwaps,
    "removal_bound": solvers.RemovalBound,
    "restore": solvers.Restore,
    "round_to_nearest": solvers.RoundToNearest,
    "spap": solvers.Spap,
    "sparsegpt": solvers.SparseGpt,
    "swaps": solvers.Swaps,
    "wanda": solvers.Wanda,
}
NONE = "none"
"""the name for a group that is off"""
SOLVER_DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""the dtypes that an option of a solver may name"""


def _known(what: str, table: Mapping[str, Any], name: Any) -> Any:
    """Return the entry of a table by its name; ValueError, with the nearest name, where there is none."""
    if not isinstance(name, str) or name not in table:
        nearest = suggestion(name, table)
        raise ValueError(f"the {what} {shown(name)} is not known{nearest}: use one of {', '.join(sorted(table))}")
    return table[name]


def sentence(error: ValidationError) -> str:
    """Return the reason why pydantic refuses the first field, with the nearest of the values that are allowed."""
    first = error.errors()[0]
    allowed = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))
    return first["msg"].removeprefix("Value error, ") + suggestion(first["input"], allowed)


def read_objective(value: Any) -> Any:
    """Return the objective of a name; anything else is returned as it is."""
    if isinstance(value, str) and ":" in value:
        raise ValueError(
            "a file can only name the objectives of optprune; pass your own function in Python, as in "
            "load_recipe(FILE, {'objective': FUNCTION})"
        )
    return _known("objective", OBJECTIVES, value) if isinstance(value, str) else value


def write_objective(objective: Objective | None) -> str | None:
    """Return the name of an objective, or the place where it, or else its type, is defined."""
    if objective is None:
        return None
    names = [name for name, known in OBJECTIVES.items() if known is objective]
    if names:
        return names[0]
    name = getattr(objective, "__qualname__", None)
    return f"{objective.__module__}:{name or type(objective).__qualname__}"


def read_pattern(value: Any) -> Any:
    """Return the pattern family of a name; a PatternFamily is returned as it is."""
    if isinstance(value, PatternFamily):
        return value
    if not isinstance(value, str):
        raise ValueError("a pattern is given by its name: unstructured, rows, or N:M such as 2:4")
    try:
        return pattern_family(value)
    except InputError as error:
        raise ValueError(str(error)) from error


def read_units(value: Any) -> Units:
    """Return the units of a name; Units are returned as they are."""
    return value if isinstance(value, Units) else _known("unit kind", UNITS, value)


def write_units(units: Units) -> str | dict[str, str]:
    """Return the name of units, with the pattern where single weights have one."""
    return units.name if units.family in (None, ANYWHERE) else {units.name: units.family.name}


def read_propagation(value: Any) -> Any:
    """Return the policy of a name; anything else is returned as it is."""
    return _known("propagation policy", POLICIES, value) if isinstance(value, str) else value


def write_propagation(policy: Propagation) -> str:
    """Return the name of a propagation policy."""
    return policy.name


def read_dampings(value: Any) -> Any:
    """Return a single damping as a tuple of one."""
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


def read_solver(value: Any) -> Any:
    """Return the solver of a name, of {name: options}, or of a list of those (a chain)."""
    if isinstance(value, str):
        return _known("solver", SOLVERS, value)()
    if isinstance(value, list):
        if not value:
            raise ValueError("a chain needs at least one solver: give a name, or leave the solver out")
        stages = tuple(read_solver(item) for item in value)
        for stage in stages:
            if not isinstance(stage, Solver):
                raise ValueError(f"a chain holds solvers, not {shown(stage)}")
        return Chain(stages)
    if isinstance(value, dict):
        if len(value) != 1:
            raise ValueError(f"a solver with options is written {{name: {{option: value}}}}, not {shown(value)}")
        [(name, options)] = value.items()
        cls = _known("solver", SOLVERS, name)
        if not isinstance(options, dict | None):
            raise ValueError(f"the options of {name} are written {{option: value}}, not {shown(options)}")
        types = get_type_hints(cls)
        fields = {field.name: types[field.name] for field in dataclasses.fields(cls)}
        for option in options or {}:
            if option not in fields:
                nearest, known = suggestion(option, fields), ", ".join(sorted(fields)) or "none"
                raise ValueError(f"the solver {name} has no option {shown(option)}{nearest}: it has {known}")
        return cls(
            **{option: _read_option(name, option, fields[option], text) for option, text in (options or {}).items()}
        )
    return value


def _read_option(solver: str, option: str, kind: Any, value: Any) -> Any:
    """Return the value of an option in the type that the solver declares."""
    if kind is torch.dtype and isinstance(value, str):
        value = _known("dtype", SOLVER_DTYPES, value.removeprefix("torch."))
    if solver == "given_scores" and option == "scores" and isinstance(value, str):
        return solvers.GivenScores.read(value).scores
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"the option {option} of {solver} is {shown(value)}: {sentence(error)}") from error


def write_solver(solver: Solver | ExpertSolver | None) -> Any:
    """Return a solver as `read_solver` reads it, with the options that differ from their defaults."""
    if solver is None:
        return None
    if isinstance(solver, Chain):
        return [write_solver(stage) for stage in solver.stages]
    names = [name for name, cls in SOLVERS.items() if cls is type(solver)]
    name = names[0] if names else type(solver).__name__
    changed = {
        field.name: getattr(solver, field.name)
        # A solver without options need not be a dataclass.
        for field in (dataclasses.fields(solver) if dataclasses.is_dataclass(solver) else ())
        if getattr(solver, field.name) != field.default
    }
    return {name: {option: _write_option(value) for option, value in changed.items()}} if changed else name


def _write_option(value: Any) -> int | float | str | dict[str, list[float]]:
    if isinstance(value, Mapping):
        return {str(key): list(numbers) for key, numbers in value.items()}
    return value if isinstance(value, int | float | str) else str(value).removeprefix("torch.")
