"""A solver of one's own that fails, or that returns what is no weight of its problem: one sentence each."""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optprune.errors import InputError, OwnCodeError
from optprune.problems import Problem, SparseLeastSquares
from optprune.solvers import Answer, Certificate, Chain, DirectSolver, Restore, Status, Wanda, solve
from optprune.work import Work
from tests.helpers.sparse_cases import correlated


@dataclass(frozen=True)
class Own(DirectSolver[Problem]):
    """Returns what a function makes of the start."""

    of: Callable[[Tensor], Any]

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        return Answer(self.of(start))

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        return Work()


@pytest.fixture
def problem() -> SparseLeastSquares:
    return correlated(0, 4, 8, "2:4", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("chained", [False, True], ids=["alone", "in a chain"])
def test_an_answer_of_another_dtype_is_refused(problem: SparseLeastSquares, dtype: torch.dtype, chained: bool) -> None:
    solver = Own(lambda start: start.to(dtype))
    with pytest.raises(InputError, match=f"the answer of Own is {dtype} on cpu, but the weight .* is torch.float32"):
        solve(problem, Chain((solver, Wanda())) if chained else solver)


def test_an_answer_on_another_device_is_refused(problem: SparseLeastSquares) -> None:
    with pytest.raises(InputError, match=r"the answer of Own is torch\.float32 on meta, but the weight .* on cpu"):
        solve(problem, Own(lambda start: start.to("meta")))


def test_an_answer_that_is_not_stored_densely_is_refused(problem: SparseLeastSquares) -> None:
    sentence = r"is stored as torch\.sparse_coo: convert it to a dense tensor, by \.to_dense\(\)"
    with pytest.raises(InputError, match=f"the answer of Own {sentence}"):
        solve(problem, Own(lambda start: start.to_sparse()))
    with pytest.raises(InputError, match=f"the start {sentence}"):
        solve(problem, Wanda(), start=problem.start().to_sparse())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_says_so(problem: SparseLeastSquares, bad: float) -> None:
    def spoiled(start: Tensor) -> Tensor:
        return start.index_fill(1, torch.tensor([2]), bad)

    assert solve(problem, Own(spoiled)).status is Status.NONFINITE


def fails(start: Tensor) -> Tensor:
    return start / {}["missing"]


def in_torch(start: Tensor) -> Tensor:
    return start @ start


@pytest.mark.parametrize(("of", "name"), [(fails, "KeyError: 'missing'"), (in_torch, "RuntimeError: ")])
def test_an_error_in_ones_own_code_is_a_sentence_with_its_place(
    problem: SparseLeastSquares, of: Callable[[Tensor], Tensor], name: str
) -> None:
    with pytest.raises(OwnCodeError) as caught:
        solve(problem, Own(of))
    line = of.__code__.co_firstlineno + 1
    assert str(caught.value).startswith(f"the code of your own in {Path(__file__)}, line {line}, raises {name}")
    assert type(caught.value.__cause__).__name__ == name.partition(":")[0], "the cause is kept"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "a worker sends it"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_is_no_mistake_of_the_code_passes(problem: SparseLeastSquares, error: type[BaseException]) -> None:
    def stop(start: Tensor) -> Tensor:
        raise error

    with pytest.raises(error):
        solve(problem, Own(stop))


def test_an_error_of_a_callback_is_its_callers(problem: SparseLeastSquares) -> None:
    class Enough(Exception):
        pass

    def enough(steps: int, weight: Callable[[], Tensor]) -> None:
        raise Enough

    with pytest.raises(Enough):
        solve(problem, Chain((Wanda(), Restore())), callback=enough)


def test_an_error_that_optprune_raises_stays_as_it_is(problem: SparseLeastSquares, as_users_run: None) -> None:
    with pytest.raises(Exception) as caught:
        solve(problem, Own(lambda start: problem.loss.value(None)))  # type: ignore[arg-type]
    assert not isinstance(caught.value, OwnCodeError)


@pytest.mark.parametrize(
    ("method", "returned", "sentence"),
    [
        ("done", True, "what done of Own returns cannot be True: return None to go on"),
        ("done", Status, "what done of Own returns cannot be"),
        ("certify", 3, "what certify of Own returns cannot be 3: return a Certificate"),
        ("prove", 3, "what prove of Own returns cannot be 3: return a Certificate"),
        ("notes", None, "what notes of Own returns cannot be None: return sentences"),
        ("notes", "abc", "what notes of Own returns cannot be 'abc'"),
        ("notes", (None,), "what notes of Own returns cannot be"),
    ],
)
def test_what_a_method_returns_wrongly_is_refused(
    problem: SparseLeastSquares, method: str, returned: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Own, method, lambda *_: returned)
    with pytest.raises(InputError, match=sentence):
        solve(problem, Own(lambda start: start))


@pytest.mark.parametrize("given", [("x", "proof"), (0.0, None), (None, "proof")])
def test_a_certificate_is_a_number_and_words(given: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="of a certificate cannot be"):
        Certificate(*given)
