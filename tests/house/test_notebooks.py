"""Every notebook runs from the first cell to the last, and is stored with its outputs.

`make test-e2e` runs one in a fresh kernel, and the cells of the others here, with fewer tokens and steps: a kernel
imports everything anew, and some notebooks compute for a minute. `make test-all` runs each as it is stored.
"""

import os
import warnings
from pathlib import Path

import matplotlib
import nbformat
import pytest
from nbclient import NotebookClient

import optprune
from optprune.models import LoadedModel
from tests.helpers.pages import copied, narrow

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IN_A_KERNEL = "state_it_for_scip"
"""name of the notebook that `make test-e2e` runs as it is stored"""
SMALLER = {
    "bring_your_own_solver": {
        "[:20]": "[:10]",
        "samples=8, seq_length=128": "samples=2, seq_length=64",
        '"query": "5.self_attn.q_proj", "output": "15.self_attn.o_proj", ': "",
        "PerspectiveBound(20)": "PerspectiveBound(2)",
    },
    "compose_an_objective": {
        "[:60]": "[:20]",
        "samples=16, seq_length=256": "samples=4, seq_length=64",
        "1.5 * strength": "4 * strength",
        "damping=0.01": "damping=1.0",
    },
    "how_good_is_a_mask": {
        "[:60]": "[:20]",
        "samples=16, seq_length=256": "samples=4, seq_length=64",
        "range(50)": "range(5)",
        "(0.1, 1.0, 10.0, 100.0, 1e4)": "(1.0,)",
        "enumerate(combinations(range(10), 5))": "enumerate([*combinations(range(10), 5)][::10])",
        "mlp.down_proj": "self_attn.o_proj",
        "(0.1, 0.2, 0.4, 0.6, 0.8)": "(0.2, 0.4)",
    },
    "loss_aware": {
        "[:60]": "[:20]",
        "samples=6, seq_length=256": "samples=6, seq_length=32",
        '"metric.tokens": 768': '"metric.tokens": 96',
        "[:20]), 256, 3)": "[:20]), 64, 2)",
        "COUNT = 3": "COUNT = 1",
    },
    "quickstart": {
        "samples=16, seq_length=128": "samples=4, seq_length=64",
        "seq_length=128, windows=6": "seq_length=64, windows=2",
    },
    "verify_a_solver": {"samples=8, seq_length=128": "samples=4, seq_length=64", "examples=4": "examples=2"},
}
"""replacements in the cells of the other notebooks: fewer tokens, a narrower layer, a better condition"""
ON_A_NARROW_MODEL = {"quickstart"}
"""notebooks that prune a whole model: `make demo` prunes the real one"""


def test_there_is_a_notebook():
    assert NOTEBOOKS


def test_every_other_notebook_can_be_smaller() -> None:
    assert {path.stem for path in NOTEBOOKS} == {IN_A_KERNEL, *SMALLER}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == IN_A_KERNEL else pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel is another process: it must find this tree, and not fight for the cores of a shared machine.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Some versions of Jupyter's kernel warn on Python 3.13 when they start.
    monkeypatch.setenv("PYTHONWARNINGS", "error,ignore:There is no current event loop:DeprecationWarning")
    notebook = nbformat.read(path, as_version=4)
    # CellExecutionError carries the cell and its traceback.
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()


@pytest.mark.e2e
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", SMALLER)
def test_the_cells_of_a_notebook_run(
    name: str, demo: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = narrow(demo) if name in ON_A_NARROW_MODEL else demo
    monkeypatch.setattr(optprune, "load_model", lambda name: copied(loaded), raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for text, smaller in SMALLER[name].items():
        assert any(text in cell for cell in cells), text
        cells = [cell.replace(text, smaller) for cell in cells]
    names = {"__name__": "__main__"}
    with matplotlib.rc_context({"backend": "agg"}), warnings.catch_warnings():
        # A notebook shows a warning below its cell.
        warnings.simplefilter("default")
        for number, cell in enumerate(cells):
            exec(compile(cell, f"{name}, cell {number}", "exec"), names)
        names["plt"].close("all")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any(output.output_type == "stream" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
