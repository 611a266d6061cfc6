"""The laws of block matching, with random small blocks and a reference for affine ones.

`check_descent` checks a descent on blocks whose output is affine in their parameters, where the problem
is a least squares problem that numpy solves, and on gated blocks with a norm, where it is not convex.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from optprune.metric import OutputMetric
from optprune.problems import BlockMatching, Example, Examples
from optprune.problems.matching import Point, Terms, order
from optprune.solvers import Descent, match
from optprune.testing.strategies import SLOW_OR_NESTED, chosen_device, generator_of, law_settings, to_chosen_device

ROUNDING = 1e-9
"""a share of the error at the start, above the rounding of sums in float64"""


@final
@dataclass(frozen=True, eq=False)
class Listed(Examples):
    """Examples in a list; a draw has `at_once` of them."""

    examples: tuple[Example, ...]
    at_once: int = 1

    @property
    def draws(self) -> int:  # type: ignore[override]
        return -(-len(self.examples) // self.at_once)

    def sums(self, terms: Terms, zeros: Callable[[], Point], draw: int | None = None) -> Point:
        chosen = list(range(len(self.examples)))
        if draw is not None:
            epoch, turn = divmod(draw, self.draws)
            chosen = order(len(chosen), epoch)[turn * self.at_once : (turn + 1) * self.at_once]
        total = zeros()
        for number in chosen:
            for one, more in zip(total, terms(self.examples[number]), strict=True):
                one.add_(more)
        return total


class Gated(nn.Module):
    """A small block: x + down(silu(gate n) * (up n)), n = norm x."""

    def __init__(self, width: int, units: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, units), nn.Linear(width, units), nn.Linear(units, width)
        self.to(device=chosen_device(), dtype=torch.float64)
        _draw(self, generator)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))


@st.composite
def matchings(draw: st.DrawFn, *, affine: bool) -> BlockMatching:
    """Draw a problem in float64 whose block has lost about a third of its weights; targets are dense outputs.

    The first token of each sequence is a hundred times larger: a massive activation.
    """
    generator = generator_of(draw)
    width, out = draw(st.integers(2, 5), label="width"), draw(st.integers(2, 4), label="out")
    block: nn.Module
    if affine:
        block = nn.Linear(width, out, bias=draw(st.booleans(), label="bias")).to(
            device=chosen_device(), dtype=torch.float64
        )
        _draw(block, generator)
    else:
        block, out = Gated(width, out, generator), width
    examples = []
    for _ in range(draw(st.integers(2, 4), label="examples")):
        hidden = torch.randn((1, 3 * width + 4, width), generator=generator, dtype=torch.float64)
        hidden[:, 0] *= 100
        with torch.no_grad():
            examples.append(Example((to_chosen_device(hidden),), {}, block(to_chosen_device(hidden))))
    with torch.no_grad():
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.weight *= to_chosen_device(torch.rand(part.weight.shape, generator=generator) > 1 / 3)
    full = draw(st.sampled_from((None, False, True)), label="metric")
    metric = None
    if full is not None:
        gradients = torch.randn((4 * out, out), generator=generator, dtype=torch.float64)
        metric = OutputMetric.from_samples(to_chosen_device(gradients), full=full)
    pull = draw(st.sampled_from((0.0, 0.01)), label="pull")
    return BlockMatching.of(block, Listed(tuple(examples)), metric, pull)


def affine_optimum(problem: BlockMatching) -> float:
    """Return the least objective of a problem whose block is affine in its parameters, by its Jacobian and an SVD.

    Residuals are S^(1/2) e_t / |y_t|, token by token, and the pull adds rows; the problem's own measures are not used.
    """
    examples = cast(Listed, problem.examples).examples
    start = tuple(weight.detach() for weight in problem.module.parameters())
    free = [np.flatnonzero(_free(weight)) for weight in start]
    root = np.eye(examples[0].target.shape[-1])
    if problem.metric is not None:
        root = np.linalg.cholesky(problem.metric.matrix.cpu().numpy()).T

    def answers(point: Sequence[Tensor]) -> np.ndarray[Any, Any]:
        rows = []
        for example in examples:
            named = dict(zip(problem.names, point, strict=True))
            output = functional_call(problem.module, named, example.args, dict(example.kwargs)).detach()
            sizes = example.target.norm(dim=-1, keepdim=True)
            rows.append((output / sizes).flatten(0, -2).cpu().numpy() @ root.T)
        return np.concatenate(rows).reshape(-1)

    wanted = []
    for example in examples:
        sizes = example.target.norm(dim=-1, keepdim=True)
        wanted.append((example.target / sizes).flatten(0, -2).cpu().numpy() @ root.T)
    target = np.concatenate(wanted).reshape(-1)
    base, columns, ridge = answers(start), [], []
    count = sum(map(len, free))
    for number, entries in enumerate(free):
        kept = start[number].reshape(-1)[to_chosen_device(torch.from_numpy(entries))]
        unit = float(kept.square().mean().sqrt()) if len(entries) else 1.0
        for entry in entries:
            moved = [weight.clone() for weight in start]
            moved[number].view(-1)[entry] += 1
            columns.append(answers(moved) - base)
            ridge.append((problem.pull / count) ** 0.5 / unit)
    if not columns:
        return float(np.square(base - target).sum() / np.square(target).sum() / 2)
    scale = np.square(target).sum() ** 0.5
    rows = np.vstack([np.stack(columns, 1) / scale, np.diag(ridge)])
    right = np.concatenate([(target - base) / scale, np.zeros(len(ridge))])
    change = np.linalg.lstsq(rows, right, rcond=1e-13)[0]
    return float(np.square(rows @ change - right).sum() / 2)


def _free(weight: Tensor) -> np.ndarray[Any, Any]:
    return (weight != 0 if weight.ndim == 2 else torch.ones_like(weight).bool()).reshape(-1).cpu().numpy()


def copied(problem: BlockMatching) -> BlockMatching:
    """Return the same problem with a copy of its block, which a descent may change."""
    return BlockMatching.of(copy.deepcopy(problem.module), problem.examples, problem.metric, problem.pull)


def keeps_the_support(problem: BlockMatching, solver: Descent[Any]) -> None:
    """Check that the zeros of linear layers' weights stay zero, and that no other weight becomes zero."""
    problem = copied(problem)
    before = {name: weight.detach().clone() for name, weight in problem.module.named_parameters()}
    match(problem, solver)
    assert problem.violation() == 0, f"{_named(solver)}: a weight that was removed is back"
    for name, after in problem.module.named_parameters():
        if after.ndim == 2:
            assert torch.equal(before[name] != 0, after != 0), f"{_named(solver)}: other weights of {name} are zero"


def no_worse_than_the_start(problem: BlockMatching, solver: Descent[Any]) -> None:
    """Check that the answer has neither a larger objective than the start nor a larger held-out error."""
    whole = copied(problem)
    before = whole.objective()
    found = match(whole, solver)
    assert whole.objective(found.value) <= before, f"{_named(solver)}: it made its start worse"
    examples = cast(Listed, problem.examples).examples
    apart, fit = Listed(examples[-1:]), copied(problem).on(Listed(examples[:-1]))
    judge = fit.on(apart)
    before = judge.error()
    held = match(fit, solver, apart)
    assert judge.error(held.value) <= before, f"{_named(solver)}: worse on the examples kept apart"
    assert held.held_out == judge.error(held.value), f"{_named(solver)}: the error apart was not measured so"
    assert held.error == fit.error(held.value), f"{_named(solver)}: the error was not measured so"


def leaves_the_value_and_all_else_as_it_was(problem: BlockMatching, solver: Descent[Any]) -> None:
    """Check that the block holds the value, and that anchor, examples and random state are unchanged, bit for bit."""
    problem = copied(problem)
    given = cast(Listed, problem.examples).examples
    kept = [(problem.anchor or ()), *((example.target, *example.args) for example in given)]
    before, state = [[tensor.clone() for tensor in tensors] for tensors in kept], torch.get_rng_state()
    found = match(problem, solver)
    assert all(map(torch.equal, problem.point(), found.value)), f"{_named(solver)}: its block holds something else"
    for tensors, others in zip(kept, before, strict=True):
        assert all(map(torch.equal, tensors, others)), f"{_named(solver)}: it changed the problem"
    assert torch.equal(torch.get_rng_state(), state), f"{_named(solver)}: it touched the global random state"


def repeats_itself(problem: BlockMatching, solver: Descent[Any]) -> None:
    """Check that the same problem gives the same parameters, bit for bit."""
    first, second = match(copied(problem), solver), match(copied(problem), solver)
    assert all(map(torch.equal, first.value, second.value)), f"{_named(solver)}: it gives different answers"


def gains_on_a_damaged_block(problem: BlockMatching, solver: Descent[Any]) -> None:
    """Check that the objective falls where the gradient is not zero by more than rounding."""
    problem = copied(problem)
    value, slope = problem.gradient()
    # By the sizes of the weights, because the problem's own units may have a fault.
    sizes = [
        float(kept.square().mean().sqrt()) if len(kept) else 0.0
        for kept in (weight.detach()[weight != 0] for weight in problem.module.parameters())
    ]
    size = sum(float((part * unit).square().sum()) for part, unit in zip(slope, sizes, strict=True)) ** 0.5
    if size > 1e-3 * value > 0:
        found = match(problem, solver)
        assert problem.objective(found.value) < value * (1 - ROUNDING), f"{_named(solver)}: it gains nothing"


def never_below_the_optimum(problem: BlockMatching, solver: Descent[Any]) -> None:
    """Check that no objective of an affine block is below the optimum, else the problem measures wrongly."""
    problem = copied(problem)
    if isinstance(problem.module, nn.Linear):
        best, slack = affine_optimum(problem), ROUNDING * problem.objective()
        found = problem.objective(match(problem, solver).value)
        assert found >= best - slack, f"{_named(solver)}: its objective {found} is below the optimum {best}"


MATCHING_LAWS: tuple[Callable[[BlockMatching, Descent[Any]], None], ...] = (
    keeps_the_support,
    no_worse_than_the_start,
    leaves_the_value_and_all_else_as_it_was,
    repeats_itself,
    gains_on_a_damaged_block,
    never_below_the_optimum,
)


def check_descent(solver: Descent[Any], *, examples: int = 10) -> None:
    """Raise AssertionError unless a descent keeps every law on small blocks, affine and gated, always the same ones."""

    @law_settings(examples, suppressed=SLOW_OR_NESTED)
    @given(st.booleans().flatmap(lambda affine: matchings(affine=affine)))
    def check(problem: BlockMatching) -> None:
        for law in MATCHING_LAWS:
            law(problem, solver)

    check()


def _named(solver: Descent[Any]) -> str:
    return f"{type(solver).__name__} on block matching"
