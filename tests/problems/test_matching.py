"""Block matching as a problem: its value and gradient by plain loops, on real blocks, in float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from optprune.errors import InputError, NumericalError
from optprune.metric import OutputMetric
from optprune.problems import BlockMatching, Example
from optprune.problems import matching as problem_module
from optprune.pruning.refinement import Sequences
from optprune.testing import Listed, matchings
from tests.helpers.damaged_blocks import LAYERS, damaged_block

WIDTH = 16
SINGLE = 2.0**-23
"""a rounding of float32, in which the norms of Llama and Qwen2 compute whatever they are given"""
by_family = pytest.mark.parametrize("name", LAYERS)
by_metric = pytest.mark.parametrize("full", [None, False, True])


def some_metric(full: bool | None) -> OutputMetric | None:
    if full is None:
        return None
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(100, WIDTH, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, WIDTH)
    return OutputMetric.from_samples(gradients.double(), full=full)


def problem_of(name: str, full: bool | None, pull: float = 0.0) -> BlockMatching:
    block, calls = damaged_block(name, torch.float64)
    return BlockMatching.of(block, Sequences(calls, 1), some_metric(full), pull)


def moved(problem: BlockMatching, by: float) -> tuple[Tensor, ...]:
    """A point off the start, each weight by about so many of its units."""
    generator = torch.Generator().manual_seed(7)
    pairs = zip(problem.point(), problem.units, strict=True)
    return tuple(
        kept + by * unit * torch.randn(kept.shape, generator=generator, dtype=torch.float64) for kept, unit in pairs
    )


def start_of(problem: BlockMatching) -> list[Tensor]:
    """The parameters of a block that nothing has moved yet, whole."""
    return [weight.detach().clone() for weight in problem.module.parameters()]


def kept(weight: Tensor) -> Tensor:
    """A mask of what may move of a parameter, as it is at first."""
    return weight != 0 if weight.ndim > 1 else torch.ones_like(weight, dtype=torch.bool)


def spread(point: tuple[Tensor, ...], start: list[Tensor]) -> tuple[Tensor, ...]:
    """The parameters of a block at a point, whole."""
    pairs = zip(point, start, strict=True)
    return tuple(torch.zeros_like(weight).masked_scatter(kept(weight), values) for values, weight in pairs)


def plain(problem: BlockMatching, point: tuple[Tensor, ...], start: list[Tensor]) -> Tensor:
    """The objective as the docstring has it, token by token, at parameters that are whole."""
    calls = problem.examples.calls  # type: ignore[attr-defined]
    matrix = torch.eye(WIDTH).double() if problem.metric is None else problem.metric.matrix
    error = signal = torch.zeros((), dtype=torch.float64)
    for (args, kwargs), target in zip(calls.arguments, calls.targets, strict=True):
        output = functional_call(problem.module, dict(zip(problem.names, point, strict=True)), args, kwargs)
        output = output[0] if isinstance(output, tuple) else output
        for answer, wanted in zip(output.reshape(-1, WIDTH), target.reshape(-1, WIDTH), strict=True):
            weight = 1 / (wanted @ wanted)
            error = error + weight * (answer - wanted) @ matrix @ (answer - wanted)
            signal = signal + weight * wanted @ matrix @ wanted
    total, count = torch.zeros((), dtype=torch.float64), 0
    for weight, anchor in zip(point, start, strict=True):
        free = kept(anchor).to(weight)
        unit = (anchor.square().sum() / free.sum()).sqrt()
        total = total + ((weight - anchor) / unit).square().sum()
        count += int(free.sum())
    return error / signal / 2 + problem.pull / 2 * total / count


@by_metric
@by_family
def test_the_objective_is_that_of_its_docstring(name: str, full: bool | None) -> None:
    problem = problem_of(name, full, pull=0.3)
    start = start_of(problem)
    for point in (problem.point(), moved(problem, 0.1)):
        assert problem.objective(point) == pytest.approx(float(plain(problem, spread(point, start), start)), rel=1e-9)
        assert problem.objective() == problem.objective(point)


@by_metric
@by_family
def test_the_gradient_is_that_of_the_objective(name: str, full: bool | None) -> None:
    """By autograd through the plain loops, every tensor."""
    problem = problem_of(name, full, pull=0.3)
    point, start = moved(problem, 0.1), start_of(problem)
    leaves = [weight.requires_grad_() for weight in spread(point, start)]
    expected = torch.autograd.grad(plain(problem, tuple(leaves), start), leaves)
    value, found = problem.gradient(point)
    assert value == pytest.approx(problem.objective(point), rel=1e-9)
    for slope, wanted, weight in zip(found, expected, start, strict=True):
        apart = slope - wanted[kept(weight)]
        rounding = 1e-10 if name == "opt" else 100 * SINGLE
        assert float(apart.abs().max()) <= rounding * float(wanted.abs().max())


@given(matchings(affine=False))
def test_the_gradient_is_what_finite_differences_say(problem: BlockMatching) -> None:
    """Central differences: their error is h^2 of a third derivative, and a rounding over h."""
    h = 1e-5
    at, towards = moved(problem, 0.1), moved(problem, 0.2)
    direction = tuple(b - a for a, b in zip(at, towards, strict=True))
    value, slope = problem.gradient(at)
    values = [
        problem.objective(tuple(a + sign * h * d for a, d in zip(at, direction, strict=True))) for sign in (1, -1)
    ]
    along = sum(float((one * other).sum()) for one, other in zip(slope, direction, strict=True))
    assert abs((values[0] - values[1]) / (2 * h) - along) <= 1e-6 * (abs(along) + value)


class Mixed(nn.Module):
    """Parameters of one to three dimensions, few zeros and many, and one whose gradient is that of what it joins."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)

        def drawn(*shape: int, zeros: float = 0.0) -> nn.Parameter:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(values * (torch.rand(shape, generator=generator) >= zeros))

        self.matrix, self.shift = drawn(6, 6, zeros=0.1), drawn(5, 6, zeros=0.1)
        self.stack, self.bias = drawn(2, 6, 6, zeros=0.5), drawn(6)

    def forward(self, hidden: Tensor) -> Tensor:
        joined = hidden @ self.matrix.T + self.shift.view(1, 5, 6)
        return joined + torch.einsum("eio,bti->bto", self.stack, hidden).tanh() + self.bias


def test_the_gradient_is_right_however_many_zeros_there_are() -> None:
    block, generator = Mixed(), torch.Generator().manual_seed(9)
    hidden, target = (torch.randn(3, 1, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    start = [weight.detach().clone() for weight in block.parameters()]
    zeros = [int((~kept(weight)).sum()) for weight in start]
    assert 0 < zeros[0] <= 4 and 0 < zeros[1] <= 5 and zeros[2] > 20 and zeros[3] == 0
    problem = BlockMatching.of(block, Listed(tuple(Example((x,), {}, y) for x, y in zip(hidden, target, strict=True))))
    _, found = problem.gradient()
    sizes = target.norm(dim=-1, keepdim=True)
    error = sum(((block(x) - y) / size).square().sum() for x, y, size in zip(hidden, target, sizes, strict=True))
    wanted = torch.autograd.grad(error / 15 / 2, list(block.parameters()))
    for values, expected, weight in zip(found, wanted, start, strict=True):
        mask = kept(weight)
        whole = values.view_as(weight) if len(values) == weight.numel() else torch.zeros_like(weight)
        whole = whole if len(values) == weight.numel() else whole.masked_scatter(mask, values)
        torch.testing.assert_close(whole, expected * mask, rtol=1e-10, atol=1e-14)


def test_a_pull_towards_nothing_is_refused() -> None:
    problem = problem_of("llama", None)
    with pytest.raises(InputError, match="a pull needs its anchor point"):
        replace(problem, pull=0.1)


@by_family
def test_all_parameters_of_a_block_have_a_gradient(name: str) -> None:
    problem = problem_of(name, None)
    _, slope = problem.gradient()
    paths = {path.rpartition(".")[0] for path in problem.names}
    assert set(LAYERS[name]) < paths and len([path for path in paths if "norm" in path]) == 2
    for path, part in zip(problem.names, slope, strict=True):
        # A bias of the keys changes all scores of a token alike, which a softmax does not see.
        if path != "self_attn.k_proj.bias" or name != "opt":
            assert float(part.abs().max()) > 0, path


@by_family
def test_what_was_removed_stays_out_of_every_point_and_is_a_violation(name: str) -> None:
    problem = problem_of(name, None)
    masks = [kept(weight) for weight in start_of(problem)]
    assert sum(not bool(mask.all()) for mask in masks) == len(LAYERS[name])
    for point in (problem.point(), moved(problem, 0.1), problem.gradient()[1]):
        problem.put(point)
        assert problem.violation() == 0
        for values, mask, weight in zip(point, masks, problem.module.parameters(), strict=True):
            assert torch.equal(weight[mask], values) and not bool(weight[~mask].any())
    with torch.no_grad():
        for mask, weight in zip(masks, problem.module.parameters(), strict=True):
            weight[~mask] = 1.0
    assert problem.violation() == sum(int((~mask).sum()) for mask in masks)


@pytest.mark.parametrize("at_once", [2, 3])
def test_draws_go_through_all_examples_once_an_epoch(at_once: int) -> None:
    """Of eight examples the last draw of three has two: each stands for as many as it has."""
    block, calls = damaged_block("llama", torch.float64)
    problem = BlockMatching.of(block, Sequences(calls, at_once))
    point, count = moved(problem, 0.1), len(torch.cat(list(calls.targets)))
    assert problem.examples.draws == -(-count // at_once)
    _, whole = problem.gradient(point)
    orders = []
    for epoch in range(2):
        drawn = [problem.gradient(point, epoch * problem.examples.draws + k) for k in range(problem.examples.draws)]
        sizes = [min(at_once, count - at_once * k) for k in range(problem.examples.draws)]
        for number, slope in enumerate(whole):
            mean = sum(size * found[number] for size, (_, found) in zip(sizes, drawn, strict=True)) / count
            torch.testing.assert_close(mean, slope, rtol=1e-9, atol=1e-14)
        orders.append([value for value, _ in drawn])
    assert orders[0] != orders[1]


def massive(problem: BlockMatching, size: float) -> float:
    """The error where the first token of every example is so many times as large, with its error."""
    linear = nn.Linear(4, 4, bias=False).double()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 1, 9, 4, generator=generator, dtype=torch.float64)
    target = torch.randn(2, 1, 9, 4, generator=generator, dtype=torch.float64)
    hidden[:, :, 0] *= size
    target[:, :, 0] *= size
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
    examples = Listed(tuple(Example((x,), {}, y) for x, y in zip(hidden, target, strict=True)))
    found = BlockMatching.of(linear, examples)
    return found.error()


def test_a_massive_activation_counts_as_any_other_token() -> None:
    errors = [massive(problem_of("llama", None), size) for size in (1.0, 1e3, 1e6)]
    assert all(one == pytest.approx(other, rel=1e-9) for one, other in pairwise(errors))


def test_tokens_that_are_not_weighed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "_root_weights", lambda target: torch.ones_like(target[..., :1]))
    with pytest.raises(AssertionError):
        test_a_massive_activation_counts_as_any_other_token()


def test_a_token_that_answers_nothing_divides_by_nothing() -> None:
    linear, zero = nn.Linear(3, 3).double(), torch.zeros(1, 2, 3, dtype=torch.float64)
    problem = BlockMatching.of(linear, Listed((Example((zero,), {}, zero),)))
    value, slope = problem.gradient()
    assert value == pytest.approx(float(linear.bias.detach().square().sum()), rel=1e-12)
    assert all(bool(torch.isfinite(part).all()) for part in slope)


def test_a_token_that_answers_next_to_nothing_counts_as_the_least_that_is_told_apart() -> None:
    """Its error of 1e-20 is divided by a rounding of the largest token, and not by the 1e-30 that it answers."""
    linear = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
    hidden, target = (torch.tensor([[[1.0, 0.0], [0.0, size]]], dtype=torch.float64) for size in (1e-20, 1e-30))
    problem = BlockMatching.of(linear, Listed((Example((hidden,), {}, target),)))
    assert problem.error() == pytest.approx((1e-20 / 2.0**-52) ** 2, rel=1e-9)


def test_units_are_the_sizes_of_kept_weights() -> None:
    linear = nn.Linear(2, 2).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        linear.bias.zero_()
    problem = BlockMatching.of(linear, Listed(()))
    assert problem.units == pytest.approx((12.5**0.5, 12.5**0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="loses small steps: match a copy of the block in float32"):
        BlockMatching.of(nn.Linear(2, 2).to(dtype), Listed(()))


def test_targets_that_are_no_numbers_are_told() -> None:
    linear, hidden = nn.Linear(2, 2), torch.ones(1, 3, 2)
    with pytest.raises(NumericalError, match="look for damaged weights"):
        BlockMatching.of(linear, Listed((Example((hidden,), {}, hidden * torch.nan),)))


@given(st.booleans().flatmap(lambda affine: matchings(affine=affine)))
def test_the_targets_in_other_units_change_nothing(problem: BlockMatching) -> None:
    """A metric a thousand times as large is the same relative error."""
    if problem.metric is not None:
        larger = replace(problem.metric, average=problem.metric.average * 1000, proved=None)
        other = replace(problem, metric=larger)
        assert other.objective() == pytest.approx(problem.objective(), rel=1e-9)
