"""Solutions as files: the problem measures them again, and refuses what is another's or was changed."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optprune.errors import InputError
from optprune.patterns import RowWise
from optprune.problems import SparseLeastSquares, save_problem
from optprune.solvers import Certificate, Chain, Restore, Swaps, Wanda, solve
from optprune.solvers.files import SOLUTION, load_solution, save_solution, solution_bytes
from tests.helpers.sparse_cases import correlated


def test_a_solution_is_the_same_in_its_file(tmp_path: Path) -> None:
    sparse = correlated(0, 8, 12, "2:4", dtype=torch.float32)
    problem = sparse.restrict(sparse.support(solve(sparse, Chain((Wanda(), Swaps()))).value))
    found = solve(problem, Restore())
    save_solution(found, problem, tmp_path / "file")
    loaded = load_solution(tmp_path / "file", problem)
    assert torch.equal(loaded.value, found.value)
    for name in ("objective", "violation", "status", "steps", "seconds", "notes"):
        assert getattr(loaded, name) == getattr(found, name), name
    assert found.certificate is not None
    assert loaded.certificate == replace(found.certificate, stated_by_file=True)
    save_solution(loaded, problem, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_bound_in_a_file_is_stated_and_not_proved(tmp_path: Path) -> None:
    problem, file = correlated(0, 8, 12, "2:4"), tmp_path / "file"
    found = solve(problem, Wanda())
    assert found.certificate is None
    save_solution(found, problem, file)
    changed(file, certificate=[found.objective, "by the word of a stranger"])
    loaded = load_solution(file, problem)
    assert loaded.gap is None, "the gap to a bound that nobody has checked is none"
    assert "stated_by_file=True" in repr(loaded)

    @dataclass(frozen=True)
    class Believer(Wanda):
        """Passes on what a file states."""

        def prove(self, problem: Any, value: Any) -> Certificate | None:
            return loaded.certificate

    assert solve(problem, Believer()).certificate is None


def test_what_is_no_solution_of_the_problem_is_a_sentence(tmp_path: Path) -> None:
    problem, file = correlated(0, 8, 12, "2:4"), tmp_path / "file"
    save_solution(solve(problem, Wanda()), problem, file)
    with pytest.raises(InputError, match="is the solution of another problem"):
        load_solution(file, correlated(2, 8, 12, "2:4"))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    value = load_file(file)["value"]
    for spoiled, sentence in [
        (value * 1.01, "its objective is"),
        (value.float(), "its weight is"),
        (value[:1], "its weight is"),
    ]:
        save_file({"value": spoiled.contiguous()}, file, header)
        with pytest.raises(InputError, match=sentence):
            load_solution(file, problem)
    later = header[SOLUTION].replace('"format": 1', '"format": 2')
    save_file({"value": value}, file, {SOLUTION: later})
    with pytest.raises(InputError, match="is of the format 2, and this optprune reads the format 1"):
        load_solution(file, problem)
    save_file({"value": value}, file, {SOLUTION: "{}"})
    with pytest.raises(InputError, match="is not a solution that optprune saved"):
        load_solution(file, problem)
    with pytest.raises(InputError, match="is not a solution that optprune saved"):
        load_solution(tmp_path / "missing", problem)


def changed(file: Path, **entries: object) -> None:
    """Change entries of the header of a solution's file."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()[SOLUTION])
    save_file(load_file(file), file, {SOLUTION: json.dumps(header | entries)})


def test_a_file_that_states_another_violation_or_a_false_bound_is_refused(tmp_path: Path) -> None:
    problem, file = correlated(0, 8, 12, "2:4"), tmp_path / "file"
    found = solve(problem, Wanda())
    for entries, sentence in [
        ({"violation": 3.0}, "its violation is 0 and not 3"),
        ({"violation": float("nan")}, "its violation is 0 and not nan"),
        ({"certificate": [1e9, "none"]}, "its lower bound is above its objective"),
        ({"certificate": [float("nan"), "none"]}, "its lower bound is above its objective"),
    ]:
        save_solution(found, problem, file)
        changed(file, **entries)
        with pytest.raises(InputError, match=sentence):
            load_solution(file, problem)
        file.unlink()
    dense = replace(found, value=problem.loss.weight, objective=problem.objective(problem.loss.weight), violation=0.0)
    file.write_bytes(solution_bytes(dense, problem))
    with pytest.raises(InputError, match=r"its violation is \d+ and not 0"):
        load_solution(file, problem)


def test_a_solution_of_another_problem_is_not_saved(tmp_path: Path) -> None:
    problem, file = correlated(0, 8, 12, "2:4"), tmp_path / "file"
    dense = solve(SparseLeastSquares(problem.loss, RowWise(12)), Restore())
    with pytest.raises(InputError, match="give the problem that it solves"):
        save_solution(dense, problem, file)
    with pytest.raises(InputError, match="the weight of the solution"):
        save_solution(solve(correlated(0, 4, 12, "2:4"), Wanda()), problem, file)
    other = solve(correlated(2, 8, 12, "2:4"), Wanda())
    assert other.violation == 0 and problem.violation(other.value) == 0
    with pytest.raises(InputError, match=r"has an objective of .*: give the problem that it solves"):
        save_solution(other, problem, file)
    half = solve(correlated(0, 8, 12, "2:4", dtype=torch.float32), Wanda())
    with pytest.raises(InputError, match=r"is torch\.float32, but the rest is torch\.float64"):
        save_solution(half, problem, file)
    not_finite = replace(other, value=other.value * torch.nan, objective=torch.nan, violation=torch.nan)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        save_solution(not_finite, problem, file)
    swapped: Any = (problem, dense)
    with pytest.raises(InputError, match="give what solve returns, then its problem, then the path"):
        save_solution(*swapped, file)
    assert not file.exists()


@pytest.mark.parametrize("what", ["problem", "solution"])
def test_a_file_of_others_is_not_replaced(what: str, tmp_path: Path) -> None:
    problem, file = correlated(0, 8, 12, "2:4"), tmp_path / "file"
    found = solve(problem, Wanda())

    def save(file: Path) -> None:
        save_problem(problem, file) if what == "problem" else save_solution(found, problem, file)

    file.write_text("mine")
    with pytest.raises(InputError, match="exists, and optprune did not write it: choose another name"):
        save(file)
    assert file.read_text() == "mine"
    file.unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file, so it is not replaced"):
        save(tmp_path / "pipe")
    for _ in ("new", "again"):
        save(file)
    with pytest.raises(InputError, match="there is no folder"):
        save(tmp_path / "missing" / "file")
