"""GGUF files on the command line: pruned as a folder of the same weights is, and gone on with as that is."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

from optprune.cli.app import main
from optprune.models import gguf, load_model
from optprune.pruning.journal import Journal
from optprune.texts import demo_articles
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import tiny_llama

TEXT = "text.txt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not stopped, with the file and the text beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / TEXT).write_text("\n".join(demo_articles("calibration")[:40]))
    write_gguf(tiny_llama(), folder / "tiny.gguf", Kind.Q8_0)
    assert main(command(folder, folder / "tiny.gguf", folder / "whole")) == 0
    return folder


def command(folder: Path, model: Path, output: Path) -> list[str]:
    text = ["--calibration", str(folder / TEXT), "--samples", "2", "--seq-length", "32"]
    return ["prune", str(model), *text, "--output", str(output), "--recipe", "fasp"]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_output_is_that_of_the_model_loaded_whole(whole: Path, tmp_path: Path) -> None:
    loaded = load_model(whole / "tiny.gguf")
    loaded.model.save_pretrained(tmp_path / "folder")
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(tmp_path / "folder")
    assert main(command(whole, tmp_path / "folder", tmp_path / "out")) == 0
    assert weights(tmp_path / "out") == weights(whole / "whole")
    assert (tmp_path / "out" / "config.json").read_text() == (whole / "whole" / "config.json").read_text()
    # What was turned goes with the run.
    assert sorted(path.name for path in whole.iterdir()) == [TEXT, "tiny.gguf", "whole"]


def test_a_run_that_goes_on_takes_what_was_turned(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(whole, whole / "tiny.gguf", tmp_path / "out")
    place = tmp_path / "out.run" / "scratch" / gguf.CONVERTED
    with monkeypatch.context() as patch:
        finish = Journal.finish

        def once(*args: Any) -> None:
            finish(*args)
            raise KeyboardInterrupt

        patch.setattr(Journal, "finish", once)
        assert main(words) != 0
    assert len(list(place.glob("*.safetensors"))) == 1
    (place / ".x.0123abcd.part").write_bytes(b"of a run that was killed while it turned the file")
    turned: list[object] = []
    monkeypatch.setattr(gguf, "write_tensors", lambda *args: turned.append(args))
    assert main([*words, "--resume"]) == 0
    assert not turned
    assert weights(tmp_path / "out") == weights(whole / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
