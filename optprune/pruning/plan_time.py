"""The time of a run by phase: what a probe of one block took, times the tokens and the blocks."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from optprune.allocation import Depth, MeasuredBudget
from optprune.errors import OptpruneError
from optprune.pruning.block_probe import Pace
from optprune.pruning.plan_memory import RELOADING
from optprune.pruning.workload import Workload

PIECE = 32 * 2**20
"""the bytes that the speed of a disk and of a digest is measured on"""
FRESH = """
import pathlib, time
began = time.perf_counter()
import torch, transformers
from transformers import AutoModelForCausalLM
reloading, status = time.perf_counter() - began, pathlib.Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
held = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
from optprune import pruning, texts
print(held[0] if held else 0, reloading, time.perf_counter() - began)
"""
"""what a process imports that reloads a folder, and then what the command does"""


@dataclass(frozen=True)
class Surroundings:
    """What the machine does beside computing."""

    reload: float
    """the seconds until a fresh process that reloads a folder has imported what it needs"""
    start: float
    """the seconds until the command has"""
    fresh: int
    """the bytes that a process that reloads has for itself, with its imports"""
    write: float
    """the seconds of a byte that is written and made to last"""
    write_file: float
    """the seconds of a small file that is"""
    digest: float
    """the seconds of a byte's digest"""

    @classmethod
    def measured(cls, place: Path | None = None) -> "Surroundings":
        """Measured in about the time of an import; files go to a folder, or where temporary ones go."""
        began = time.perf_counter()
        words = [sys.executable, "-c", FRESH]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        whole = time.perf_counter() - began
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise OptpruneError(f"a fresh process cannot import what a run needs: {reason}")
        fresh, reloading, importing = map(float, run.stdout.split())
        data = os.urandom(PIECE)
        # What others have written a moment ago goes to the disk with the first file that is made to last.
        small = min(_written(data[:1024], place) for _ in range(3))
        large = _written(data, place)
        began = time.perf_counter()
        hashlib.sha256(data).digest()
        digest = (time.perf_counter() - began) / PIECE
        interpreter = whole - importing
        each = max(0.0, large - small) / PIECE
        return cls(interpreter + reloading, whole, round(fresh) or RELOADING, each, small, digest)


def _written(data: bytes, place: Path | None) -> float:
    with tempfile.TemporaryFile(dir=place) as file:
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def seconds_of(
    work: Workload, pace: Pace, around: Surroundings, *, opening: float, tokenising: float, starting: float
) -> dict[str, float]:
    """The seconds of each phase.

    `opening` is what it took to open the model, `tokenising` the text, `starting` to start and import the command.
    """
    scale = sum(work.block_numbers) / work.block_numbers[work.largest]
    model = (work.resident_numbers + sum(work.block_numbers)) * work.itemsize
    return {
        "loading": starting + opening + model * around.digest,
        "tokenising": tokenising,
        "metric": _metric(work, pace, around, scale),
        "budget": _budget(work, pace, around, scale),
        "pruning": _pruning(work, pace, around, scale),
        "saving": scale * (pace.read + pace.forward * work.length)
        + pace.head * work.length
        + (work.pruned_bytes + work.resident_numbers * work.itemsize) * around.write,
        "checking": around.reload + opening + scale * (2 * pace.read + pace.forward * work.length),
    }


def _metric(work: Workload, pace: Pace, around: Surroundings, scale: float) -> float:
    asked = work.recipe.metric
    if asked is None:
        return 0.0
    tokens = work.first_tokens(asked.tokens)
    files = 0.0
    if not work.whole:
        files = 2 * scale * pace.read + work.blocks * tokens * work.hidden * work.itemsize * around.write
    return tokens * (pace.metric_head + scale * pace.metric) + files


def _budget(work: Workload, pace: Pace, around: Surroundings, scale: float) -> float:
    allocator = work.allocator
    if isinstance(allocator, MeasuredBudget):
        # A change goes along from its block to the end; the first block of that is in the costs.
        further = work.probe_changes * (work.blocks - 1) / 2 * work.probe_tokens * pace.forward
        files = 0.0 if work.whole else 2 * (work.blocks - 1) / 2 * work.probe_changes * around.write_file
        # The head makes the dense model's logits once, and did so for the one block that was timed.
        again = (scale - 1) * pace.head * work.probe_tokens if work.probe_changes else 0.0
        return scale * (pace.costs + pace.costs_passes * work.tokens + pace.read + further + files) - again
    if isinstance(allocator, Depth):
        return _depth(work, allocator, pace, scale)
    return 0.0


def _depth(work: Workload, allocator: Depth, pace: Pace, scale: float) -> float:
    tokens = max(1, allocator.tokens // work.length) * min(work.length, allocator.tokens)
    if allocator.score == "influence":
        return 2 * scale * work.tokens * pace.forward
    parts = 2 if allocator.parts == "both" else 1
    candidates, removals = parts * work.blocks, round(allocator.sparsity * parts * work.blocks)
    seconds = 0.0
    for removed in range(removals):
        left = candidates - removed
        # On average a candidate goes through half of the blocks, each of them thinner by now.
        seconds += tokens * left * (pace.head + pace.forward * scale / 2 * (1 - removed / candidates))
        seconds += scale * pace.read
    return seconds


def _pruning(work: Workload, pace: Pace, around: Surroundings, scale: float) -> float:
    asked = [one for one in (work.recipe.recovery, work.recipe.matching) if one is not None]
    fitted = max(map(work.fitted_tokens, asked), default=0)
    kept = work.pruned_bytes / work.blocks * around.write + 2 * around.write_file
    block = pace.fixed + pace.passes * work.tokens + pace.solves + pace.recovery * fitted
    if work.workers == 1:
        return scale * (block + pace.read) + work.blocks * kept
    walk = scale * (pace.forward * work.tokens + pace.read) + work.blocks * kept
    return around.start + max(walk, scale * block / work.workers)
