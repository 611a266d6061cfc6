"""The benchmark of solvers: benchopt's own tests, and a stranger's solver of one file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from optprune.problems import load_problem
from optprune.testing import reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "extend.md"


def benchopt(*arguments, folder):
    """Run a command of benchopt beside a copy of the benchmark."""
    code = "import sys; from benchopt.cli import benchopt; sys.argv[0] = 'benchopt'; benchopt()"
    command = [sys.executable, "-c", code, *arguments]
    # It calls pytest by its name.
    found = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    return subprocess.run(command, cwd=folder, env=found, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def copied(tmp_path):
    """A copy of the benchmark, with no results."""
    leave = shutil.ignore_patterns("outputs", "__cache__", "__pycache__")
    shutil.copytree(ROOT / "benchmarks" / "layerwise", tmp_path / "layerwise", ignore=leave)
    return tmp_path


@pytest.mark.slow
def test_it_passes_the_tests_of_benchopt(copied):
    done = benchopt("test", "layerwise", "--skip-install", folder=copied)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " failed" not in done.stdout


@pytest.mark.e2e
def test_a_strangers_solver_of_one_file_is_measured_by_the_problem(copied):
    [example] = re.findall(r"```py\n(from benchopt .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (copied / "layerwise" / "solvers" / "largest.py").write_text(example, encoding="utf-8")
    done = benchopt(
        *(
            "run",
            "layerwise",
            "-d",
            "Files[folder=example,file=tiny]",
            "-s",
            "Largest",
            "-s",
            "optprune[solver=chosen]",
        ),
        *("--no-display", "--no-html", "--no-plot", "-r", "1", "--output", "found.parquet"),
        folder=copied,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = pandas.read_parquet(copied / "layerwise" / "outputs" / "found.parquet")
    best = reference(load_problem(copied / "layerwise" / "example" / "tiny.safetensors")).optimum
    last = found.sort_values("stop_val").groupby("solver_name").last()
    assert list(last["objective_violation"]) == [0, 0]
    assert last.loc["optprune[solver=chosen]", "objective_value"] == pytest.approx(best, rel=1e-6)
    assert last.loc["Largest", "objective_value"] >= best * (1 - 1e-9)


def test_the_table_of_the_gallery_has_no_bound_above_a_value():
    known = json.loads((ROOT / "benchmarks" / "results" / "gallery.json").read_text(encoding="utf-8"))
    assert len(known["instances"]) >= 30
    for name, entry in known["instances"].items():
        assert entry["bound"] <= entry["best"] * (1 + 1e-9), name
