"""optprune solve: a saved problem, any solver, and a measured answer."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

import optprune
from optprune.cli import main
from optprune.errors import InputError
from optprune.problems import Permutation
from optprune.problems.files import save_problem
from optprune.solvers import Wanda, solve
from tests.helpers.sparse_cases import correlated
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches

OWN = """
from dataclasses import dataclass
from optprune.solvers import DirectSolver, Answer

@dataclass(frozen=True)
class Mine(DirectSolver):
    def work(self, outputs, inputs, *, coupled=False):
        from optprune.work import Work
        return Work()

    def answer(self, problem, start):
        return Answer(problem.start())

class Fails(Mine):
    def answer(self, problem, start):
        return Answer(start / 0 * nothing)

class NotFinite(Mine):
    def answer(self, problem, start):
        return Answer(start / 0)

class Wide(Mine):
    def answer(self, problem, start):
        return Answer(start.double())

class NeedsMore(Mine):
    def __init__(self, more):
        pass

class NoSolver:
    pass
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    problem = correlated(0, 8, 12, "2:4", dtype=torch.float32)
    save_problem(problem, tmp_path / "problem.safetensors", origin={"model": "tiny", "layer": "down_proj"})
    return tmp_path / "problem.safetensors"


def test_the_answer_is_measured_and_written(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer, record = tmp_path / "answer.safetensors", tmp_path / "found.json"
    words = ["solve", str(file), "--solver", "[wanda, swaps, restore]", "--output", str(answer), "--json", str(record)]
    assert main(words) == 0
    said, found = capsys.readouterr().out, json.loads(record.read_text())
    problem = optprune.load_problem(file)
    loaded = optprune.load_solution(answer, problem)
    assert found["objective"] == problem.objective(loaded.value) == loaded.objective
    assert found["violation"] == 0 and found["fingerprint"] == problem.fingerprint()
    assert found["origin"] == {"model": "tiny", "layer": "down_proj"}
    assert "8 x 12 (model tiny, layer down_proj)" in said
    assert loaded.objective < solve(problem, Wanda()).objective


def test_a_solution_replaces_only_a_solution(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer, other = tmp_path / "answer.safetensors", tmp_path / "thesis.tex"
    for _ in range(2):
        assert main(["solve", str(file), "--solver", "wanda", "--output", str(answer)]) == 0
    other.write_text("weeks of work")
    capsys.readouterr()
    assert main(["solve", str(file), "--solver", "wanda", "--output", str(other)]) == 2
    assert f"the solution {other} exists, and no such command of optprune wrote it" in capsys.readouterr().err
    assert other.read_text() == "weeks of work"


def test_a_solution_goes_through_a_pipe(file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read = list[bytes]()
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    assert main(["solve", str(file), "--solver", "wanda", "--output", str(tmp_path / "pipe")]) == 0
    reader.join(timeout=10)
    (tmp_path / "answer").write_bytes(read[0])
    optprune.load_solution(tmp_path / "answer", problem := optprune.load_problem(file))
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(InputError, match="pipe is not a regular file, so it is not replaced: name another"):
        optprune.save_solution(solve(problem, Wanda()), problem, tmp_path / "pipe")


@pytest.mark.parametrize("solver", ["auto", "wanda", "{admm: {steps: 20}}", "sparsegpt"])
def test_solvers_by_name(file: Path, solver: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(file), "--solver", solver, "--max-seconds", "20"]) in (0, 2)
    captured = capsys.readouterr()
    assert "objective" in captured.out or "has no option" in captured.err


def test_a_solver_of_ones_own(file: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mysolver.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    assert main(["solve", str(file), "--solver", "mysolver:Mine"]) == 0
    assert "objective" in capsys.readouterr().out
    assert main(["solve", str(file), "--solver", "mysolver:NoSolver"]) == 2
    assert "is not a class derived from optprune.solvers.Solver" in capsys.readouterr().err
    assert main(["solve", str(file), "--solver", "mysolver:Missing"]) == 2
    assert main(["solve", str(file), "--solver", "nomodule:Mine"]) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Fails", "the code of your own in {file}, line 16, raises NameError: name 'nothing' is not defined"),
        ("NotFinite", "the answer holds NaN or infinity"),
        ("Wide", "the answer of Wide is torch.float64 on cpu, but the weight of the problem is torch.float32"),
        ("NeedsMore", "cannot be made without options"),
    ],
)
def test_a_solver_of_ones_own_that_is_wrong_is_a_sentence(
    name: str, reason: str, file: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrongsolver.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    words = ["solve", str(file), "--solver", f"wrongsolver:{name}", "--output", "answer", "--json", "record"]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert reason.format(file=tmp_path / "wrongsolver.py") in captured.err and "unexpected" not in captured.err
    assert captured.out == "" and captured.err.count("\n") == 1
    assert {place for place in tmp_path.iterdir() if place.name != "__pycache__"} == before
    monkeypatch.setenv("OPTPRUNE_DEBUG", "1")
    assert main(words) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_module_of_ones_own_that_fails_is_a_sentence(
    file: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failingmodule.py").write_text("\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert main(["solve", str(file), "--solver", "failingmodule:Mine"]) == 2
    assert "failingmodule.py, line 2, raises ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_a_problem_of_a_model_goes_to_a_file_and_back(tmp_path: Path) -> None:
    model, recipe = tiny_llama(), optprune.load_recipe("alps", {"units": {"weights": "2:4"}, "sparsity": 0.5})
    name = "model.layers.1.mlp.down_proj"
    problem = optprune.layer_problem(model, batches()[:2], name, recipe)
    optprune.save_problem(problem, tmp_path / "problem", origin={"layer": name, "recipe": recipe.name})
    assert (
        main(["solve", str(tmp_path / "problem"), "--solver", "sparsegpt", "--output", str(tmp_path / "answer")]) == 0
    )
    loaded = optprune.load_problem(tmp_path / "problem")
    assert loaded.fingerprint() == problem.fingerprint()
    assert optprune.load_solution(tmp_path / "answer", problem).violation == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--solver", "wandaa"], "did you mean wanda?"),
        (["--solver", "{admm: {stepz: 3}}"], "the solver admm has no option 'stepz'"),
        (["--solver", "reap"], "is no solver of layers"),
        (["--solver", "[]"], "a chain needs at least one solver: give a name"),
        (["--solver", "greedy_obs"], "does not solve this problem"),
        (["--max-seconds", "0"], "--max-seconds cannot be 0"),
        (["--max-steps", "-1"], "--max-steps cannot be -1"),
    ],
)
def test_what_is_refused(file: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(file.parent.iterdir())
    assert main(["solve", str(file), *words, "--output", str(file.parent / "answer")]) == 2
    assert reason in capsys.readouterr().err
    assert set(file.parent.iterdir()) == before


def test_a_file_that_is_no_layer_problem(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_problem(Permutation(torch.arange(4), torch.arange(4)), tmp_path / "order")
    assert main(["solve", str(tmp_path / "order")]) == 2
    assert "holds a Permutation, which no solver of layers solves" in capsys.readouterr().err
    assert main(["solve", str(file), "--max-steps", "1", "--output", str(tmp_path / "answer")]) == 0
    assert main(["solve", str(tmp_path / "answer")]) == 2
    assert "answer holds a solution, not a problem: give the file of the problem" in capsys.readouterr().err
    assert main(["solve", str(tmp_path / "missing")]) == 2
    assert "cannot be read as a problem" in capsys.readouterr().err


def test_a_module_of_ones_own_that_is_no_python_is_a_sentence(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "brokenmodule.py").write_text("\ndef f(:\n")
    monkeypatch.chdir(tmp_path)
    assert main(["solve", str(file), "--solver", "brokenmodule:Mine"]) == 2
    said = capsys.readouterr().err
    assert "error: --solver brokenmodule:Mine cannot be imported: " in said and "(brokenmodule.py, line 2)" in said
