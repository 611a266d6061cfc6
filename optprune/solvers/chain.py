"""Chain: several solvers in sequence, each starting from the answer of the previous one."""

import time
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from optprune.errors import InputError, check_kind
from optprune.problems import Problem
from optprune.solvers.base import AnySolver, Certificate, Record, Solver, Status, answer_of, check_is_solver
from optprune.work import Work

DEEPEST = 8
"""the most levels of nested chains; a flat chain does the same"""


def _depth(solver: AnySolver) -> int:
    return 1 + max(map(_depth, solver.stages), default=0) if isinstance(solver, Chain) else 0


@dataclass(frozen=True, eq=False)
class ChainState:
    """The current stage, its state, and the records, notes and bounds of the finished stages."""

    stage: int
    inner: Any
    began: float
    """the start time of the stage"""
    steps: int = 0
    """the steps that the stage has made"""
    records: tuple[Record, ...] = ()
    notes: tuple[str, ...] = ()
    bounds: tuple[Certificate, ...] = ()


@final
@dataclass(frozen=True)
class Chain(Solver[Problem, ChainState]):
    """Run the stages one after another on the same problem; the change to the next stage counts as a step.

    Accepts what every stage accepts. The history has a record of every stage but the last, whose result is the
    Solution. The lower bound is the largest that any stage proved. Exact when the last stage is exact; monotone when
    every stage is. Memory and cost are those of the stages.
    """

    stages: tuple[AnySolver, ...]

    def __post_init__(self) -> None:
        check_kind("the stages of a chain", self.stages, (tuple, list), "give a tuple of solvers, e.g. (Wanda(),)")
        for stage in self.stages:
            check_is_solver(stage)
        if _depth(self) > DEEPEST:
            raise InputError(f"a chain of chains is more than {DEEPEST} deep: write one chain")

    @property
    def label(self) -> str:
        return " > ".join(stage.label for stage in self.stages) or "an empty chain"

    @property
    def cached_bytes(self) -> int:
        return max((stage.cached_bytes for stage in self.stages), default=0)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        return sum((stage.work(outputs, inputs, coupled=coupled) for stage in self.stages), Work())

    def unsupported(self, problem: Problem) -> str | None:
        if not self.stages:
            return "an empty chain has no solver: give at least one"
        reasons = [(stage.label, stage.refusal(problem)) for stage in self.stages]
        return next((f"its stage {label} refuses: {reason}" for label, reason in reasons if reason), None)

    def exact(self, problem: Problem) -> bool:
        return self.stages[-1].exact(problem)

    def monotone(self, problem: Problem) -> bool:
        return self.exact(problem) or all(stage.monotone(problem) for stage in self.stages)

    def init(self, problem: Problem, start: Tensor) -> ChainState:
        began = time.perf_counter()
        return ChainState(0, self.stages[0].init(problem, start), began)

    def step(self, problem: Problem, state: ChainState) -> ChainState:
        solver = self.stages[state.stage]
        if solver.done(problem, state.inner) is None:
            return replace(state, inner=solver.step(problem, state.inner), steps=state.steps + 1)
        value = answer_of(solver, problem, state.inner)
        record = Record(solver.label, state.steps, time.perf_counter() - state.began, problem.objective(value))
        began = time.perf_counter()
        return ChainState(
            state.stage + 1,
            self.stages[state.stage + 1].init(problem, value),
            began,
            records=(*self.history(state), record),
            notes=self.notes(state) + self._unfinished(problem, state),
            bounds=self._bounds(problem, state),
        )

    def done(self, problem: Problem, state: ChainState) -> Status | None:
        return self.stages[-1].done(problem, state.inner) if state.stage + 1 == len(self.stages) else None

    def value(self, problem: Problem, state: ChainState) -> Tensor:
        return self.stages[state.stage].value(problem, state.inner)

    def certify(self, problem: Problem, state: ChainState) -> Certificate | None:
        return max(self._bounds(problem, state), key=lambda bound: bound.lower_bound, default=None)

    def prove(self, problem: Problem, value: Tensor) -> Certificate | None:
        found = (stage.prove(problem, value) for stage in self.stages)
        return max((bound for bound in found if bound is not None), key=lambda bound: bound.lower_bound, default=None)

    def notes(self, state: ChainState) -> tuple[str, ...]:
        return state.notes + self.stages[state.stage].notes(state.inner)

    def history(self, state: ChainState) -> tuple[Record, ...]:
        return state.records + self.stages[state.stage].history(state.inner)

    def _unfinished(self, problem: Problem, state: ChainState) -> tuple[str, ...]:
        """Return a note where a stage stopped for another reason than its own rule."""
        solver = self.stages[state.stage]
        status = solver.done(problem, state.inner)
        return () if status in (None, Status.CONVERGED) else (f"{solver.label}: {status.value}",)

    def _bounds(self, problem: Problem, state: ChainState) -> tuple[Certificate, ...]:
        bound = self.stages[state.stage].certify(problem, state.inner)
        return state.bounds if bound is None else (*state.bounds, bound)
