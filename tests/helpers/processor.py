"""Seconds of the processor that tests take, their child processes included: the unit of the budget of `make test`.

`python -m tests.helpers.processor TEST.json E2E.json` makes the table benchmarks/results/tests.md from the files that
`OPTPRUNE_TEST_SECONDS=TEST.json make test` and `OPTPRUNE_TEST_SECONDS=E2E.json make test-e2e` write.
"""

import json
import os
import platform
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FILE = "OPTPRUNE_TEST_SECONDS"
"""variable of the environment that names the file to write, in JSON: the seconds of each test"""
MOST = 15
"""number of tests that are listed"""
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "tests.md"


def _now() -> float:
    """Return the seconds that this process and its children that have ended have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass
class ProcessorTime:
    """Plugin of pytest: the process that runs a test adds its seconds to its reports, the one that prints sums them."""

    last: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        self.last = _now()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = _now()
        report.processor, self.last = now - self.last, now
        return report

    def pytest_runtest_logreport(self, report):
        # A worker that crashed has no seconds.
        self.seconds[report.nodeid] += getattr(report, "processor", 0.0)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("seconds of the processor")
        for name, seconds in self.seconds.most_common(MOST):
            terminalreporter.write_line(f"{seconds:8.2f} {name}")
        terminalreporter.write_line(f"{self.seconds.total():8.2f} in all, without imports")
        if os.environ.get(FILE):
            rounded = {name: round(seconds, 2) for name, seconds in sorted(self.seconds.items())}
            Path(os.environ[FILE]).write_text(json.dumps(rounded, indent=0), encoding="utf-8")


def machine() -> str:
    """Return the processor, the number of cores and the version of Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def table(runs: dict[str, dict[str, float]]) -> str:
    """Return a page with the tests and seconds of each folder and file, and the slowest tests, of several runs."""
    lines = [
        "# Durations of the tests",
        "",
        f"Seconds of the processor, child processes included, on {machine()}.",
        "Made by `python -m tests.helpers.processor` (see CONTRIBUTING.md).",
        "",
        "| file | " + " | ".join(f"tests of `{run}` | seconds" for run in runs) + " |",
        "|---|" + "--:|--:|" * len(runs),
    ]
    sums: dict[str, dict[str, list[float]]] = {}
    for run, seconds in runs.items():
        for name, spent in seconds.items():
            for place in ("all", name.split("::")[0].removeprefix("tests/")):
                sums.setdefault(place, {each: [] for each in runs})[run].append(spent)
    for place, spent in sorted(sums.items(), key=lambda entry: -sum(map(sum, entry[1].values()))):
        cells = " | ".join(f"{len(spent[run])} | {sum(spent[run]):.1f}" for run in runs)
        lines.append(f"| {place} | {cells} |")
    for run, seconds in runs.items():
        lines += ["", f"The slowest tests of `{run}`:", "", "| seconds | test |", "|--:|---|"]
        lines += [
            f"| {spent:.1f} | `{name.removeprefix('tests/')}` |" for name, spent in Counter(seconds).most_common(40)
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    files = dict(zip(("make test", "make test-e2e"), map(Path, sys.argv[1:]), strict=True))
    TABLE.write_text(table({run: json.loads(file.read_text(encoding="utf-8")) for run, file in files.items()}))
