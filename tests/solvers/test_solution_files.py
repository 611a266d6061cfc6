"""Solutions as files: the problem measures them again, and refuses what is another's or was changed."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optprune.errors import InputError
from optprune.solvers import Chain, Restore, Swaps, Wanda, solve
from optprune.solvers.files import HEADER, load_solution, save_solution
from tests.helpers.sparse_cases import correlated


def test_a_solution_is_the_same_in_its_file(tmp_path: Path) -> None:
    problem = correlated(0, 8, 12, "2:4", dtype=torch.float32)
    found = solve(problem, Chain((Wanda(), Swaps(), Restore())))
    save_solution(found, problem, tmp_path / "file")
    loaded = load_solution(tmp_path / "file", problem)
    assert torch.equal(loaded.value, found.value)
    for name in ("objective", "violation", "status", "steps", "seconds", "certificate", "notes", "gap"):
        assert getattr(loaded, name) == getattr(found, name), name


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
    later = header[HEADER].replace('"format": 1', '"format": 2')
    save_file({"value": value}, file, {HEADER: later})
    with pytest.raises(InputError, match="is of the format 2, and this optprune reads the format 1"):
        load_solution(file, problem)
    save_file({"value": value}, file, {HEADER: "{}"})
    with pytest.raises(InputError, match="is not a solution that optprune saved"):
        load_solution(file, problem)
    with pytest.raises(InputError, match="is not a solution that optprune saved"):
        load_solution(tmp_path / "missing", problem)
