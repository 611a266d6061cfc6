"""optprune compare: a table in the terminal and in a folder, exit statuses, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optprune.cli import main
from tests.helpers.two_texts import TwoTexts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TwoTexts:
    return TwoTexts.into(tmp_path_factory.mktemp("texts"))


def command(texts: TwoTexts, output: Path, *more: str, recipes: str = "wanda, magnitude") -> list[str]:
    words = ["compare", str(texts.model), "--recipes", recipes, "--sparsities", "0.4,0.5"]
    words += ["--calibration", str(texts.calibration), "--text", str(texts.text), "--output", str(output)]
    return [*words, "--samples", "8", "--seq-length", "64", "--windows", "3", *more]


def test_a_table_is_told_and_a_second_call_tells_the_same(
    texts: TwoTexts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, record = tmp_path / "out", tmp_path / "found.json"
    asked = command(texts, output, "--units", "weights", "--seeds", "2", "--json", str(record), "--dtype", "float32")
    assert main([*asked, "--set", "damping=0.02"]) == 0
    told, progress = capsys.readouterr()
    lines = told.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["dense", "wanda", "wanda", "magnitude", "magnitude"]
    assert all("±" in line for line in lines[2:6])
    assert lines[-1] == f"{output}: comparison.md, comparison.json, comparison.html"
    assert re.search(r"^wanda at 0.4, seed 1: perplexity [\d.]+, pruned in ", progress, re.MULTILINE)
    data = json.loads(record.read_text())
    written = json.loads((output / "comparison.json").read_text())
    assert data == {"generator": "written by optprune", **written}
    assert data["options"]["the recipes"]["wanda"]["damping"] == 0.02
    assert len(data["cells"]) == 8
    assert main([*asked, "--set", "damping=0.02"]) == 0
    again, progress = capsys.readouterr()
    assert again == told and "pruned in" not in progress
    assert main(asked) == 2
    assert "cannot continue: the recipes.wanda.damping was 0.02 and is 0.01" in capsys.readouterr().err


@pytest.mark.e2e
def test_a_failed_cell_is_an_exit_status(
    texts: TwoTexts, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optprune.report.drawings.can_draw", lambda: False)
    monkeypatch.setattr("optprune.comparison.results.can_draw", lambda: False)
    asked = command(texts, tmp_path / "out", recipes="magnitude,structured_best")
    asked[asked.index("0.4,0.5")] = "0.2,0.7"
    assert main(asked) == 1
    told = capsys.readouterr().out
    assert "failed: structured_best at 0.7, seed 0: a sparsity of 0.7 is out of reach" in told
    assert "<svg" not in (tmp_path / "out" / "comparison.html").read_text()
    assert (
        told.splitlines()[-1]
        == "the page has no picture, which needs matplotlib: run pip install -e '.[plot]' in optprune's checkout"
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--sparsities", "0.2;0.3"], "--sparsities '0.2;0.3' is not a list such as a,b,c: '0.2;0.3' is wrong"),
        (["--recipes", "fasp,,alps"], "--recipes 'fasp,,alps' is not a list such as a,b,c: '' is wrong"),
        (["--seeds", "0"], "--seeds cannot be 0: give 1 to 1000"),
        (["--set", "sparsity=0.3"], "the recipe field 'sparsity' differs between cells"),
        (["--pattern", "2:4"], "2:4 has a sparsity of 0.5, not 0.4"),
        (["--text", "nothing.txt"], "there is no text 'nothing.txt'"),
        (["--windows", "0"], "--windows cannot be 0"),
        (["--seq-length", "9999"], "windows of 9999 tokens are longer than"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_a_sentence_and_nothing_is_written(
    more: list[str], reason: str, texts: TwoTexts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command(texts, tmp_path / "out", "--units", "weights")
    for option, value in zip(more[::2], more[1::2], strict=True):
        if option in asked:
            asked[asked.index(option) + 1] = value
        else:
            asked += [option, value]
    assert main(asked) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_its_help_imports_no_torch() -> None:
    code = "import sys; from optprune.cli import main; main(['compare', '--help']); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--keep-models" in found.stdout
