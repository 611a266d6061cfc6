"""Programs: the resolved steps of a run, as one value that checks, plan, progress, executors and the report read."""

from optprune.program.check import check_batches
from optprune.program.method import BlockProgram, Method, Request, Stage
from optprune.program.program import Program
from optprune.program.resolve import resolve
from optprune.program.rounding import rounded_budget
from optprune.program.runtimes import RUNTIMES, Runtime

__all__ = [
    "RUNTIMES",
    "BlockProgram",
    "Method",
    "Program",
    "Request",
    "Runtime",
    "Stage",
    "check_batches",
    "resolve",
    "rounded_budget",
]
