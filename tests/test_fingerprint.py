"""The fingerprint of a problem: equal content, equal hash, in every process; any change changes it."""

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.data import fingerprint
from optprune.moments import DenseMoments, InputMoments
from optprune.problems import LayerLoss, Link, LinkedLeastSquares, MaskedLeastSquares, Problem
from optprune.testing import STRATEGIES

PROBLEM = """
import torch
from optprune.moments import InputMoments
from optprune.problems import LayerLoss, Link, LinkedLeastSquares
inputs = torch.arange(12.0).reshape(4, 3).remainder(5)
loss = LayerLoss.of(torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]]), InputMoments.from_samples(inputs), 0.5)
problem = LinkedLeastSquares(loss, Link(torch.tensor([[2], [0]]), torch.tensor([0, 0])), 1)
"""


@dataclass(frozen=True)
class Box:
    content: Any


def _loss() -> LayerLoss:
    generator = torch.Generator().manual_seed(0)
    inputs, dense, weight = (torch.randn(shape, generator=generator) for shape in ((7, 4), (7, 4), (3, 4)))
    return LayerLoss.of(weight.double(), InputMoments.from_samples(inputs.double(), dense.double()), 0.1)


def _masked() -> MaskedLeastSquares:
    return MaskedLeastSquares(_loss(), torch.tensor([[True, False, True, True]]))


def _linked() -> LinkedLeastSquares:
    link = Link(torch.tensor([[0], [1], [3], [2]]), torch.tensor([0, 1, 0, 1]), (torch.arange(4)[:, None],))
    return LinkedLeastSquares(_loss(), link, 2)


def _next(tensor: torch.Tensor) -> torch.Tensor:
    """The smallest change there is: the last bit of the first entry."""
    changed = tensor.clone()
    changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(torch.inf, dtype=tensor.dtype))
    return changed


def _with_moments(**changes: Any) -> MaskedLeastSquares:
    problem = _masked()
    return replace(problem, loss=replace(problem.loss, moments=replace(problem.loss.moments, **changes)))


def _with_dense(**changes: Any) -> MaskedLeastSquares:
    dense = _loss().moments.dense
    assert dense is not None
    return _with_moments(dense=replace(dense, **changes))


def _changed() -> dict[str, Problem]:
    masked, linked, loss = _masked(), _linked(), _loss()
    moments, link = loss.moments, linked.link
    dense = moments.dense
    assert isinstance(dense, DenseMoments)
    return {
        "masked": masked,
        "weight": replace(masked, loss=replace(loss, weight=_next(loss.weight))),
        "damping": replace(masked, loss=replace(loss, damping=_next(loss.damping))),
        "fit_bias": replace(masked, loss=replace(loss, fit_bias=True)),
        "mask": replace(masked, mask=torch.tensor([[True, True, True, True]])),
        "mask per row": replace(masked, mask=masked.mask.repeat(3, 1)),
        "gram": _with_moments(gram=_next(moments.gram)),
        "mean": _with_moments(mean=_next(moments.mean)),
        "tokens": _with_moments(tokens=moments.tokens + 1),
        "no dense": _with_moments(dense=None),
        "cross": _with_dense(cross=_next(dense.cross)),
        "dense gram": _with_dense(gram=_next(dense.gram)),
        "dense mean": _with_dense(mean=_next(dense.mean)),
        "linked": linked,
        "keep": replace(linked, keep=4),
        "columns": replace(linked, link=replace(link, columns=link.columns.flip(0))),
        "slots": replace(linked, link=replace(link, slots=link.slots.flip(0))),
        "rows": replace(linked, link=replace(link, rows=())),
        "more rows": replace(linked, link=replace(link, rows=link.rows * 2)),
    }


def test_every_field_counts_to_the_last_bit():
    prints = {name: problem.fingerprint() for name, problem in _changed().items()}
    assert len(set(prints.values())) == len(prints), prints


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.__name__)
def test_equal_content_has_equal_fingerprints(kind):
    @given(STRATEGIES[kind]())
    def check(problem: Problem) -> None:
        before = problem.fingerprint()
        loss, moments = problem.loss, problem.loss.moments
        copied = replace(moments, gram=moments.gram.clone(), mean=moments.mean.clone())
        copy = replace(problem, loss=replace(loss, weight=loss.weight.clone(), moments=copied))
        # Measuring fills caches, which are not content.
        problem.objective(problem.start())
        assert problem.fingerprint() == before == copy.fingerprint()

    check()


def test_memory_layout_is_not_content():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(Box(matrix)) == fingerprint(Box(matrix.T.contiguous().T))


def test_another_process_gives_the_same_fingerprint():
    # Hash randomisation differs between processes; the fingerprint must not.
    program = PROBLEM + "print(problem.fingerprint())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names: dict[str, Any] = {}
    exec(PROBLEM, names)
    assert run.stdout.strip() == names["problem"].fingerprint()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        (None, "None"),
        (("a", "b"), ("ab",)),
        ((), None),
        (((1,), 2), (1, (2,))),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.uint8)),
        (torch.zeros(0), torch.zeros(0, 3)),
        (torch.tensor(1.0), torch.tensor([1.0])),
        ((torch.zeros(1), torch.zeros(3)), (torch.zeros(3), torch.zeros(1))),
    ],
    ids=str,
)
def test_things_that_only_look_alike_differ(one, other):
    assert fingerprint(Box(one)) != fingerprint(Box(other))


@given(st.lists(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.none(), st.booleans())))
def test_lists_of_plain_data_hash_by_content(items):
    assert fingerprint(Box(list(items))) == fingerprint(Box(list(items)))
    assert fingerprint(Box([*items, 0])) != fingerprint(Box(items))


def test_bfloat16_and_scalars_have_fingerprints():
    assert len({fingerprint(Box(torch.tensor(1.0, dtype=kind))) for kind in (torch.bfloat16, torch.float16)}) == 2


def test_what_is_not_data_is_refused():
    with pytest.raises(TypeError, match="not for function"):
        fingerprint(Box(lambda: None))
