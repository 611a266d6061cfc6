"""Recipe fields that are not plain data, and how a file tells them: units, patterns, policies and solvers by name."""

import dataclasses
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
from optprune.system.wording import shown

SOLVERS: dict[str, type[Solver] | type[ExpertSolver]] = {
    "admm": solvers.Admm,
    "channel_swaps": solvers.ChannelSwaps,
    "conjugate_gradients": solvers.ConjugateGradients,
    "expert_elimination": solvers.ExpertElimination,
    "expert_frequency": solvers.ExpertFrequency,
    "fasp_metric": solvers.FaspMetric,
    "fista_path": solvers.FistaPath,
    "fistapruner": solvers.FistaPruner,
    "flap_metric": solvers.FlapMetric,
    "greedy_obs": solvers.GreedyObs,
    "hard_threshold": solvers.HardThreshold,
    "magnitude": solvers.Magnitude,
    "perspective_bound": solvers.PerspectiveBound,
    "random": solvers.Random,
    "reap": solvers.Reap,
    "removal_bound": solvers.RemovalBound,
    "restore": solvers.Restore,
    "spap": solvers.Spap,
    "sparsegpt": solvers.SparseGpt,
    "swaps": solvers.Swaps,
    "wanda": solvers.Wanda,
}
AUTO = "auto"
"""the propagation policy that goes by the pattern"""
NONE = "none"
"""the name of a group that is not there"""
SOLVER_DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""the solvers that an option of a solver may name"""


def _known(what: str, table: Mapping[str, Any], name: Any) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"the {what} {shown(name)} is not known: use one of {', '.join(sorted(table))}")
    return table[name]


def read_objective(value: Any) -> Any:
    """An objective from its name; anything else as it is."""
    if isinstance(value, str) and ":" in value:
        raise ValueError(
            "no code is imported for a file; give the function itself, as in load_recipe(FILE, {'objective': FUNCTION})"
        )
    return _known("objective", OBJECTIVES, value) if isinstance(value, str) else value


def write_objective(objective: Objective | None) -> str | None:
    """The name of an objective, or where it is defined: its type, where it has no name itself."""
    if objective is None:
        return None
    names = [name for name, known in OBJECTIVES.items() if known is objective]
    if names:
        return names[0]
    name = getattr(objective, "__qualname__", None)
    return f"{objective.__module__}:{name or type(objective).__qualname__}"


def read_pattern(value: Any) -> Any:
    """A pattern family from its name; one of one's own as it is."""
    if isinstance(value, PatternFamily):
        return value
    if not isinstance(value, str):
        raise ValueError("a pattern is told by its name: unstructured, rows, or N:M such as 2:4")
    try:
        return pattern_family(value)
    except InputError as error:
        raise ValueError(str(error)) from error


def read_units(value: Any) -> Units:
    """Units from their name; those of one's own as they are."""
    return value if isinstance(value, Units) else _known("kind of units", UNITS, value)


def write_units(units: Units) -> str | dict[str, str]:
    """The name of units; of single weights in a pattern, that too."""
    return units.name if units.family in (None, ANYWHERE) else {units.name: units.family.name}


def read_propagation(value: Any) -> Any:
    """A propagation policy from its name, None from "auto"; anything else as it is."""
    return _known("propagation policy", POLICIES | {AUTO: None}, value) if isinstance(value, str) else value


def write_propagation(policy: Propagation | None) -> str:
    """The name of a propagation policy."""
    return AUTO if policy is None else policy.name


def read_dampings(value: Any) -> Any:
    """A single damping as one of several."""
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


def read_solver(value: Any) -> Any:
    """A solver from its name, {name: options}, or a list of those (a chain)."""
    if isinstance(value, str):
        return _known("solver", SOLVERS, value)()
    if isinstance(value, list):
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
                raise ValueError(f"the solver {name} has no option {shown(option)}: it has {sorted(fields) or 'none'}")
        return cls(
            **{option: _read_option(name, option, fields[option], text) for option, text in (options or {}).items()}
        )
    return value


def _read_option(solver: str, option: str, kind: Any, value: Any) -> Any:
    """An option's value in the type that the solver declares."""
    if kind is torch.dtype and isinstance(value, str):
        value = _known("dtype", SOLVER_DTYPES, value.removeprefix("torch."))
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"the option {option} of {solver} is {shown(value)}: {error.errors()[0]['msg']}") from error


def write_solver(solver: Solver | ExpertSolver | None) -> Any:
    """What `read_solver` reads: only options that are not the default are told."""
    if solver is None:
        return None
    if isinstance(solver, Chain):
        return [write_solver(stage) for stage in solver.stages]
    names = [name for name, cls in SOLVERS.items() if cls is type(solver)]
    name = names[0] if names else type(solver).__name__
    changed = {
        field.name: getattr(solver, field.name)
        for field in dataclasses.fields(solver)  # type: ignore[arg-type]  # solvers are dataclasses by contract
        if getattr(solver, field.name) != field.default
    }
    return {name: {option: _write_option(value) for option, value in changed.items()}} if changed else name


def _write_option(value: Any) -> int | float | str:
    return value if isinstance(value, int | float | str) else str(value).removeprefix("torch.")
