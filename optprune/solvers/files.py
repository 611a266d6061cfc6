"""Solutions as files, measured again by their problem when they are read."""

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from optprune.errors import InputError, check_kind
from optprune.numerics.tensors import all_finite, check_floats, check_tensor, write_tensors
from optprune.problems import Problem
from optprune.problems.files import SOLUTION
from optprune.solvers.base import Certificate, Solution, Status
from optprune.system.files import GENERATOR, MARK, own_place, read_json, write_whole
from optprune.system.wording import shown

FORMAT = 1
"""the version of the format"""
ROUNDING = 1e-6
"""the largest relative difference between a stated and a measured violation, a sum of float32 numbers"""
VALUE = "value"
"""the name of the weight in a file"""


def save_solution(solution: Solution, problem: Problem, path: str | Path) -> None:
    """Write a solution of a problem to a safetensors file, as a whole or not at all; its history is left out.

    InputError where there is a file that optprune did not write, and where the solution is one of another problem.
    """
    remedy = "give what solve returns, then its problem, then the path"
    check_kind("the solution", solution, Solution, remedy)
    check_kind("the problem", problem, Problem, remedy)
    weight, what = problem.loss.weight, "the weight of the solution"
    check_tensor(what, solution.value, weight.shape)
    value = solution.value.to(weight.device)
    check_floats(what, value, weight.shape, weight)
    if not all_finite(value):
        raise InputError(f"{what} holds NaN or infinity: it is no answer, so solve the problem again")
    measured, error = problem.measure(value), problem.measuring_error(value)
    for name, own, here, close in (
        ("a violation", solution.violation, measured.violation, {"rel_tol": ROUNDING}),
        ("an objective", solution.objective, measured.objective, {"rel_tol": 0.0, "abs_tol": 2 * error}),
    ):
        if not math.isclose(own, here, **close):
            raise InputError(
                f"the solution has {name} of {own:.6g}, and this problem measures {here:.6g}: give the problem that it "
                "solves"
            )
    data = solution_bytes(solution, problem)
    write_whole(own_place(path), lambda stream: stream.write(data))


def solution_bytes(solution: Solution, problem: Problem) -> bytes:
    """Return the bytes of the file of a solution."""
    proof = solution.certificate
    header = {
        "format": FORMAT,
        "problem": problem.fingerprint(),
        "objective": solution.objective,
        "violation": solution.violation,
        "status": solution.status.name,
        "steps": solution.steps,
        "seconds": solution.seconds,
        "certificate": None if proof is None else [proof.lower_bound, proof.proof],
        "notes": list(solution.notes),
    }
    stream = BytesIO()
    # The same solution has the same bytes, which safetensors' own writer does not promise for two entries of metadata.
    write_tensors(stream, {VALUE: solution.value}, metadata={SOLUTION: json.dumps(header), GENERATOR: MARK})
    return stream.getvalue()


def load_solution(path: str | Path, problem: Problem) -> Solution:
    """Return the solution of a problem in a file, with the objective and the violation that the problem measures now.

    The status and the certificate are those that the file states: the certificate says so, and there is no gap to it.
    To prove a bound, solve the problem again.
    InputError where the file is no solution, is one of another problem, differs from these measurements by more than
    rounding, or states a lower bound above the objective.
    """
    try:
        opened: Any = safe_open(path, "pt", device="cpu")
        with opened as file:
            metadata: dict[str, str] = file.metadata() or {}
            header: Any = read_json(metadata[SOLUTION], f"the header of {path}")
            value: Tensor = file.get_tensor(VALUE).to(problem.loss.weight.device)
        status, proof = Status[header["status"]], header["certificate"]
        certificate = None if proof is None else Certificate(float(proof[0]), str(proof[1]), stated_by_file=True)
        stated, outside = float(header["objective"]), float(header["violation"])
        steps, seconds = int(header["steps"]), float(header["seconds"])
        version = header["format"]
        same, notes = header["problem"] == problem.fingerprint(), tuple(map(str, header["notes"]))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not a solution that optprune saved, or is damaged: solve the problem again"
        ) from error
    if version != FORMAT:
        raise InputError(f"{path} is of the format {shown(version)}, and this optprune reads the format {FORMAT}")
    if not same:
        raise InputError(f"{path} is the solution of another problem: load the one that it was saved with")
    if value.shape != problem.loss.weight.shape or value.dtype != problem.loss.weight.dtype:
        raise InputError(f"{path} is damaged: its weight is {list(value.shape)} in {value.dtype}; solve it again")
    objective = problem.objective(value)
    error = problem.measuring_error(value)
    if not math.isclose(objective, stated, rel_tol=0.0, abs_tol=2 * error):
        raise InputError(f"{path} is damaged: its objective is {objective:.6g} and not {stated:.6g}; solve it again")
    violation = problem.violation(value)
    if not math.isclose(violation, outside, rel_tol=ROUNDING):
        raise InputError(f"{path} is damaged: its violation is {violation:.6g} and not {outside:.6g}; solve it again")
    # Written so that NaN fails.
    if certificate is not None and violation == 0 and not certificate.lower_bound <= objective + 2 * error:
        raise InputError(f"{path} is damaged: its lower bound is above its objective; solve it again")
    return Solution(value, objective, violation, status, steps, seconds, certificate, notes=notes)
