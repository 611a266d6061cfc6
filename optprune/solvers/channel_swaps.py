"""Local search over units: exchange a kept for a dropped one at the exact gain with everything refitted."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from optprune.problems import StructuredLeastSquares
from optprune.solvers.base import Solver, Status, check_options, measuring, unfitted
from optprune.solvers.inverse import EXCHANGE, InverseForm, Tableau, cost_rounding, tableau_flops
from optprune.work import Work, factor, inverse, sweeps

REFRESH = 64
"""exchanges after which the tableau is computed anew, to remove the rounding of its updates"""
USUAL_EXCHANGES = 4
"""the usual number of exchanges that lower the loss after a greedy elimination"""


@dataclass(frozen=True, eq=False)
class ChannelSwapsState:
    """The tableau of the choice, and the best choice so far."""

    form: InverseForm
    start: Tensor
    tableau: Tableau
    """the tableau of A^-1"""
    cost: float
    """f at the refitted weight of the choice, minus f at V0"""
    best: Bool[Tensor, " units"]
    least: float
    """the cost of the best choice"""
    gain: float
    """the least decrease that counts: above rounding, and worth a round"""
    moved: Bool[Tensor, " units"]
    """the units exchanged since the best choice was left"""
    away: int
    """exchanges since then"""
    rounds: int
    finished: bool


@final
@dataclass(frozen=True)
class ChannelSwaps(Solver[StructuredLeastSquares, ChannelSwapsState]):
    r"""In every round make the best exchange of a kept unit p for a dropped unit q of its slot.

    With P the dropped columns, N = (A^-1_PP)^-1, Y = V0_P N, X = N A^-1_PK, H = (A_KK)^-1 and V the refitted weight,
    taking q back gains 1/2 tr(Y_q (N_qq)^-1 Y_q^T), and dropping p afterwards costs 1/2 tr(V'_p (H'_pp)^-1 V'_p^T),

        V'_p = V_p + Y_q (N_qq)^-1 X_qp,   H'_pp = H_pp + X_qp^T (N_qq)^-1 X_qp:

    the exact change of the loss with all other weights refitted. A round compares all pairs of the `candidates`
    cheapest p and most gainful q of every slot. When none gains more than `tolerance` of the loss, up to `depth`
    exchanges are made all the same, the best first and each unit once, to see whether they lead below the best
    choice so far (Kernighan and Lin); if not, that choice is the answer. Monotone: begins with the units of its start.
    Accepts structured problems.

    A round reads from the device twice, and costs a few passes over [in, in] and [out, in] in float64; memory 2 in^2 +
    2 out in.
    Reference: the local search of OSSCAR (arXiv 2403.12983); exact gains by sweeping and the depth are ours.
    """

    accepts = (StructuredLeastSquares,)

    candidates: int = 32
    depth: int = 8
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_options(self, may_be_zero=("depth",))

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        rounds = USUAL_EXCHANGES + self.depth
        each = EXCHANGE + sweeps(12, inputs, inputs) + sweeps(12, outputs, inputs)
        flops = measuring(outputs, inputs, coupled=coupled) + factor(inputs) + inverse(inputs)
        flops += tableau_flops(outputs, inputs) + rounds * each
        return Work(flops, unfitted(outputs, inputs, coupled=coupled))

    def monotone(self, problem: StructuredLeastSquares) -> bool:
        return True

    def init(self, problem: StructuredLeastSquares, start: Tensor) -> ChannelSwapsState:
        form, choice = InverseForm.of(problem.loss), problem.support(start)
        tableau = Tableau.of(problem.channels, form.inverse, form.minimiser, choice)
        least = tableau.cost
        gain = max(self.tolerance * least, cost_rounding(problem.loss))
        still = torch.zeros_like(choice)
        start = problem.within_support(start)
        return ChannelSwapsState(form, start, tableau, least, choice, least, gain, still, 0, 0, False)

    def step(self, problem: StructuredLeastSquares, state: ChannelSwapsState) -> ChannelSwapsState:
        found = state.tableau.best_exchange(self.candidates, state.moved)
        if found is None:
            return replace(state, finished=True)
        lower = state.cost + found.change < state.least - state.gain
        if not lower and state.away >= self.depth:
            return replace(state, finished=True)
        moved = state.moved.clone()
        moved[found.leaving] = moved[found.entering] = True
        tableau, rounds = state.tableau.exchanged(found.leaving, found.entering), state.rounds + 1
        if rounds % REFRESH == 0:
            tableau = Tableau.of(problem.channels, state.form.inverse, state.form.minimiser, tableau.choice)
        cost = tableau.cost
        state = replace(state, tableau=tableau, cost=cost, rounds=rounds)
        if cost < state.least - state.gain:
            return replace(state, best=tableau.choice, least=cost, moved=torch.zeros_like(moved), away=0)
        return replace(state, moved=moved, away=state.away + 1)

    def done(self, problem: StructuredLeastSquares, state: ChannelSwapsState) -> Status | None:
        return Status.CONVERGED if state.finished else None

    def value(self, problem: StructuredLeastSquares, state: ChannelSwapsState) -> Tensor:
        weight = state.form.without(problem.channels.columns[~state.best].reshape(-1)).to(state.start)
        # Where A is singular, or nearly so, the refit is inexact.
        if state.form.notes and problem.objective(weight) > problem.objective(state.start):
            return state.start.clone()
        return weight

    def notes(self, state: ChannelSwapsState) -> tuple[str, ...]:
        return state.form.notes
