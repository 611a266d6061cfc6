"""Try malformed inputs of every kind, and print each fault with the command that makes it again.

usage: python -m tests.helpers.torture [--seeds N ...] [--inputs FROM..TO] [--kinds NAME ...] [--keep]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.torture.kinds import KINDS
from tests.helpers.torture.suite import Suite


def numbers_of(text: str) -> range:
    """The numbers that FROM..TO or N means."""
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
        suite = Suite(asked.keep or Path(place))
        try:
            for seed in asked.seeds:
                began, spent, statuses = time.monotonic(), 0.0, dict[int, int]()
                for number in asked.inputs:
                    # The kind goes by the number, so that one input is the same alone.
                    kinds = list(KINDS)
                    kind = kinds[number % len(kinds)]
                    if asked.kinds and kind not in asked.kinds:
                        continue
                    tried = suite.one(seed, number, kind, keep=asked.keep is not None)
                    statuses[tried.told.status] = statuses.get(tried.told.status, 0) + 1
                    spent += tried.told.seconds
                    if tried.told.seconds > 4:
                        print(f"({kind} {number}: {tried.told.seconds:.1f} s, {tried.told.bytes >> 20} MiB)", flush=True)
                    faulty += bool(tried.faults)
                    if tried.faults or asked.all:
                        print(f"{tried}\n", flush=True)
                seconds = time.monotonic() - began
                print(f"seed {seed}: {sum(statuses.values())} inputs in {seconds:.0f} s ({spent:.0f} s of processor), by exit status {statuses}")
        finally:
            suite.close()
    print(f"{faulty} inputs with faults")
    return min(faulty, 100)


if __name__ == "__main__":
    sys.exit(main())
