"""The basis that value dimensions are removed in: optimal for one head, and never worse than where it begins."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor

from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.problems import Channels, LayerLoss, StructuredLeastSquares
from optprune.solvers import GreedyObs, best_basis, nested_basis, solve
from optprune.solvers import value_basis as module

OUT = 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_head(seed: int, size: int = 6, damping: float = 0.01) -> LayerLoss:
    inputs = draw(50, size, seed=seed) @ draw(size, size, seed=seed + 100)
    return LayerLoss.of(draw(OUT, size, seed=seed + 200), InputMoments.from_samples(inputs), damping)


def heads(seed: int, slots: int = 2, size: int = 4, tied: int = 2, rest: int = 0) -> tuple[LayerLoss, Channels]:
    """Value dimensions of `slots` KV heads that `tied` query heads read, with inputs that go together."""
    width = slots * size * tied + rest
    inputs = draw(80, width, seed=seed) @ (torch.eye(width) + 0.4 * draw(width, width, seed=seed + 1))
    loss = LayerLoss.of(draw(OUT, width, seed=seed + 2), InputMoments.from_samples(inputs), 0.01)
    unit = torch.arange(slots * size)
    slot = unit // size
    columns = (slot[:, None] * tied + torch.arange(tied)) * size + (unit % size)[:, None]
    return loss, Channels(columns, slot)


def least(loss: LayerLoss, columns: list[Tensor], directions: list[np.ndarray], rest: Tensor) -> float:
    """The least loss of weights V_h = Z_h W^T, by numpy from the definition; columns of no unit are free."""
    gram, target = loss.gram.numpy(), loss.target.numpy()
    width = len(gram)
    parts = [np.eye(width)[:, rest.numpy()]]
    for group, basis in zip(columns, directions, strict=True):
        parts += [np.eye(width)[:, head.numpy()] @ basis for head in group.T]
    spread = np.concatenate(parts, 1)
    fitted = target @ spread @ np.linalg.pinv(spread.T @ gram @ spread)
    return loss.value(torch.from_numpy(fitted @ spread.T))


def by_coordinates(loss: LayerLoss, channels: Channels, keep: int) -> float:
    return solve(StructuredLeastSquares(loss, channels, keep * channels.slot_count), GreedyObs()).objective


def in_basis(loss: LayerLoss, channels: Channels, directions: Tensor) -> float:
    used = torch.zeros(len(loss.gram), dtype=torch.bool)
    used[channels.columns] = True
    columns = [channels.columns[units] for units in channels.by_slot]
    return least(loss, columns, [part.numpy() for part in directions], (~used).nonzero()[:, 0])


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("keep", [1, 3, 5])
def test_one_head_loses_what_eckart_and_young_say(keep: int, metric: bool) -> None:
    """The least over all weights of that rank: the singular values of S^(1/2) W A^(1/2) that are left."""
    loss = one_head(keep)
    root = np.eye(OUT)
    if metric:
        weigh = OutputMetric.from_samples(draw(20, OUT, seed=9), full=True).damped(0.01)
        loss = LayerLoss(loss.weight, loss.moments, loss.damping, metric=weigh)
        root = np.real(scipy.linalg.sqrtm(weigh.matrix.numpy()))
    values = np.linalg.svd(
        root @ loss.weight.numpy() @ np.real(scipy.linalg.sqrtm(loss.gram.numpy())), compute_uv=False
    )
    optimum = float((values[keep:] ** 2).sum()) / 2
    channels = Channels.of(6)
    for rotation in (nested_basis(loss, channels), best_basis(loss, channels, keep)):
        found = in_basis(loss, channels, rotation.matrices[:, :, :keep])
        assert found == pytest.approx(optimum, rel=1e-9, abs=1e-12 * loss.constant)


def test_the_nested_basis_is_nested() -> None:
    """One basis serves every count, with one head: the first of it are the best of that rank."""
    loss, channels = one_head(3), Channels.of(6)
    matrix = nested_basis(loss, channels).matrices
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(6, dtype=torch.float64)[None])
    losses = [in_basis(loss, channels, matrix[:, :, :keep]) for keep in range(1, 7)]
    best = [in_basis(loss, channels, best_basis(loss, channels, keep).matrices[:, :, :keep]) for keep in range(1, 7)]
    assert losses == pytest.approx(best, rel=1e-9, abs=1e-12 * loss.constant)


@pytest.mark.parametrize("seed", range(6))
def test_several_heads_lose_less_by_alternation(seed: int) -> None:
    loss, channels = heads(seed, rest=seed % 2)
    keep = 2
    begun = in_basis(loss, channels, nested_basis(loss, channels).matrices[:, :, :keep])
    turned = in_basis(loss, channels, best_basis(loss, channels, keep).matrices[:, :, :keep])
    assert turned < begun * (1 - 1e-6)
    assert turned < by_coordinates(loss, channels, keep)


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(3))
def test_rounds_come_near_the_best_directions_there_are(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction of three in one slot of two heads: all of them are tried, on a sphere."""
    loss, channels = heads(seed, slots=1, size=3, tied=2)

    def lost(angles: np.ndarray) -> float:
        one, other = angles
        direction = np.array([np.cos(one), np.sin(one) * np.cos(other), np.sin(one) * np.sin(other)])
        return in_basis(loss, channels, torch.from_numpy(direction[None, :, None]))

    starts = [(one, other) for one in np.linspace(0, np.pi, 5) for other in np.linspace(0, np.pi, 5)]
    best = min(scipy.optimize.minimize(lost, start, method="Nelder-Mead").fun for start in starts)
    baseline = by_coordinates(loss, channels, 1)
    monkeypatch.setattr(module, "MOST_SEARCHED", 0)
    for rounds, share in ((module.ROUNDS, 0.75), (200, 0.999)):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        found = in_basis(loss, channels, best_basis(loss, channels, 1).matrices[:, :, :1])
        assert found >= best * (1 - 1e-6)
        assert baseline - found >= share * (baseline - best)


def test_a_round_with_steps_enough_solves_for_the_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The normal equations of W for the Z that was fitted, by numpy: conjugate gradients have a step an unknown."""
    loss, channels = heads(7, slots=2, size=3, tied=2)
    problem = module._SlotProblem(loss, channels)
    directions = module._leading(problem)[..., :2]
    fitted = problem.fitted(directions)

    def weight(change: Tensor) -> Tensor:
        return torch.einsum("ohk,hik->ohi", fitted, change.repeat_interleave(2, 0)).flatten(1)

    units = torch.eye(directions.numel(), dtype=torch.float64).reshape(-1, *directions.shape)
    columns = torch.stack([weight(unit) for unit in units])
    system = torch.einsum("aoi,ij,boj->ab", columns, problem.gram, columns)
    right = torch.einsum("aoi,oi->a", columns, problem.target)
    exact = torch.from_numpy(np.linalg.solve(system.numpy(), right.numpy())).reshape(directions.shape)
    monkeypatch.setattr(module, "STEPS", directions.numel())
    torch.testing.assert_close(problem.alternate(directions), exact, rtol=1e-6, atol=1e-8)


def test_no_round_raises_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, channels = heads(11, slots=3, size=5, tied=3)
    monkeypatch.setattr(module, "MOST_SEARCHED", 0)
    losses = []
    for rounds in range(6):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        losses.append(in_basis(loss, channels, best_basis(loss, channels, 2).matrices[:, :, :2]))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("tied", [1, 2])
def test_the_gradient_of_the_gain_is_that_of_finite_differences(tied: int) -> None:
    """The gain, by NumPy from the definition, at directions that are not orthonormal."""
    loss, channels = heads(5, slots=2, size=4, tied=tied)
    problem = module._SlotProblem(loss, channels)
    directions = draw(2, 4, 2, seed=3)
    gain, gradient = problem.gain(directions)
    assert float(gain) == pytest.approx(loss.constant / 2 - in_basis(loss, channels, directions), rel=1e-9)
    step = 1e-5
    for place in np.ndindex(2, 4, 2):
        change = torch.zeros_like(directions)
        change[place] = step
        rise = in_basis(loss, channels, directions - change) - in_basis(loss, channels, directions + change)
        assert float(gradient[place]) == pytest.approx(rise / (2 * step), rel=1e-5, abs=1e-6 * loss.constant)


def test_a_search_never_loses_what_alternation_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every descent ends at once."""
    monkeypatch.setattr(module.linalg, "descended", lambda _, start: start)
    for seed in range(4):
        loss, channels = heads(seed)
        found = in_basis(loss, channels, best_basis(loss, channels, 2).matrices[:, :, :2])
        with monkeypatch.context() as without:
            without.setattr(module, "MOST_SEARCHED", 0)
            alternated = in_basis(loss, channels, best_basis(loss, channels, 2).matrices[:, :, :2])
        assert found <= alternated * (1 + 1e-9)


@pytest.mark.parametrize("case", ["no inputs", "a slot without inputs", "few tokens", "no damping", "zero weight"])
def test_degenerate_layers_get_an_orthogonal_basis_all_the_same(case: str) -> None:
    loss, channels = heads(4)
    width = len(loss.gram)
    inputs = draw(80, width, seed=1)
    if case == "no inputs":
        inputs = torch.zeros_like(inputs)
    if case == "a slot without inputs":
        inputs[:, channels.columns[channels.by_slot[0]].reshape(-1)] = 0
    if case == "few tokens":
        inputs = inputs[:2]
    weight = torch.zeros_like(loss.weight) if case == "zero weight" else loss.weight
    damping = 0.0 if case in ("no damping", "few tokens") else 0.01
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), damping)
    for rotation in (nested_basis(loss, channels), best_basis(loss, channels, 2)):
        product = rotation.matrices.mT @ rotation.matrices
        torch.testing.assert_close(product, torch.eye(4, dtype=torch.float64).expand_as(product))
