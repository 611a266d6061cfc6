"""Programs in files: SCIP reads each back, and its answer is the problem's optimum."""

import sys
from pathlib import Path

import pyscipopt
import pytest
import torch

from optprune.errors import InputError
from optprune.patterns import NM
from optprune.penalties import L1
from optprune.problems import (
    Channels,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
    to_cvxpy,
)
from optprune.testing import reference_optimum
from tests.helpers.structured_cases import structured_loss

LOSS = structured_loss(0, 2, 4, "correlated", damping=0.05)
PROBLEMS: dict[str, Problem] = {
    "sparse": SparseLeastSquares(LOSS, NM(2, 4)),
    "structured": StructuredLeastSquares(LOSS, Channels.of(4), 2),
    "penalised": PenalisedLeastSquares(LOSS, L1(0.2)),
    "masked": MaskedLeastSquares(LOSS, torch.tensor([[True, False, True, True]])),
}


def read_and_solved(file: Path) -> list[float]:
    """The values of x_0, x_1, ... that SCIP finds for a file."""
    model = pyscipopt.Model()
    model.hideOutput()
    model.readProblem(str(file))
    model.setParam("limits/gap", 0.0)
    model.optimize()
    assert model.getStatus() == "optimal"
    found = {each.name: model.getVal(each) for each in model.getVars() if each.name.startswith("x_")}
    return [found[f"x_{place}"] for place in range(len(found))]


@pytest.mark.parametrize("ending", [".lp", ".mps", ".cip"])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_solver_that_reads_the_file_finds_the_optimum(kind: str, ending: str, tmp_path: Path) -> None:
    problem, file = PROBLEMS[kind], tmp_path / f"program{ending}"
    model = to_cvxpy(problem)
    model.write(file)
    found = problem.measure(model.value_of(read_and_solved(file)))
    assert found.violation == 0
    assert found.objective == pytest.approx(reference_optimum(problem), rel=1e-4)


def test_another_ending_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.lp, \.mps or \.cip"):
        to_cvxpy(PROBLEMS["sparse"]).write(tmp_path / "program.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [[1.0, 2.0], [float("nan")] * 100], ids=["too few", "not finite"])
def test_values_that_are_no_answer_are_refused(values: list[float]) -> None:
    with pytest.raises(InputError, match=r"variables x_0, x_1, \.\.\., and a finite value of each is needed"):
        to_cvxpy(PROBLEMS["sparse"]).value_of(values)


def test_without_scip_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = to_cvxpy(PROBLEMS["sparse"])
    monkeypatch.setitem(sys.modules, "pyscipopt", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[testing\]'"):
        model.write(tmp_path / "program.lp")
