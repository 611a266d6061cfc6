"""Adam's steps by hand: the first one, and the one after it has gone back."""

import torch

from optprune.solvers import Adam
from optprune.solvers.adam import RATE_DECAY
from tests.helpers.gated_block import gated


def test_the_first_step_moves_every_weight_by_the_rate():
    """Averages that begin at zero are made unbiased: of one gradient m / sqrt(s) is its sign."""
    problem, solver = gated(), Adam()
    before, (_, slope) = problem.point(), problem.gradient(draw=0)
    state = solver.begin(problem)
    rate = solver.rate_at(0, solver.epochs * problem.examples.draws)
    solver.step(problem, state)
    for old, new, unit, part in zip(before, problem.point(), problem.units, slope, strict=True):
        moves = part.abs() * unit > 1e-6
        assert bool(moves.any())
        # The least gradient next to which 1e-12 is nothing.
        assert torch.allclose((new - old)[moves], -rate * unit * part.sign()[moves], rtol=1e-5, atol=0)


def test_after_going_back_the_rate_is_a_third_and_the_average_of_gradients_begins_anew():
    problem, solver = gated(), Adam()
    start, state = problem.point(), solver.begin(problem)
    for _ in range(3):
        solver.step(problem, state)
    state = solver.restart(problem, state, start)
    assert all(bool((a == b).all()) for a, b in zip(problem.point(), start, strict=True))
    squares, (_, slope) = [part.clone() for part in state.square], problem.gradient(draw=3)
    rate = RATE_DECAY * solver.rate_at(3, solver.epochs * problem.examples.draws)
    solver.step(problem, state)
    keep = solver.memory[1]
    for old, new, unit, part, square in zip(start, problem.point(), problem.units, slope, squares, strict=True):
        gradient = part * unit
        size = ((keep * square + (1 - keep) * gradient.square()) / (1 - keep**4)).sqrt()
        moves = size > 1e-6
        assert torch.allclose((new - old)[moves], (-rate * unit * gradient / size)[moves], rtol=1e-5, atol=1e-15)
    # And a third of that the next time.
    assert solver.restart(problem, state, start).rate_scale == RATE_DECAY**2
