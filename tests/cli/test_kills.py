"""A run that is killed at any moment goes on, and ends with the bytes of a run that was not."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optprune.cli.app import main
from optprune.texts import demo_articles
from tests.helpers import kills
from tests.helpers.kills import FULL, INTERRUPT, TERMINATE, moments
from tests.helpers.tiny_models import save_tiny, tiny_llama

RUNS = {
    "fasp": ["--recipe", "fasp", "--sparsity", "0.3"],
    "alps under intra": ["--recipe", "alps", "--propagation", "intra"],
    "sparse_best": ["--recipe", "sparse_best"],
    "structured_best": ["--recipe", "structured_best"],
}
QUICK = {("fasp", 0), ("alps under intra", 1), ("sparse_best", 2)}
SEEDS = [
    pytest.param(run, seed, marks=[] if (run, seed) in QUICK else pytest.mark.slow) for run in RUNS for seed in range(5)
]
Command = Callable[[str, str], list[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The words of a run into an output, of a tiny model in two shards, which are read block by block."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(tiny_llama(num_hidden_layers=3), folder / "model")
    (folder / "text.txt").write_text("\n".join(demo_articles("calibration")[:40]))

    def words(run: str, output: str) -> list[str]:
        given = ["prune", str(folder / "model"), "--calibration", str(folder / "text.txt"), "--samples", "4"]
        shards = ["--max-shard-size", "300KB"] if run in ("fasp", "sparse_best") else []
        return [*given, "--seq-length", "32", "--output", str(folder / output), *RUNS[run], *shards]

    return words


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.stem != "report"}


@pytest.fixture(scope="module")
def whole(command: Command) -> Callable[[str], tuple[Path, int]]:
    """The folder of a run that was not stopped, and how many moments it had."""
    done: dict[str, tuple[Path, int]] = {}

    def run(name: str) -> tuple[Path, int]:
        if name not in done:
            words = command(name, f"whole {name}")
            with moments(None) as seen:
                assert main(words) == 0
            done[name] = Path(words[words.index("--output") + 1]), len(seen)
        return done[name]

    return run


@pytest.mark.parametrize(("name", "seed"), SEEDS)
def test_a_killed_run_ends_with_the_same_bytes(name: str, seed: int, command: Command, whole, capsys) -> None:
    expected, count = whole(name)
    moment = random.Random(f"{name} {seed}").randrange(count)
    words = command(name, f"killed {name} {seed}")
    # A run goes on with as many threads as it began with: here, those of this process.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    words_of_it = [sys.executable, "-m", kills.__name__, str(moment), *words]
    killed = subprocess.run(words_of_it, capture_output=True, check=False, env={**os.environ, **threads})
    assert killed.returncode == -9, killed.stderr.decode()
    resumed(words, expected)


@pytest.mark.parametrize(("how", "share"), [(INTERRUPT, 0.4), (INTERRUPT, 0.9), (TERMINATE, 0.7), (FULL, 0.6)])
def test_a_run_that_was_stopped_or_had_no_room_goes_on(how: str, share: float, command: Command, whole, capsys) -> None:
    expected, count = whole("fasp")
    words = command("fasp", f"stopped by {how} at {share}")
    with moments(round(share * count), how):
        assert main(words) == (2 if how == FULL else 130)
    assert "and kept in" in capsys.readouterr().err
    resumed(words, expected)


def resumed(words: list[str], expected: Path) -> None:
    output = Path(words[words.index("--output") + 1])
    if not output.exists():  # the very last moments are after it is there
        assert main([*words, "--resume"]) == 0
    assert contents(output) == contents(expected)
    assert not [path for path in output.parent.iterdir() if path.name.startswith(output.name) and path != output]
    shutil.rmtree(output)
