"""Fingerprints: equal content, equal hash; anything else, another."""

import subprocess
import sys
from dataclasses import dataclass, fields, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.moments import InputMoments
from optprune.numerics.fingerprint import code_fingerprint, fingerprint
from optprune.problems import LayerLoss, MaskedLeastSquares, Problem
from optprune.testing import STRATEGIES
from optprune.testing.strategies import masked, structured


@dataclass(frozen=True)
class Holder:
    """Anything."""

    value: Any


@dataclass(frozen=True)
class OtherHolder:
    """The same field under another name of the class."""

    value: Any


def copied(value):
    """The same content in other objects."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(copied(item) for item in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{field.name: copied(getattr(value, field.name)) for field in fields(value)})
    return value


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.__name__)
def test_equal_content_has_equal_fingerprints(kind):
    @given(STRATEGIES[kind]())
    def check(problem: Problem):
        assert problem.fingerprint() == copied(problem).fingerprint() == fingerprint(problem)

    check()


def test_measuring_does_not_change_the_fingerprint():
    @given(masked())
    def check(problem):
        before = problem.fingerprint()
        problem.objective(problem.start())
        _ = problem.loss.target, problem.loss.constant, problem.loss.relative_error(problem.start())
        assert problem.fingerprint() == before

    check()


def tensors(value, path=()):
    """Every tensor in a dataclass, with where it is."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from tensors(item, (*path, index))
    elif hasattr(value, "__dataclass_fields__"):
        # A field that takes no part in comparing is what is known of the others.
        for field in (field for field in fields(value) if field.compare):
            yield from tensors(getattr(value, field.name), (*path, field.name))


@given(st.one_of(masked(), structured()), st.data())
def test_one_changed_number_changes_the_fingerprint(problem, data):
    problem = copied(problem)
    before = problem.fingerprint()
    _, tensor = data.draw(st.sampled_from([found for found in tensors(problem) if found[1].numel()]))
    entry = tensor.view(-1)
    place = data.draw(st.integers(0, tensor.numel() - 1))
    entry[place] = ~entry[place] if tensor.dtype == torch.bool else entry[place] + 1
    assert problem.fingerprint() != before


DIFFERENT = [
    None,
    True,
    False,
    0,
    1,
    1.0,
    "1",
    "",
    (),
    (1,),
    (1, 1),
    ((1,), 1),
    (1, (1,)),
    torch.zeros(2),
    torch.zeros(1, 2),
    torch.zeros(2, 1),
    torch.zeros(2, dtype=torch.float64),
    torch.zeros(2, dtype=torch.int32),
    torch.zeros(0),
    torch.tensor(0.0),
    Holder(1),
    OtherHolder(1),
    Holder(Holder(1)),
]


def test_different_content_has_different_fingerprints():
    digests = [fingerprint(Holder(value)) for value in DIFFERENT]
    assert len(set(digests)) == len(digests)


def test_layout_in_memory_does_not_matter():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(Holder(matrix)) == fingerprint(Holder(matrix.T.contiguous().T))
    assert fingerprint(Holder(matrix[:, :2])) == fingerprint(Holder(matrix[:, :2].contiguous()))


@pytest.mark.parametrize("value", [{"a": 1}, {1}, object(), 1j])
def test_what_is_no_plain_data_is_refused(value):
    with pytest.raises(TypeError, match="plain data"):
        fingerprint(Holder(value))


def test_the_fingerprint_is_the_same_in_another_process():
    program = """
import torch
from optprune.moments import InputMoments
from optprune.problems import LayerLoss, MaskedLeastSquares
moments = InputMoments(torch.eye(2), torch.zeros(2), 10)
loss = LayerLoss.of(torch.tensor([[3.0, 2.0]]), moments, 0.5)
print(MaskedLeastSquares(loss, torch.tensor([[True, False]])).fingerprint())
"""
    run = [sys.executable, "-c", program]
    there = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    moments = InputMoments(torch.eye(2), torch.zeros(2), 10)
    loss = LayerLoss.of(torch.tensor([[3.0, 2.0]]), moments, 0.5)
    assert there == MaskedLeastSquares(loss, torch.tensor([[True, False]])).fingerprint()
    assert len(there) == 64


SOLVER = '''
from dataclasses import dataclass
from functools import partial
import numpy

LEAST = 0.5

def score(weight, power=2, pair=(1, 23)):
    """Return a score."""
    return numpy.abs(weight) ** power * LEAST

class Base:
    def answer(self, weight):
        return self.order(score(weight))

@dataclass(frozen=True)
class Saliency(Base):
    scale: float = 1.0

    def order(self, scores):
        return sorted(scores, key=lambda score: -score * self.scale)

def objective(context):
    return Saliency(2.0).answer(context)
'''
CHANGES = {
    "a constant of the module": ("LEAST = 0.5", "LEAST = 0.25"),
    "where one number ends and the next begins": ("(1, 23)", "(12, 3)"),
    "a default": ("power=2", "power=1"),
    "a function that a method calls": ("numpy.abs(weight)", "-numpy.abs(weight)"),
    "the name of a library's function": ("numpy.abs", "numpy.sqrt"),
    "a method of the base class": ("self.order(score(weight))", "score(weight)"),
    "a function inside a method": ("-score * self", "score * self"),
}
SAME = {
    "a comment and empty lines": ("LEAST = 0.5", "\n\n# the least\nLEAST = 0.5"),
    "a function that nothing calls": ("class Base", "def other():\n    return LEAST + 1\n\nclass Base"),
}


def module_of(text: str, folder: Path) -> ModuleType:
    (folder / "own_solver.py").write_text(text)
    spec = spec_from_file_location("own_solver", folder / "own_solver.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["own_solver"] = module
    exec(compile(text, "own_solver.py", "exec"), vars(module))
    return module


@pytest.fixture
def no_module_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_solver", ModuleType("own_solver"))


@pytest.mark.usefixtures("no_module_stays")
@pytest.mark.parametrize("changed", CHANGES | SAME)
def test_code_has_another_fingerprint_where_what_it_does_has_changed(changed: str, tmp_path: Path) -> None:
    before = module_of(SOLVER, tmp_path)
    solver, objective = code_fingerprint(before.Saliency), code_fingerprint(before.objective)
    assert code_fingerprint(module_of(SOLVER, tmp_path).Saliency) == solver
    assert code_fingerprint(before.Saliency(2.0)) != code_fingerprint(before.Saliency(3.0))
    text = SOLVER.replace(*(CHANGES | SAME)[changed])
    assert text != SOLVER
    after = module_of(text, tmp_path)
    assert (code_fingerprint(after.Saliency) == solver) == (changed in SAME)
    assert (code_fingerprint(after.objective) == objective) == (changed in SAME)


@pytest.mark.usefixtures("no_module_stays")
def test_code_of_a_module_beside_counts_and_that_of_an_installed_package_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import numpy, own_helper\nfrom own_helper import double\ndef objective(x):\n    return numpy.abs(double(x))\n"
    )
    helper = ModuleType("own_helper")
    monkeypatch.setitem(sys.modules, "own_helper", helper)

    def found(body: str) -> str:
        exec(f"def double(x):\n    return {body}", vars(helper))
        return code_fingerprint(module_of(text, tmp_path).objective)

    assert found("2 * x") == found("2 * x") != found("3 * x")
    before = found("2 * x")
    helper.__file__ = "/lib/python/site-packages/own_helper/__init__.py"
    assert found("3 * x") == found("2 * x") != before


def test_a_variable_that_has_no_value_yet_is_left_out() -> None:
    def objective(x: float) -> float:
        return scale(x)

    before = code_fingerprint(objective)

    def scale(x: float) -> float:
        return 2 * x

    assert code_fingerprint(objective) != before
