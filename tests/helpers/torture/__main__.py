"""Try malformed inputs of every kind, and print each fault with the command that makes it again.

usage: python -m tests.helpers.torture [--seeds N ...] [--inputs FROM..TO] [--kinds NAME ...] [--keep]
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.helpers.torture.kinds import KINDS
from tests.helpers.torture.suite import Suite

SLOW = 4.0
"""the seconds of processor time from which on an input is told of"""


def numbers_of(text: str) -> range:
    """The numbers that FROM..TO, without TO, or N means."""
    first, _, last = text.partition("..")
    return range(int(first), int(last) if last else int(first) + 1)


def main() -> int:
    """The number of faulty inputs, at most 100."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.torture", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--inputs", type=numbers_of, default=range(100), metavar="FROM..TO")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS))
    parser.add_argument("--all", action="store_true", help="print inputs without a fault too")
    parser.add_argument("--keep", type=Path, help="a folder in which the sandboxes stay")
    asked = parser.parse_args()
    faulty = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        suite = Suite(asked.keep or Path(place), keep=asked.keep is not None)
        try:
            for seed in asked.seeds:
                faulty += tried(suite, seed, asked.inputs, asked.kinds, show=asked.all)
        finally:
            suite.close()
    print(f"{faulty} inputs with faults")
    return min(faulty, 100)


def tried(suite: Suite, seed: int, numbers: range, kinds: list[str] | None, show: bool) -> int:
    """Try inputs, print those with faults, or all, and return how many have faults."""
    began, spent, faulty, statuses = time.monotonic(), 0.0, 0, Counter[int]()
    for one in suite.tried(seed, numbers, kinds):
        spent += one.told.seconds
        statuses[one.told.status] += 1
        faulty += bool(one.faults)
        if one.told.seconds > SLOW:
            print(f"({one.kind} {one.number}: {one.told.seconds:.1f} s, {one.told.bytes >> 20} MiB)", flush=True)
        if one.faults or show:
            print(f"{one}\n", flush=True)
    taken = f"{time.monotonic() - began:.0f} s, {spent:.0f} s of them of a processor"
    print(f"seed {seed}: {statuses.total()} inputs in {taken}; by exit status: {dict(statuses)}")
    return faulty


if __name__ == "__main__":
    sys.exit(main())
