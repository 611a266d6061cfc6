"""A model with experts in MXFP4 from the shell: one line says that floats are read and saved."""

import json
from pathlib import Path

import pytest

from optprune.cli import main
from tests.helpers.attempts import Attempt
from tests.helpers.packed_experts import packed_folder
from tests.helpers.tiny_models import ALL_MODELS, save_tiny

LINE = "its weights are stored in mxfp4: they are read and saved as floats"


def test_a_plan_and_a_run_say_so_once(attempt: Attempt, tmp_path: Path) -> None:
    mixture = Attempt(packed_folder(tmp_path / "mixture"), attempt.text, tmp_path, attempt.capsys)
    words = ["plan", str(mixture.model), "--recipe", "reap", "--experts", "3", "--samples", "8", "--seq-length", "64"]
    attempt.capsys.readouterr()
    assert main([*words, "--no-probe"]) == 0
    assert attempt.capsys.readouterr().err.count(LINE) == 1
    assert main(mixture.command("--recipe", "reap", "--experts", "3")) == 0
    assert attempt.capsys.readouterr().err.count(LINE) == 1
    config = json.loads((mixture.output / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert main(["audit", str(mixture.output), "--against", str(mixture.model)]) == 0
    assert main(["audit", str(mixture.model)]) == 0


def test_of_floats_nothing_is_said(attempt: Attempt, tmp_path: Path) -> None:
    mixture = Attempt(save_tiny(ALL_MODELS["gpt_oss"](), tmp_path / "m"), attempt.text, tmp_path, attempt.capsys)
    assert main(mixture.command("--recipe", "reap", "--experts", "3")) == 0
    assert "are stored in" not in attempt.capsys.readouterr().err


@pytest.mark.usefixtures("no_weights")
def test_the_runtime_gguf_refuses_fewer_blocks_before_any_weight_is_read(attempt: Attempt, tmp_path: Path) -> None:
    mixture = Attempt(save_tiny(ALL_MODELS["gpt_oss"](), tmp_path / "m"), attempt.text, tmp_path, attempt.capsys)
    depth = ("--recipe", "depth", "--set", "allocation.parts=layers")
    sentence = mixture.fails(mixture.command(*depth, "--target", "gguf"))
    assert "the target gguf sets the attention of a gpt_oss block by the block" in sentence
