"""--target: what a runtime would not take is refused before any weight is read; what is set for it is told."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from optprune.cli import main
from optprune.export import GgufFile, ModelSource
from optprune.program import Runtime
from tests.helpers.attempts import Attempt
from tests.helpers.gguf_models import BENT, made, saved
from tests.helpers.tiny_models import save_tiny, tiny_llama, tiny_opt

WIDE = 256


@pytest.fixture
def no_weights_opened(monkeypatch: pytest.MonkeyPatch, no_weights: None) -> None:
    """Opening weights is a failure, too."""
    monkeypatch.setattr("optprune.models.open_model", lambda *_, **__: pytest.fail("the weights were opened"))


@pytest.mark.usefixtures("no_weights_opened")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target", "tensorrt"], "--target cannot be 'tensorrt'"),
        (["--target", "vllm", "--recipe", "structured_best"], "as --recipe structured_uniform_best does"),
        (["--target", "vllm"], "heads with fewer value dimensions than key dimensions: prune with --units mlp"),
        (["--target", "transformers", "--recipe", "depth"], "--recipe depth --set allocation.parts=layers"),
    ],
)
def test_what_is_refused_by_prune_and_plan(
    attempt: Attempt, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in attempt.fails(attempt.command(*words, sparsity=0.3))
    assert main(["plan", str(attempt.model), "--no-probe", "--seq-length", "64", "--sparsity", "0.3", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.usefixtures("no_weights_opened")
def test_what_llama_cpp_cannot_read_is_refused(attempt: Attempt, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    attempt.model = save_tiny(tiny_opt(), folder / "opt")
    assert "the target gguf does not take models of the kind opt" in attempt.fails(attempt.command("--target", "gguf"))
    attempt.model = save_tiny(tiny_llama(), folder / "llama")
    file = attempt.model / "tokenizer.json"
    file.write_text(file.read_text().replace('"ByteLevel"', '"Whitespace"', 1))
    assert "the tokenizer splits text by Whitespace" in attempt.fails(attempt.command("--target", "gguf"))


@pytest.mark.usefixtures("no_weights_opened")
@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("gpt_oss", {"swiglu_alpha": 1.4}, "swiglu_alpha 1.4 in place of 1.702"),
        ("gpt_oss", {"rope_parameters": {**BENT, "beta_fast": 16.0}}, "beta_fast"),
        ("lfm2", {"conv_bias": True}, "biases of linear layers, as model.layers.0.conv.in_proj.bias"),
        ("nemotron_h", {"time_step_limit": (0.01, 0.1)}, "a Mamba 2 whose steps are limited to 0.01 to 0.1"),
        ("qwen3_next", {"rms_norm_eps": 1e-5}, "a delta network with an rms_norm_eps of 1e-05"),
        ("gemma2", {"final_logit_softcapping": None}, "a Gemma 2 without soft caps"),
    ],
)
def test_what_the_export_would_refuse_is_refused_before_a_run(
    family: str, fields: dict[str, Any], sentence: str, attempt: Attempt, tmp_path: Path
) -> None:
    """In the same words."""
    attempt.model = saved(made(family, **fields), tmp_path / "model")
    told = attempt.fails(attempt.command("--target", "gguf", "--recipe", "fasp", "--units", "mlp"))
    assert sentence in told
    assert str(GgufFile().unsupported(ModelSource(attempt.model))) in told


def test_a_run_for_vllm(
    attempt: Attempt, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is set is told, and the folder is held to the rules, as a rule that it breaks shows."""
    attempt.model = save_tiny(tiny_llama(intermediate_size=WIDE), tmp_path / "wide")
    real = Runtime.check_folder

    def check(self: Runtime, before: Any, folder: Path) -> None:
        real(self, before, folder)
        monkeypatch.setattr(Runtime, "refuses", lambda *_: "MLPs of 128 units: ask for fewer")
        real(self, before, folder)

    monkeypatch.setattr(Runtime, "check_folder", check)
    assert main(attempt.command("--target", "vllm", "--units", "mlp", "--sparsity", "0.3")) == 2
    told = capsys.readouterr().err
    assert "for the target vllm: MLP widths are multiples of 64" in told
    assert "out, but the target vllm does not take MLPs of 128 units: ask for fewer" in told
    config = AutoConfig.from_pretrained(attempt.output)
    assert config.model_type == "llama" and config.intermediate_size == 128
    assert "multiple: 64" in (attempt.output / "recipe.yaml").read_text()
