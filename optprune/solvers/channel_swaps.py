"""Local search over units: exchange a kept for a dropped one at the exact gain with everything refitted."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.patterns import SlotWise
from optprune.problems import Problem, StructuredProblem
from optprune.solvers.base import Solver, check_options
from optprune.solvers.inverse import InverseForm, half_trace, refusal, unit_blocks
from optprune.solvers.solution import Status

REFRESH = 64
"""exchanges after which the tableau, which is updated in place of being computed, is computed anew"""


@dataclass(frozen=True, eq=False)
class ChannelSwapsState:
    """A^-1 swept on the dropped columns P, for the columns of units only, unit by unit; and the best choice so far."""

    form: InverseForm
    start: Tensor
    tableau: Float[Tensor, "n n"]
    """-N = -(A^-1_PP)^-1 on P, X = N A^-1_PK between, and H = (A_KK)^-1 on what is kept"""
    rows: Float[Tensor, "out n"]
    """Y = V0_P N on P, and the refitted V on what is kept"""
    choice: Bool[Tensor, " units"]
    cost: float
    """f at the refitted weight of the choice, minus f at V0"""
    best: Bool[Tensor, " units"]
    least: float
    """the cost of the best choice"""
    gain: float
    """what a lower value must be lower by: more than rounding, and worth a round"""
    moved: Bool[Tensor, " units"]
    """the units exchanged since the best choice was left"""
    away: int
    """exchanges since then"""
    rounds: int
    finished: bool


@final
@dataclass(frozen=True)
class ChannelSwaps(Solver[ChannelSwapsState]):
    r"""In every round make the best exchange of a kept unit p for a dropped unit q of its slot.

    With P the dropped columns, N = (A^-1_PP)^-1, Y = V0_P N, X = N A^-1_PK, H = (A_KK)^-1 and V the refitted weight,
    taking q back gains 1/2 tr(Y_q (N_qq)^-1 Y_q^T), and dropping p afterwards costs 1/2 tr(V'_p (H'_pp)^-1 V'_p^T),

        V'_p = V_p + Y_q (N_qq)^-1 X_qp,   H'_pp = H_pp + X_qp^T (N_qq)^-1 X_qp:

    the exact change of the loss with all other weights refitted. A round looks at all pairs of the `candidates`
    cheapest p and most gainful q of every slot. When none gains more than `tolerance` of the loss, up to `depth`
    exchanges are made all the same, the best first and each unit once, to see whether they lead below the best
    choice so far (Kernighan and Lin); if not, that choice is the answer. Monotone: begins with the units of its start.
    Accepts structured and linked problems.

    A round costs a few passes over [in, in] and [out, in] in float64; memory 2 in^2 + 2 out in.
    Reference: the local search of OSSCAR (arXiv 2403.12983); exact gains by sweeping and the depth are ours.
    """

    candidates: int = 32
    depth: int = 8
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_options(self, may_be_zero=("depth",))

    def why_not(self, problem: Problem) -> str | None:
        return refusal(problem, "exchanges")

    def monotone(self, problem: Problem) -> bool:
        return True

    def init(self, problem: Problem, start: Tensor) -> ChannelSwapsState:
        assert isinstance(problem, StructuredProblem)
        form, choice = InverseForm.of(problem.loss), problem.support(start)
        tableau, rows = _swept(problem, form, choice)
        least = _cost(problem, form, rows, choice)
        rounding = problem.loss.constant * len(form.inverse) * torch.finfo(torch.float64).eps
        gain = max(self.tolerance * least, rounding)
        still = torch.zeros_like(choice)
        start = problem.within_support(start)
        return ChannelSwapsState(form, start, tableau, rows, choice, least, choice, least, gain, still, 0, 0, False)

    def step(self, problem: Problem, state: ChannelSwapsState) -> ChannelSwapsState:
        assert isinstance(problem, StructuredProblem)
        found = _best(problem, state, self.candidates)
        if found is None:
            return replace(state, finished=True)
        lower = state.cost + found.change < state.least - state.gain
        if not lower and state.away >= self.depth:
            return replace(state, finished=True)
        choice, moved = state.choice.clone(), state.moved.clone()
        choice[found.leaving], choice[found.entering] = False, True
        moved[found.leaving] = moved[found.entering] = True
        rounds = state.rounds + 1
        if rounds % REFRESH == 0:
            tableau, rows = _swept(problem, state.form, choice)
        else:
            tableau, rows = _exchange(problem, state, found)
        cost = _cost(problem, state.form, rows, choice)
        state = replace(state, tableau=tableau, rows=rows, choice=choice, cost=cost, rounds=rounds)
        if cost < state.least - state.gain:
            return replace(state, best=choice, least=cost, moved=torch.zeros_like(moved), away=0)
        return replace(state, moved=moved, away=state.away + 1)

    def done(self, problem: Problem, state: ChannelSwapsState) -> Status | None:
        return Status.CONVERGED if state.finished else None

    def value(self, problem: Problem, state: ChannelSwapsState) -> Tensor:
        assert isinstance(problem, StructuredProblem)
        weight = state.form.without(problem.channels.columns[~state.best].reshape(-1)).to(state.start)
        # Where A is singular the refit is one of a slightly different loss.
        if state.form.notes and problem.objective(weight) > problem.objective(state.start):
            return state.start.clone()
        return weight

    def notes(self, state: ChannelSwapsState) -> tuple[str, ...]:
        return state.form.notes


@dataclass(frozen=True, eq=False)
class _Exchange:
    """A kept and a dropped unit that change places, and by how much the loss changes."""

    change: float
    leaving: Int[Tensor, ""]
    entering: Int[Tensor, ""]


def _swept(
    problem: StructuredProblem, form: InverseForm, choice: Bool[Tensor, " units"]
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "out n"]]:
    """The tableau and the rows of a choice, from scratch."""
    columns = problem.channels.columns
    flat = columns.reshape(-1)
    dropped = (~choice).repeat_interleave(columns.shape[1]).nonzero()[:, 0]
    return _sweep(form.inverse[flat[:, None], flat], form.minimiser[:, flat], dropped, 1)


def _sweep(
    tableau: Float[Tensor, "n n"], rows: Float[Tensor, "out n"], pivots: Int[Tensor, " k"], sign: int
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "out n"]]:
    """Take the pivots from the kept to the dropped columns (sign 1) or back (sign -1)."""
    inverse = torch.linalg.inv(tableau[pivots[:, None], pivots])
    across = inverse @ tableau[pivots]
    down = rows[:, pivots] @ inverse
    tableau = torch.addmm(tableau, tableau[:, pivots], across, alpha=-1)
    rows = torch.addmm(rows, rows[:, pivots], across, alpha=-1)
    tableau[pivots] = sign * across
    tableau[:, pivots] = sign * across.T
    tableau[pivots[:, None], pivots] = -inverse
    rows[:, pivots] = sign * down
    return tableau, rows


def _cost(
    problem: StructuredProblem, form: InverseForm, rows: Float[Tensor, "out n"], choice: Bool[Tensor, " units"]
) -> float:
    """1/2 tr(V0_P N V0_P^T)."""
    columns = problem.channels.columns
    dropped = (~choice).repeat_interleave(columns.shape[1])
    return float((form.minimiser[:, columns.reshape(-1)[dropped]] * rows[:, dropped]).sum()) / 2


def _exchange(
    problem: StructuredProblem, state: ChannelSwapsState, found: _Exchange
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "out n"]]:
    """The tableau and the rows after one exchange."""
    inside = torch.arange(problem.channels.columns.shape[1], device=found.leaving.device)
    tableau, rows = _sweep(state.tableau, state.rows, found.entering * len(inside) + inside, -1)
    return _sweep(tableau, rows, found.leaving * len(inside) + inside, 1)


def _best(problem: StructuredProblem, state: ChannelSwapsState, candidates: int) -> _Exchange | None:
    """The best exchange among the candidates of every slot, of units that have not moved; None if there is none."""
    channels, each = problem.channels, problem.channels.columns.shape[1]
    blocks, grams = unit_blocks(state.tableau, state.rows, each)
    # Positive definite on both sides: the tableau holds -N where units are dropped.
    blocks = torch.where(state.choice[:, None, None], blocks, -blocks)
    value = half_trace(blocks, grams)
    shortlist = SlotWise(channels.slots, min(candidates, channels.units // channels.slot_count))
    free = state.choice & ~state.moved, ~state.choice & ~state.moved
    leaving = shortlist.project(torch.where(free[0], -value, -torch.inf)) & free[0]
    entering = shortlist.project(torch.where(free[1], value, -torch.inf)) & free[1]
    p, q = leaving.nonzero()[:, 0], entering.nonzero()[:, 0]
    if p.numel() == 0 or q.numel() == 0:
        return None
    inside = torch.arange(each, device=p.device)
    columns_p, columns_q = (p[:, None] * each + inside).reshape(-1), (q[:, None] * each + inside).reshape(-1)
    across = state.tableau[columns_q[:, None], columns_p].reshape(len(q), each, len(p), each).transpose(1, 2)
    product = (state.rows[:, columns_q].T @ state.rows[:, columns_p]).reshape(len(q), each, len(p), each)
    pulled = torch.linalg.solve(blocks[q][:, None], across)
    mixed = product.transpose(1, 2).transpose(2, 3) @ pulled
    after = blocks[p] + across.transpose(2, 3) @ pulled
    gram = grams[p] + mixed + mixed.transpose(2, 3) + pulled.transpose(2, 3) @ grams[q][:, None] @ pulled
    change = half_trace(after, gram) - value[q][:, None]
    change = torch.where(channels.slots[q][:, None] == channels.slots[p], change, torch.inf)
    best = change.argmin()
    least = float(change.reshape(-1)[best])
    # Candidates of different slots have no exchange between them.
    return None if least == torch.inf else _Exchange(least, p[best % len(p)], q[best // len(p)])
