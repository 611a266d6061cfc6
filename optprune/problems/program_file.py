"""cvxpy programs, whose own types are partly unknown, as files of the standard formats, for any other solver."""

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from optprune.errors import InputError
from optprune.problems.quadratic import Array
from optprune.system.files import real_path, write_whole
from optprune.system.wording import either, install, shown

FORMATS = (".lp", ".mps", ".cip")
"""the endings of files that SCIP writes with quadratic constraints"""
MISSING = f"writing a program to a file needs SCIP: {install('testing')}"


def write_program(program: Any, path: str | Path) -> None:
    """Write a program to a file in the format of its ending, as a whole or not at all, by the writer of SCIP.

    Its variables are x_0, x_1, ..., in the order that `set_variables` takes, followed by those of quadratic cones.
    InputError for another ending, or where pyscipopt is not installed.
    """
    file = real_path(Path(path))
    if file.suffix not in FORMATS:
        raise InputError(f"the file {shown(str(path))} must end in {either(FORMATS)}")
    try:
        model = import_module("pyscipopt").Model()
    except ImportError as error:
        raise InputError(MISSING) from error
    model.hideOutput()
    _state(model, *_conic(program))
    with TemporaryDirectory() as place:
        draft = Path(place) / f"program{file.suffix}"
        model.writeProblem(str(draft), verbose=False)
        data = draft.read_bytes()
    write_whole(file, lambda stream: stream.write(data))


def set_variables(program: Any, values: Array) -> None:
    """Set the variables of a program to the values of x_0, x_1, ... of its file. InputError where there are too few."""
    data, chain, inverse = program.get_problem_data("SCIP")
    count = len(data["c"])
    found = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(found) < count or not np.isfinite(found[:count]).all():
        raise InputError(f"the file has {count} variables x_0, x_1, ..., and a finite value of each is needed")
    answer = {"status": "optimal", "value": 0.0, "primal": found[:count], "solve_time": 0.0, "num_iters": 0}
    program.unpack_results(answer, chain, inverse)


def _conic(program: Any) -> tuple[dict[str, Any], float]:
    """Return a program as min c x with b - A x in a product of cones, and the constant of its objective."""
    data, _, inverse = program.get_problem_data("SCIP")
    return data, float(inverse[-1]["offset"])


def _state(model: Any, data: dict[str, Any], offset: float) -> None:
    """Add a program of linear rows and quadratic cones to a model of SCIP."""
    rows, right, dims, binary = data["A"].tocsr(), data["b"], data["dims"], data["bool_vars_idx"]
    low, high = data["lower_bounds"], data["upper_bounds"]
    variables = [
        model.addVar(f"x_{place}", "B", obj=cost)
        if place in binary
        else model.addVar(
            f"x_{place}",
            lb=None if low is None or np.isinf(low[place]) else low[place],
            ub=None if high is None or np.isinf(high[place]) else high[place],
            obj=cost,
        )
        for place, cost in enumerate(data["c"])
    ]
    model.addObjoffset(offset)
    total = import_module("pyscipopt").quicksum

    def row(place: int) -> Any:
        part = slice(rows.indptr[place], rows.indptr[place + 1])
        return total(
            value * variables[column]
            for column, value in zip(rows.indices[part].tolist(), rows.data[part].tolist(), strict=True)
        )

    for place in range(dims.zero):
        model.addCons(row(place) == float(right[place]))
    for place in range(dims.zero, dims.zero + dims.nonneg):
        model.addCons(row(place) <= float(right[place]))
    first = dims.zero + dims.nonneg
    for number, size in enumerate(dims.soc):
        # |s_1, s_2, ...| <= s_0
        cone = [model.addVar(f"s_{number}_{each}", lb=None if each else 0.0) for each in range(size)]
        for place, entry in enumerate(cone, start=first):
            model.addCons(row(place) + entry == float(right[place]))
        model.addCons(total(entry * entry for entry in cone[1:]) <= cone[0] * cone[0])
        first += size
