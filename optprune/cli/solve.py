"""optprune solve: solve a saved problem by a solver of optprune or of one's own."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optprune.cli.options import JsonFile
from optprune.cli.outputs import check_distinct, check_file, check_json, echo, start, write_file, write_json
from optprune.errors import InputError, NumericalError
from optprune.system.files import read_yaml
from optprune.system.own_code import own_code
from optprune.system.wording import one_line, shown

if TYPE_CHECKING:
    from optprune.problems import Problem
    from optprune.solvers import Solution, Solver


def solve_command(
    problem: Annotated[Path, typer.Argument(metavar="FILE", help="A file that optprune.save_problem wrote.")],
    solver: Annotated[
        str,
        typer.Option(
            "--solver",
            help="A solver's name, {name: {option: value}}, a list of those, or module:Class of your own; auto lets "
            "the problem choose.",
        ),
    ] = "auto",
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", help="Stop after this time.")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Stop after this many steps.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the solution to a file.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Solve a problem in a file, and print the objective, the bound, the gap and the time.

    The problem measures the answer, and not the solver. The exit status is 1 where the answer is not feasible.
    An answer with NaN or infinity is an error, and is not written.
    """
    start()
    from optprune.problems import Problem
    from optprune.problems.files import load_problem, origin_of
    from optprune.solvers import Status, solve
    from optprune.solvers.files import solution_bytes
    from optprune.solvers.run import MOST_STEPS

    if max_seconds is not None and not max_seconds > 0:
        raise InputError(f"--max-seconds cannot be {max_seconds:g}: give more than 0")
    if max_steps is not None and max_steps < 0:
        raise InputError(f"--max-steps cannot be {max_steps}: give 0 or more")
    chosen = _solver(solver)
    check_json(json_file, inputs=[problem])
    check_file(output, "solution", inputs=[problem])
    check_distinct(json_file, output)
    loaded, origin = load_problem(problem), origin_of(problem)
    if not isinstance(loaded, Problem):
        raise InputError(f"{problem} holds a {type(loaded).__name__}, which no solver of layers solves")
    found = solve(
        loaded,
        chosen,
        max_steps=MOST_STEPS if max_steps is None else max_steps,
        max_seconds=math.inf if max_seconds is None else max_seconds,
    )
    if found.status is Status.NONFINITE:
        raise NumericalError(f"{Status.NONFINITE.value}; nothing is written")
    if output is not None:
        write_file(output, solution_bytes(found, loaded), "solution", "nothing else is written")
    result = _result(loaded, found, origin)
    write_json(
        json_file,
        json.dumps(result, indent=2) + "\n",
        "nothing else is written" if output is None else f"the solution is in {output}",
    )
    for line in _lines(result):
        echo(line)
    if found.violation > 0:
        raise typer.Exit(1)


def _solver(text: str) -> "Solver | None":
    """Return the solver of a text; None for auto. InputError where there is none."""
    from optprune.recipe.names import read_solver
    from optprune.solvers import Solver

    if text == "auto":
        return None
    module, colon, name = text.partition(":")
    if colon and module.replace(".", "").isidentifier() and name.isidentifier():
        return _own_solver(module, name)
    try:
        found = read_solver(read_yaml(text, "the value of --solver"))
    except ValueError as error:
        raise InputError(f"--solver: {error}") from error
    if not isinstance(found, Solver):
        raise InputError(f"--solver {shown(text)} is no solver of layers: give its name")
    return found


def _own_solver(module: str, name: str) -> "Solver":
    """Return an instance of the class of a module, which may be in the working folder."""
    from optprune.solvers import Solver

    sys.path.insert(0, str(Path.cwd()))
    try:
        with own_code():
            cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(f"--solver {module}:{name} cannot be imported: {one_line(str(error))}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not (isinstance(cls, type) and issubclass(cls, Solver)):
        raise InputError(f"--solver {module}:{name} is not a class derived from optprune.solvers.Solver")
    try:
        with own_code():
            return cls()
    except TypeError as error:
        raise InputError(f"--solver {module}:{name} cannot be made without options: {one_line(error)}") from error


def _result(problem: "Problem", found: "Solution", origin: dict[str, Any]) -> dict[str, Any]:
    proof = found.certificate
    return {
        "problem": problem.kind,
        "shape": list(problem.loss.weight.shape),
        "fingerprint": problem.fingerprint(),
        "origin": origin,
        "objective": found.objective,
        "violation": found.violation,
        "lower_bound": None if proof is None else proof.lower_bound,
        "proof": None if proof is None else proof.proof,
        "gap": found.gap,
        "status": found.status.name.lower(),
        "steps": found.steps,
        "seconds": found.seconds,
        "notes": list(found.notes),
    }


def _lines(result: dict[str, Any]) -> list[str]:
    rows, width = result["shape"]
    place = ", ".join(f"{name} {value}" for name, value in result["origin"].items())
    lines = [f"{result['problem']} of {rows} x {width}" + (f" ({place})" if place else "")]
    lines.append(
        f"objective {result['objective']:.8g}, violation {result['violation']:g}, {result['status']} after "
        f"{result['steps']} steps in {result['seconds']:.2f} s"
    )
    if result["lower_bound"] is None:
        lines.append("nothing is proved")
    else:
        gap = "" if result["gap"] is None else f", gap {result['gap']:.3g}"
        lines.append(f"lower bound {result['lower_bound']:.8g}{gap} ({result['proof']})")
    return [*lines, *(f"note: {note}" for note in result["notes"])]
