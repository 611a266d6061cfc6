"""Promises of the same bytes: each that a page makes has a test, which holds with one thread and with two.

The tests themselves run on one thread, as all do (`OPTPRUNE_THREADS`); here they run again on two, in a process whose
torch has as many from its start.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.pages import ROOT, TEXTS

PROMISES = {
    (
        "README.md",
        "The same command makes a folder again, byte for byte",
    ): "cli/test_cli.py::test_the_same_command_gives_the_same_bytes",
    ("docs/reference/folders.md", "The same command on the same machine gives the same weights, byte for byte"): (
        "cli/test_cli.py::test_the_same_command_gives_the_same_bytes"
    ),
    ("docs/reference/folders.md", "`recipe.yaml` of a folder makes its weights again, byte for byte"): (
        "cli/test_allocation_file.py::test_the_recipe_beside_the_weights_makes_the_folder_again"
    ),
    ("docs/explanation/budgets.md", "The weights are those of a run alone, bit for bit"): (
        "calibration/test_shared_statistics.py::test_costs_of_weights_that_a_probe_scales_are_as_they_were_for_the_next_run"
    ),
    ("docs/explanation/units.md", "are read as floats, block by block, bit for bit as transformers reads them"): (
        "models/test_mxfp4.py::test_a_loaded_model_is_that_of_transformers"
    ),
    ("docs/guide/heal.md", "Every zero and every width stays as it is, bit for bit"): (
        "healing/test_zeros.py::test_zeros_stay_zeros_in_weights_and_momentum[adamw]"
    ),
    ("docs/results/parts.md", "Zeros and widths are those of the pruned model, bit for bit"): (
        "healing/test_heal.py::test_a_pruned_model_is_healed"
    ),
    ("docs/guide/heal.md", "On the same machine it ends with the bytes of an uninterrupted run"): (
        "healing/test_heal.py::test_a_stopped_run_goes_on_to_the_same_bytes"
    ),
    ("docs/guide/large.md", "The weights are those of a run in memory, bit for bit"): (
        "pruning/test_streaming.py::test_the_bytes_are_those_of_a_run_in_memory[llama-sparse_best]"
    ),
    ("docs/guide/large.md", "The bytes are those of a run that was not stopped"): (
        "pruning/test_journal.py::test_a_stopped_run_ends_with_the_same_bytes[fasp-layer]"
    ),
    ("docs/guide/large.md", "The weights are those of a run without workers, bit for bit"): (
        "pruning/test_workers.py::test_the_bytes_and_the_report_are_those_of_a_serial_run[llama-dense-metric]"
    ),
    ("docs/guide/large.md", "the bytes are those of | |"): (
        "pruning/test_workers.py::test_the_bytes_and_the_report_are_those_of_a_serial_run[llama-dense-metric]"
    ),
    ("docs/guide/large.md", "The bytes of the result are the same for all of them"): (
        "pruning/test_states.py::test_every_policy_gives_the_same_bytes_from_a_file[llama-cross]"
    ),
    ("docs/reference/cli.md", "Runs with the same number give the same bytes"): (
        "pruning/test_shared_batches.py::test_processes_give_the_bytes_of_one_process_with_as_many_partial_sums[fasp]"
    ),
    ("docs/guide/large.md", "`--lanes 4` in one process gives the same bytes"): (
        "pruning/test_shared_batches.py::test_processes_give_the_bytes_of_one_process_with_as_many_partial_sums[fasp]"
    ),
    ("docs/guide/export.md", "the other tensors and the vocabulary are copied byte for byte"): (
        "export/test_gguf_experts.py::test_what_stays_is_copied_byte_for_byte"
    ),
    (
        "docs/explanation/large.md",
        "come back bit for bit",
    ): "pruning/test_half_precision.py::test_what_is_not_pruned_is_not_touched",
    ("docs/guide/layer.md", "So a loop over layers prunes as `prune` does, bit for bit"): (
        "pruning/test_one_layer.py::test_a_loop_of_ones_own_prunes_as_prune_does[cross]"
    ),
    ("docs/guide/report.md", "The same report gives the same bytes"): (
        "report/test_page.py::test_the_same_report_gives_the_same_bytes_whatever_matplotlib_is_set_to"
    ),
}
"""the test of every promise, by the page and its words"""
SAID = re.compile(r"bit for bit|byte for byte|same bytes|the bytes (?:of the result|of one that|are)", re.IGNORECASE)


def plain(page: str) -> str:
    """The text of a page on one line, its links by their words."""
    return " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", TEXTS[page]).split())


def test_every_promise_of_a_page_has_a_test() -> None:
    for page in TEXTS:
        text = plain(page)
        promised = [words for name, words in PROMISES if name == page]
        assert all(words in text for words in promised), page
        for words in promised:
            text = text.replace(words, "")
        assert SAID.findall(text) == [], page


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2])
def test_the_promises_hold_with_so_many_threads(threads: int) -> None:
    names = [f"tests/{name}" for name in dict.fromkeys(PROMISES.values())]
    # Threads that wait let the core go: on a shared machine they would wait for each other's.
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    environment = {**os.environ, **passive, "OPTPRUNE_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *names]
    run = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert re.search(rf"^{len(names)} passed", run.stdout, re.MULTILINE), run.stdout[-300:]
