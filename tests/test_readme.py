"""The README's Python examples run as they stand, on the demo model."""

import re
from pathlib import Path

import pytest

EXAMPLES = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_an_objective_takes_less_than_twenty_lines() -> None:
    objective = next(example for example in EXAMPLES if "def most_energy" in example)
    assert len([line for line in objective.splitlines() if line.strip()]) < 20
