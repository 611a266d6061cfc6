"""Environments in which a run has less than it needs: no stream for errors, little memory, few open files."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.torture.judge import FAILED, OF_LIBRARIES, differing
from tests.helpers.torture.runs import contents
from tests.helpers.torture.stock import Stock

CLOSED = "exec 2>&-"
ENVIRONMENTS = {
    "closed stderr": CLOSED,
    "closed streams": "exec <&- >&- 2>&-",
    "10 open files": "ulimit -n 10",
    "16 open files": "ulimit -n 16",
    **{f"{size} MB of addresses": f"ulimit -v {size}000" for size in (150, 300, 600, 900, 1000, 1200, 1500, 1800)},
}
"""what a shell does before the command"""


def faults(stock: Stock, limit: str, folder: Path) -> list[str]:
    """Prune in an environment, then go on outside of it, and look for faults.

    It ends with the right output, or with one sentence and nothing half-written; a run folder that is left is named,
    and `--resume` comes to the right output.
    """
    output, whole = folder / "out", contents(stock.whole / "prune")
    run, words = output.with_name("out.run"), stock.words().prune(output)
    status, err = tried(limit, words, folder)
    left = {path.name for path in folder.iterdir()} - {"out", "out.run"}
    found = [f"it left {name}" for name in sorted(left) if str(folder / name) not in err]
    if status == 0:
        found += [f"{name} is another" for name in sorted(differing(contents(output), whole))]
        return found + (["the run folder is left"] if run.exists() else [])
    sentences = [line for line in err.splitlines() if line.startswith("error: ")]
    found += [f"exit status {status}"] if status != FAILED else []
    found += ["the output is there"] if output.exists() else []
    if "2>&-" not in limit:  # there somebody hears of it
        found += [f"it told {len(sentences)} errors"] if len(sentences) != 1 else []
        found += ["the error was unexpected"] if re.search(r"\(unexpected: |please report", err) else []
        found += [f"it said {said.group()!r}"] if (said := OF_LIBRARIES.search(err)) else []
        found += ["the run folder is not named"] if run.exists() and str(run) not in "".join(sentences) else []
    status, told = tried("true", [*words, *(["--resume"] if run.exists() else [])], folder)
    found += [f"to go on ended with {status}: {told[-300:]}"] if status != 0 else []
    found += (
        [f"{name} is another afterwards" for name in sorted(differing(contents(output), whole))] if status == 0 else []
    )
    return found + err.splitlines()[-3:] if found else []


def tried(limit: str, words: list[str], folder: Path) -> tuple[int, str]:
    """Run a command of optprune in an environment, and return its exit status and what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""}
    shell = ["bash", "-c", f'{limit}; exec "$@"', "bash", sys.executable, "-m", "optprune", *words]
    root = Path(__file__).parents[3]
    done = subprocess.run(shell, capture_output=True, text=True, env=environment, cwd=root, timeout=600, check=False)
    return done.returncode, done.stderr
