"""One mistake, one error: a bad value is an InputError, which is a ValueError, wherever it is given."""

import ast
import math
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import optprune
from optprune import prune, solve
from optprune.errors import InputError, OptpruneError
from optprune.moments import DenseMoments, Drift, InputMoments
from optprune.patterns import NM, PartlyFixed, RowLimits, RowWise, Unstructured
from optprune.penalties import L1, WeightedL1
from optprune.problems import (
    Channels,
    ExpertChoice,
    LayerLoss,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.recipe import Recipe, load_recipe
from optprune.solvers import (
    Answer,
    Chain,
    Fista,
    FistaPath,
    GreedyObs,
    Magnitude,
    Random,
    Restore,
    Solver,
    Spap,
    Wanda,
)
from optprune.testing import reference_optimum
from tests.helpers.structured_cases import channels
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches

ROOT = Path(optprune.__file__).parent


def nested(chain: Solver, _: int) -> Chain:
    return Chain((chain,))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Recipe(sparsity=2), "the recipe field 'sparsity' cannot be 2: "),
        (lambda: Recipe({"sparsity": 2}), "the recipe field 'sparsity' cannot be 2: "),
        (lambda: load_recipe("fasp", {"sparsity": 2}), "the recipe field 'sparsity' cannot be 2: "),
        (lambda: Recipe.model_validate({"sparsity": 2}), "the recipe field 'sparsity' cannot be 2: "),
        (lambda: Recipe(dampening=1), "no field 'dampening'.*did you mean damping.*: it has name, "),  # type: ignore[call-arg]
        (
            lambda: Recipe({"refit.recovery": 1}),
            r"field 'refit\.recovery' has no effect without refit\.held_out",
        ),
        (lambda: Recipe(solver={"spap": {"first": -1}}), "'solver' cannot be .*: first of Spap must be"),  # type: ignore[arg-type]
        (lambda: Recipe(units={"weights": "2:x"}), "'units' cannot be '2:x': the pattern '2:x' is not known"),  # type: ignore[arg-type]
        (lambda: Fista(-1.0), "tolerance of Fista must be between"),
        (lambda: Fista("small"), "tolerance of Fista cannot be 'small': give a number"),  # type: ignore[arg-type]
        (lambda: GreedyObs(1.5), r"batch of GreedyObs cannot be 1\.5: give a whole number"),  # type: ignore[arg-type]
        (lambda: Restore(torch.float16), r"factor_dtype of Restore must be torch\.float32 or torch\.float64"),
        (lambda: Random(-1), "seed of Random must be between"),
        (lambda: prune(tiny_llama(), batches(), None, sparsity=0.2), "the recipe cannot be None: give a name"),  # type: ignore[arg-type]
        (lambda: prune(tiny_llama().model, batches(), "fasp"), "a LlamaModel, has no blocks .* with its head"),
        (lambda: FistaPath(ratio=0.5), "ratio of FistaPath must be more than 1"),
        (lambda: Spap(first=10.0, last=1.0), "cannot grow from 10 to 1"),
        (lambda: reduce(nested, range(20), Magnitude()), "a chain of chains is more than"),
        (lambda: L1(-1), "the strength of an l1 penalty"),
        (lambda: reference_optimum(channels(0, "mixed", units=16, keep=8)), "too many to list"),
    ],
)
def test_a_bad_value_is_an_input_error_of_one_sentence(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        make()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OptpruneError)
    assert "\n" not in str(caught.value)


SAMPLES = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = SAMPLES[:4].clone()
MOMENTS = InputMoments.from_samples(SAMPLES)
GRAM, MEAN, LOSS = MOMENTS.gram, MOMENTS.mean, LayerLoss.of(WEIGHT, MOMENTS, 0.01)
ROWS = SparseLeastSquares(LOSS, RowWise(4))
EVERY, NONE = torch.arange(8)[:, None], torch.zeros(8, dtype=torch.long)
NOTHING = torch.zeros(4, 8, dtype=torch.bool)


class Bare(Magnitude):
    """Returns a value that is no Answer."""

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        return start  # type: ignore[return-value]


class Short(Magnitude):
    """Returns fewer rows than there are."""

    def answer(self, problem: Problem, start: Tensor) -> Answer:
        return Answer(start[:2])


def averages(gram: Tensor = GRAM, mean: Tensor = MEAN, dense: DenseMoments | None = None) -> InputMoments:
    return InputMoments.from_averages(gram, mean, 50, dense)


LOGITS, PRODUCTS = torch.ones(5, 3), torch.ones(5, 3, 3)


def chosen_experts(
    logits: Tensor = LOGITS, products: Tensor = PRODUCTS, chosen: int = 1, correction: Tensor | None = None
) -> ExpertChoice:
    return ExpertChoice(logits, products, chosen, True, 2, correction)


def weighted(weights: object) -> PenalisedLeastSquares:
    return PenalisedLeastSquares(LOSS, WeightedL1(weights))  # type: ignore[arg-type]


MISTAKES: dict[str, Callable[[], Any]] = {
    # Moments and losses
    "the mean of the inputs must be torch.float32 or": lambda: averages(GRAM.half(), MEAN.half()),
    "Gram matrix .* must be torch.float32 or torch.float64, not torch.bfloat16": lambda: averages(GRAM.bfloat16()),
    "Gram matrix .* is torch.float64, but the rest is torch.float32": lambda: averages(GRAM.double()),
    r"Gram matrix .* whose mean is \[8\], must be \[8, 8\], not \[5, 8\]": lambda: averages(GRAM[:5]),
    r"Gram matrix .* whose mean is \[3\], must be \[3, 3\], not \[8, 8\]": lambda: averages(GRAM, MEAN[:3]),
    r"mean of the inputs must be \[in\], not \[1, 8\]": lambda: averages(GRAM, MEAN[None]),
    "cannot be of type ndarray: give a torch tensor": lambda: averages(GRAM.numpy()),
    "rest is on cpu": lambda: averages(GRAM.to("meta")),
    r"the mean of the dense inputs must be \[8\], not \[5\]": lambda: averages(
        dense=DenseMoments(GRAM[:5, :5], GRAM[:5, :5], MEAN[:5])
    ),
    r"products with x\* of the dense inputs": lambda: DenseMoments(GRAM[:5], GRAM, MEAN),
    r"the covariance with x\* of the drift": lambda: Drift(GRAM.double(), GRAM, MEAN),
    "the covariance of the inputs, whose mean": lambda: InputMoments(GRAM[:, :5], MEAN, 50),
    "the mean of the drift is torch.float64": lambda: InputMoments(
        GRAM, MEAN, 50, Drift(GRAM.double(), GRAM.double(), MEAN.double())
    ),
    "the number of tokens cannot be -1": lambda: InputMoments(GRAM, MEAN, -1),
    r"matrix of inputs must be \[tokens, in\], not \[8\]": lambda: InputMoments.from_samples(SAMPLES[0]),
    r"matrix of inputs must be \[tokens, in\], not \[50, 0\]": lambda: InputMoments.from_samples(SAMPLES[:, :0]),
    r"dense inputs must be \[50, 8\], not \[50, 5\]": lambda: InputMoments.from_samples(SAMPLES, SAMPLES[:, :5]),
    "dense inputs is torch.float64": lambda: InputMoments.from_samples(SAMPLES, SAMPLES.double()),
    r"weight must be \[out, in\], not \[8\]": lambda: LayerLoss.of(WEIGHT[0], MOMENTS),
    "weight must be real numbers, not torch.int64": lambda: LayerLoss.of((10 * WEIGHT).long(), MOMENTS),
    "weight must be real numbers, not torch.complex64": lambda: LayerLoss.of(WEIGHT.to(torch.complex64), MOMENTS),
    r"weight must be \[out, in\], not \[0, 8\]": lambda: LayerLoss.of(WEIGHT[:0], MOMENTS),
    "moments cannot be of type Tensor: make them by InputMoments": lambda: LayerLoss.of(WEIGHT, GRAM),
    "damping fraction cannot be 'a': give a number": lambda: LayerLoss.of(WEIGHT, MOMENTS, "a"),
    "weight is torch.float64, but": lambda: LayerLoss(WEIGHT.double(), MOMENTS, torch.zeros(8)),
    "weight must be torch.float32 or .*, not torch.float16": lambda: LayerLoss(WEIGHT.half(), MOMENTS, torch.zeros(8)),
    "damping cannot be of type list": lambda: LayerLoss(WEIGHT, MOMENTS, [0.0] * 8),
    "a mixture of no losses": lambda: LayerLoss.mixture([], []),
    # Patterns and masks
    "5:4 pattern cannot be": lambda: NM(5, 4),
    "0:0 pattern cannot be": lambda: NM(0, 0),
    "the N of an N:M pattern cannot be 2.0": lambda: NM(2.0, 4),
    "the M of an N:M pattern cannot be -4": lambda: NM(2, -4),
    "keep in a matrix cannot be 0.5: give a whole number": lambda: Unstructured(0.5),
    "keep in a row cannot be '4'": lambda: RowWise("4"),
    "the limit of a row cannot be 2.5": lambda: RowLimits(8, 2.5, 3),
    r"what goes must be \[4, 8\], not \[4, 5\]": lambda: PartlyFixed(RowWise(4), NOTHING, NOTHING[:, :5]),
    "what stays must be torch.bool, not torch.float32": lambda: PartlyFixed(RowWise(4), NOTHING.float(), NOTHING),
    r"what stays must be \[4, 8\], not \[2, 8\]": lambda: solve(
        SparseLeastSquares(LOSS, PartlyFixed(RowWise(4), NOTHING[:2], NOTHING[:2]))
    ),
    r"pattern cannot be '2:4': give an instance, e\.g\. NM": lambda: SparseLeastSquares(LOSS, "2:4"),
    "mask of weights must be torch.bool": lambda: MaskedLeastSquares(LOSS, (WEIGHT > 0).float()),
    "mask of weights cannot be of type list": lambda: MaskedLeastSquares(LOSS, NOTHING.tolist()),
    # Penalties
    r"\[4, 8\] weight must be \[4, 8\], \[8\] or \[4, 1\], not \[4\]": lambda: weighted(torch.ones(4)),
    "the least weight of an l1 penalty must be": lambda: weighted(-torch.ones(8)),
    "weights of an l1 penalty are empty": lambda: weighted(torch.ones(0)),
    "weights of an l1 penalty cannot be 0.1: give a tensor": lambda: weighted(0.1),
    "the strength of an l1 penalty cannot be 'a'": lambda: L1("a"),
    "penalty cannot be 'l1': give an instance": lambda: PenalisedLeastSquares(LOSS, "l1"),
    "weights of an l1 penalty must be real numbers, not torch.bool": lambda: weighted(WEIGHT > 0),
    # Mixtures of experts
    "the router's output must be finite": lambda: chosen_experts(logits=LOGITS / 0),
    "the products of the experts' outputs must be finite": lambda: chosen_experts(products=PRODUCTS * math.nan),
    "the router's correction must be finite": lambda: chosen_experts(correction=torch.full((3,), math.inf)),
    "the router's output must be real numbers, not torch.int64": lambda: chosen_experts(logits=LOGITS.long()),
    r"the products of the experts' outputs must be \[5, 3, 3\], not \[5, 3, 2\]": lambda: chosen_experts(
        products=PRODUCTS[:, :, :2]
    ),
    "the number of experts that the router chooses cannot be -1": lambda: chosen_experts(chosen=-1),
    "2 of 3 experts cannot be kept: the router chooses 0": lambda: chosen_experts(chosen=0),
    # Units
    "units to keep cannot be 4.0": lambda: StructuredLeastSquares(LOSS, Channels.of(8), 4.0),
    "0 channels cannot be cut": lambda: Channels.of(0),
    "number of channels cannot be 8.0": lambda: Channels.of(8.0),
    "slots of units must be whole numbers, not torch.float32": lambda: Channels(EVERY, NONE.float()),
    "a slot of 8 units cannot be -1: number them from 0": lambda: Channels(EVERY, NONE - 1),
    "a slot of 8 units cannot be 8: number them from 0": lambda: Channels(EVERY, NONE + 8),
    "same number of units, not 1 to 7": lambda: Channels(EVERY, (EVERY[:, 0] == 0).long()),
    r"must be \[units, columns\], not \[8\]": lambda: Channels(EVERY[:, 0], NONE),
    r"must be \[units, columns\], not \[0, 1\]": lambda: Channels(EVERY[:0], NONE[:0]),
    "columns 0 to 7, but the layer has 5": lambda: StructuredLeastSquares(
        LayerLoss.of(WEIGHT[:, :5], InputMoments.from_samples(SAMPLES[:, :5])), Channels(EVERY, NONE), 4
    ),
    # Solvers
    r"solver cannot be 'wanda': give an instance, e\.g\. SparseGpt\(\)": lambda: solve(ROWS, "wanda"),
    "solver cannot be <class .*Wanda'>: give an instance": lambda: solve(ROWS, Wanda),
    "problem cannot be of type LayerLoss: give a problem": lambda: solve(LOSS),
    "problem cannot be of type Wanda": lambda: solve(Wanda(), ROWS),
    "the solver cannot be 'wanda'": lambda: Chain(("wanda",)),
    "stages of a chain cannot be of type Wanda": lambda: Chain(Wanda()),
    "start cannot be of type ndarray": lambda: solve(ROWS, start=WEIGHT.numpy()),
    "max_steps cannot be 2.5": lambda: solve(ROWS, max_steps=2.5),
    "max_seconds cannot be 'a'": lambda: solve(ROWS, max_seconds="a"),
    "max_seconds cannot be nan": lambda: solve(ROWS, max_seconds=math.nan),
    "max_seconds cannot be -1": lambda: solve(ROWS, max_seconds=-1),
    r"answer of Bare cannot be of type Tensor: return Answer\(weight\)": lambda: solve(ROWS, Bare()),
    r"answer of Short must be \[4, 8\], not \[2, 8\]": lambda: solve(ROWS, Short()),
    "model cannot be 'llama': give the model itself": lambda: prune("llama", [], Recipe()),
    "recipe cannot be 7: give a name": lambda: prune(torch.nn.Linear(1, 1), [], 7),
}
"""the words of each error, and the call that raises it; the wrong types are the mistakes"""


@pytest.mark.parametrize("reason", MISTAKES)
def test_a_wrong_object_is_an_input_error_with_the_remedy(reason: str, as_users_run: None) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        MISTAKES[reason]()
    assert "\n" not in str(caught.value)


def test_nothing_raises_a_bare_value_error_but_to_pydantic() -> None:
    found = []
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        # What a validator raises reaches nobody as it is.
        for node in () if "from pydantic import" in text else ast.walk(ast.parse(text)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                named = node.exc.func
                if isinstance(named, ast.Name) and named.id == "ValueError":
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found, f"raise InputError in place of ValueError: {found}"


def test_commands_print_by_the_one_function_that_escapes() -> None:
    """`echo` in cli/outputs.py leaves out what a terminal would obey; errors.py does so itself."""
    apart = {"outputs.py", "errors.py", "app.py"}
    files = [file for file in (ROOT / "cli").glob("*.py") if file.name not in apart]
    assert files
    assert [file.name for file in files if "typer.echo" in file.read_text(encoding="utf-8")] == []
