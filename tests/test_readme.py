"""The README: its Python examples run as they stand on the demo model, its tables of whole models are the rows'."""

import re
import tempfile
from pathlib import Path

import pytest

from benchmarks.readme import TABLES, put

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # half a gigabyte is written there
        monkeypatch.chdir(folder)
        exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "readme"})
        monkeypatch.undo()
    assert capsys.readouterr().out.strip()


def test_an_objective_takes_less_than_twenty_lines() -> None:
    objective = next(example for example in EXAMPLES if "def most_energy" in example)
    assert len([line for line in objective.splitlines() if line.strip()]) < 20


@pytest.mark.parametrize("number", range(len(TABLES)))
def test_a_table_is_what_the_rows_say(number: int) -> None:
    text = README.read_text(encoding="utf-8")
    # A failure is mended by `python -m benchmarks.readme`, once the sentences beside the table are true too.
    assert put(text, [TABLES[number].markdown()]) == text
