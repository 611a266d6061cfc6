"""Problems as files: the same content in any process, half of a symmetric matrix, and a sentence for a damaged file."""

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optprune.errors import InputError
from optprune.grids import Grid
from optprune.numerics.fingerprint import fingerprint
from optprune.patterns import NM, Pattern, RowLimits, RowWise
from optprune.penalties import L1
from optprune.problems import (
    Channels,
    ExpertChoice,
    GridLeastSquares,
    LayerLoss,
    PenalisedLeastSquares,
    Permutation,
    Problem,
    Rotation,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.problems.files import FORMAT, HEADER, KINDS, load_problem, origin_of, save_problem
from optprune.testing.strategies import STRATEGIES
from tests.helpers.sparse_cases import correlated

WIDTH = 12
EARLIER = Path(__file__).parent / "earlier_format"
CHANNELS = Channels.of(WIDTH)


def loss(seed: int = 0, dtype: torch.dtype = torch.float32) -> LayerLoss:
    return correlated(seed, 8, WIDTH, "2:4", dtype=dtype).loss


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data())
def test_a_problem_is_the_same_in_its_file(kind, dtype, tmp_path_factory, data: st.DataObject) -> None:
    problem = data.draw(STRATEGIES[kind](dtype=dtype))
    file = tmp_path_factory.mktemp("files") / "problem.safetensors"
    save_problem(problem, file, origin={"layer": "model.layers.0.mlp.down_proj", "tokens": 128})
    loaded = load_problem(file)
    assert type(loaded) is type(problem) and repr(loaded) == repr(problem)
    assert fingerprint(loaded) == problem.fingerprint()
    assert isinstance(loaded, Problem)
    value = problem.start()
    assert loaded.objective(value) == problem.objective(value)
    assert loaded.violation(value) == problem.violation(value)
    assert origin_of(file) == {"layer": "model.layers.0.mlp.down_proj", "tokens": 128}


def others() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    groups = Channels.of(WIDTH, 3)
    matrices = torch.linalg.qr(torch.randn(1, 4, 4, generator=generator))[0]
    answers = torch.randn(5, 4, 6, generator=generator)
    return {
        "rotation": Rotation.of(matrices, groups),
        "permutation": Permutation.of(torch.tensor([2, 0, 3, 1]), groups, WIDTH),
        "expert choice": ExpertChoice.of(torch.randn(5, 4, generator=generator), answers, 2, True, 3),
    }


@pytest.mark.parametrize("kind", ["rotation", "permutation", "expert choice"])
def test_what_is_no_layer_problem_is_the_same_in_its_file(kind: str, tmp_path: Path) -> None:
    value = others()[kind]
    save_problem(value, tmp_path / "file")
    loaded = load_problem(tmp_path / "file")
    assert type(loaded) is type(value) and fingerprint(loaded) == fingerprint(value)


def test_every_kind_has_a_file() -> None:
    assert set(KINDS.values()) == {*STRATEGIES, Rotation, Permutation, ExpertChoice}


@pytest.mark.parametrize("kind", ["structured", "linked"])
def test_a_structured_problem_of_the_earlier_format_is_read(kind: str, tmp_path: Path) -> None:
    # Written before problems of one layer and of several were one kind: six inputs, three units of two columns.
    old = load_problem(EARLIER / f"{kind}.safetensors")
    assert type(old) is StructuredLeastSquares and old.keep == 2 and old.loss.weight.shape == (2, 6)
    assert old.channels.columns.tolist() == [[4, 5], [2, 3], [0, 1]] and old.channels.slots.tolist() == [0, 0, 0]
    assert old.loss.weight[0, 0] == 1.3946317434310913 and old.loss.moments.tokens == 20
    assert origin_of(EARLIER / f"{kind}.safetensors") == {"layer": "mlp.down_proj"}
    save_problem(old, tmp_path / "file")
    assert load_problem(tmp_path / "file").fingerprint() == old.fingerprint()


def test_another_process_with_other_threads_finds_the_same_problem(tmp_path: Path) -> None:
    problem = correlated(1, 8, 16, "2:4", dtype=torch.float32)
    save_problem(problem, tmp_path / "file")
    code = (
        "import sys, torch, optprune; torch.set_num_threads(2); p = optprune.load_problem(sys.argv[1]); "
        "print(p.fingerprint(), p.objective(p.start()).hex())"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "file")]
    found = subprocess.run(
        words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert found.stdout.split() == [problem.fingerprint(), problem.objective(problem.start()).hex()]


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (lambda: PenalisedLeastSquares(loss(), L1(np.float64(0.1))), lambda: PenalisedLeastSquares(loss(), L1(0.1))),
        (lambda: PenalisedLeastSquares(loss(), L1(np.float32(0.5))), lambda: PenalisedLeastSquares(loss(), L1(0.5))),
        (lambda: SparseLeastSquares(loss(), RowWise(np.int64(3))), lambda: SparseLeastSquares(loss(), RowWise(3))),
    ],
    ids=["float64", "float32", "int64"],
)
def test_numbers_of_numpy_are_saved_as_numbers(given: Any, same: Any, tmp_path: Path) -> None:
    save_problem(given(), tmp_path / "problem.safetensors")
    loaded = load_problem(tmp_path / "problem.safetensors")
    assert fingerprint(loaded) == fingerprint(given()) == fingerprint(same())


def test_of_a_symmetric_matrix_half_is_stored(tmp_path: Path) -> None:
    problem = correlated(0, 2, 200, "2:4", dtype=torch.float32)
    save_problem(problem, tmp_path / "file")
    matrix = 4 * 200**2
    assert (tmp_path / "file").stat().st_size < 0.56 * matrix + 8000
    drifted = correlated(1, 2, 200, "2:4", dtype=torch.float32)
    save_problem(drifted, tmp_path / "drifted")
    assert drifted.loss.moments.drift is not None
    assert fingerprint(load_problem(tmp_path / "drifted")) == drifted.fingerprint(), "the cross moments are whole"


@dataclass(frozen=True)
class Own(Pattern):
    """A pattern of one's own."""

    def project(self, score):
        return torch.ones_like(score, dtype=torch.bool)

    def admits(self, mask):
        return bool(mask.all())


def test_a_class_of_ones_own_is_no_data(tmp_path: Path, as_users_run: None) -> None:
    with pytest.raises(InputError, match="a problem with a Own cannot be saved, because a file holds no code"):
        save_problem(SparseLeastSquares(loss(), Own()), tmp_path / "file")
    with pytest.raises(InputError, match="a L1 cannot be saved"):
        save_problem(L1(0.1), tmp_path / "file")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def damaged_bytes(file: Path, how: str, rng: random.Random) -> None:
    """Spoil the bytes of a file."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    first, last = (8, 8 + length) if how == "header" else (8 + length, len(data))
    if how in ("header", "flip"):
        data[rng.randrange(first, last)] ^= 1 << rng.randrange(7)
    file.write_bytes({"cut": data[: rng.randrange(len(data))], "empty": b"", "more": data + b"\0"}.get(how, data))


def damaged_content(file: Path, how: str, rng: random.Random) -> None:
    """Spoil the header or the tensors of a file that stays a safetensors file."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    content, tensors = json.loads(header["__metadata__"][HEADER]), load_file(file)
    numbers = [key for key, value in tensors.items() if value.is_floating_point()]
    name = rng.choice(numbers)
    if how == "field":
        content["fields"][rng.choice(list(content["fields"]))] = rng.choice([None, "x", -1, [], {"tensor": "x"}, {}])
    elif how == "kind":
        content["kind"] = rng.choice([*(kind for kind in KINDS if kind != content["kind"]), "other", None, 3])
    elif how == "nan":
        tensors[name].view(-1)[0] = rng.choice([float("nan"), float("inf"), -1e30])
    elif how == "width":
        width = rng.choice(["0", "-3", "1000000000", "13", '"x"'])
        text = json.dumps(content)
        if f'"width": {WIDTH}' not in text:
            return  # a file without a triangle
        content = json.loads(text.replace(f'"width": {WIDTH}', f'"width": {width}'))
    elif how == "shape":
        tensors[name] = tensors[name].view(-1)[:1]
    else:
        tensors[name] = tensors[name] + 1
    save_file(tensors, file, {HEADER: json.dumps(content)})


BYTES, CONTENT = ("cut", "flip", "header", "empty", "more"), ("field", "kind", "nan", "width", "shape", "number")


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_sentences(part: int, tmp_path: Path, as_users_run: None) -> None:
    problems = [
        correlated(0, 8, WIDTH, "2:4", dtype=torch.float32),
        correlated(1, 8, WIDTH, "unstructured"),
        StructuredLeastSquares(loss(2), CHANNELS, 6),
        others()["expert choice"],
    ]
    rng, seen = random.Random(part), set[str]()
    for _ in range(50):
        file = tmp_path / "file"
        file.unlink(missing_ok=True)  # a file without our mark is not replaced
        save_problem(problems[part], file)
        before = file.read_bytes()
        how = rng.choice(BYTES + CONTENT)
        (damaged_bytes if how in BYTES else damaged_content)(file, how, rng)
        if file.read_bytes() == before:
            continue
        seen.add(how)
        with pytest.raises(InputError) as raised:
            load_problem(file)
        assert str(raised.value).startswith((str(file), f"the header of {file}")) and "\n" not in str(raised.value)
    assert len(seen) >= 8


@pytest.mark.parametrize("origin", ["mlp.down_proj", {"layer": None}, {1: "layer"}], ids=str)
def test_an_origin_is_texts_or_numbers_by_name(origin: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give texts or numbers by name, such as"):
        save_problem(correlated(0, 8, WIDTH, "2:4"), tmp_path / "file", origin=origin)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (None, "is not a problem that optprune saved: it has no header"),
        ("{", "is not valid JSON"),
        ("[]", "is of the format"),
        (
            json.dumps({"format": FORMAT + 1}),
            f"is of the format {FORMAT + 1}, and this optprune reads the format {FORMAT}",
        ),
        (json.dumps({"format": FORMAT}), "its header was changed"),
    ],
)
def test_other_files_are_sentences(header: str | None, sentence: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "file", None if header is None else {HEADER: header})
    with pytest.raises(InputError, match=sentence):
        load_problem(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be read as a problem"):
        load_problem(tmp_path / "missing")
    with pytest.raises(InputError, match="cannot be read as a problem"):
        load_problem(tmp_path)


@pytest.mark.parametrize("index", [-1, 2**40])
def test_an_index_that_asks_for_all_memory_is_a_sentence(index: int, tmp_path: Path, as_users_run: None) -> None:
    problem = StructuredLeastSquares(loss(2), replace(CHANNELS), 6)
    object.__setattr__(problem.channels, "slots", problem.channels.slots.index_fill(0, torch.tensor([3]), index))
    save_problem(problem, tmp_path / "file")
    with pytest.raises(InputError, match="its fields make no structured problem"):
        load_problem(tmp_path / "file")


class Largest(TorchDispatchMode):
    """The largest number of entries of a tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return found


def forged(problem: Any, file: Path, **fields: Any) -> None:
    """Write a problem whose fields are as `given`, by their paths, although no such problem can be made."""
    for path, value in fields.items():
        *parts, last = path.split("__")
        object.__setattr__(reduce(getattr, parts, problem), last, value)
    save_problem(problem, file)


HUGE = 10**4000
FORGED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "slots with a gap": (
        lambda: StructuredLeastSquares(loss(2), replace(CHANNELS), 6),
        {"channels__slots": CHANNELS.slots.index_fill(0, torch.tensor([3]), 2**24)},
    ),
    "a group of millions": (lambda: SparseLeastSquares(loss(), NM(2, 4)), {"pattern__m": HUGE}),
    "as many to keep": (lambda: SparseLeastSquares(loss(), RowWise(4)), {"pattern__keep": HUGE}),
    "limits of rows": (lambda: SparseLeastSquares(loss(), RowLimits(24, 1, 6)), {"pattern__most": HUGE}),
    "a block of a grid": (lambda: GridLeastSquares(loss(), Grid(4, 4)), {"grid__block": HUGE}),
    "bits of a grid": (lambda: GridLeastSquares(loss(), Grid(4, 4)), {"grid__bits": HUGE}),
    "tokens": (lambda: SparseLeastSquares(loss(), NM(2, 4)), {"loss__moments__tokens": HUGE}),
    "units to keep": (lambda: StructuredLeastSquares(loss(2), replace(CHANNELS), 6), {"keep": HUGE}),
    "experts without tokens": (
        lambda: others()["expert choice"],
        {"logits": torch.zeros(0, 2**40), "products": torch.zeros(0, 2**40, 2**20), "chosen": 1, "keep": 1},
    ),
    "a rotation of nothing": (lambda: others()["rotation"], {"matrices": torch.zeros(0, 2**40, 2**20)}),
    "an order with a gap": (lambda: others()["permutation"], {"units": torch.tensor([0, 2**24])}),
}
"""problems with the fields that are forged"""


@pytest.mark.parametrize("what", FORGED)
def test_memory_is_bounded_by_what_the_file_holds(what: str, tmp_path: Path, as_users_run: None) -> None:
    problem, fields = FORGED[what]
    forged(problem(), tmp_path / "file", **fields)
    tracemalloc.start()
    try:
        with Largest() as largest, pytest.raises(InputError, match="is damaged: its fields make no") as caught:
            load_problem(tmp_path / "file")
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest.numel <= 1000 and taken < 2**20
    reason = caught.value.__cause__
    assert isinstance(reason, InputError) and len(str(reason)) < 300 and len(str(caught.value)) < 300


def test_changed_numbers_are_seen_before_anything_is_made_of_them(tmp_path: Path) -> None:
    file = tmp_path / "file"
    save_problem(correlated(0, 8, WIDTH, "2:4", dtype=torch.float32), file)
    data, tensors = file.read_bytes(), load_file(file)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    for name in tensors:
        save_file(tensors | {name: tensors[name] + 1}, file, header)
        with pytest.raises(InputError, match="its numbers were changed"):
            load_problem(file)
