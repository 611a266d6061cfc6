"""Commands in environments that lack something: closed streams, docstrings, memory for threads, open files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optprune.cli.errors import report_error
from optprune.cli.run_folder import keep_or_delete
from optprune.errors import InputError
from optprune.pruning import Journal
from optprune.system.interrupts import forget_done

ROOT = Path(__file__).parents[2]
OPENED = """
import os, subprocess, sys
from optprune.cli.errors import open_standard_streams
assert sys.stderr is None
open_standard_streams()
print("lost", file=sys.stderr, flush=True)
with open(os.devnull) as other:
    assert other.fileno() > 2
subprocess.run([sys.executable, "-c", "import sys; print('lost', file=sys.stderr, flush=True)"], check=True)
print(os.path.samestat(os.fstat(2), os.stat(os.devnull)))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT)


def test_a_closed_stderr_is_opened_for_this_process_and_its_children() -> None:
    """Else the next file would get its number, and all that is printed."""
    done = run("sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, OPENED)
    assert (done.returncode, done.stdout) == (0, "True\n")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-"])
def test_a_command_ends_well_with_a_closed_stream(closed: str) -> None:
    done = run("sh", "-c", f'exec "$0" -m optprune --version {closed}', sys.executable)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [("-m", "optprune", "recipes"), ("-c", "import optprune; optprune.load_model")])
def test_python_without_docstrings_is_refused(words: tuple[str, ...]) -> None:
    done = run(sys.executable, "-OO", *words)
    assert "Python was started without docstrings (-OO or PYTHONOPTIMIZE=2)" in done.stderr.splitlines()[-1]
    assert done.returncode == (2 if words[0] == "-m" else 1)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("can't start new thread"), "error: the memory is not enough; "),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "error: the memory is not enough; "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "error: the memory is not enough; "),
        (OSError(errno.EMFILE, "Too many open files", "x"), "error: x cannot be used: Too many open files: let a"),
        (ZeroDivisionError("mine"), "error: ZeroDivisionError: mine (unexpected: "),
    ],
)
def test_every_end_of_a_run_says_what_is_kept(
    error: Exception, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_done()
    place = tmp_path / "out.run"

    def failing() -> None:
        with keep_or_delete(Journal(place), print) as journal:
            journal.begin({"the blocks": 2})
            journal.write("kept.json", {})
            raise error

    with pytest.raises((InputError, type(error))) as caught:
        failing()
    assert report_error(caught.value) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.endswith(f"0 of 2 blocks are done, and kept in {place}: continue with --resume\n")
    assert said.count(os.fspath(place)) == 1
    forget_done()
