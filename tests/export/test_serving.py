"""serve-check says what each runtime does with a folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_models import tiny, tiny_llama, tiny_opt
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import Serving, serving
from optprune.models import Decoder, Mlp
from optprune.program import RUNTIMES
from tests.helpers.gguf_models import cut, made
from tests.helpers.mixed_models import narrow
from tests.helpers.tiny_models import save_tiny


def answers(folder: Path) -> dict[str, Serving]:
    return {answer.runtime: answer for answer in serving(folder)}


def uneven(folder: Path, family: str = "llama") -> Path:
    model = tiny_llama() if family == "llama" else tiny(family)
    decoder = Decoder(model)
    narrow(decoder, 0, Mlp(), 40)
    decoder.record_shapes()
    return save_tiny(decoder.joined(), folder)


def test_a_folder_of_the_stock_class_loads_everywhere(tmp_path: Path) -> None:
    found = answers(save_tiny(tiny_llama(), tmp_path / "model"))
    assert list(found) == ["transformers", "transformers-4.57", "vllm", "llama.cpp", "onnxruntime"]
    assert all(answer.loads for answer in found.values())
    assert "trust_remote_code" not in found["transformers"].sentence
    assert found["vllm"].sentence.endswith("pruned models of the kind llama, tried in vLLM 0.32 on a CPU")


def test_uneven_blocks_need_the_code_of_the_folder_and_are_refused_by_vllm(tmp_path: Path) -> None:
    found = answers(uneven(tmp_path / "model"))
    assert "with trust_remote_code=True, because it has blocks of different shapes" in found["transformers"].sentence
    assert found["transformers-4.57"].loads
    assert not found["vllm"].loads and "blocks of different shapes: let all" in found["vllm"].sentence
    assert found["llama.cpp"].loads and found["onnxruntime"].loads


def test_experts_and_families_that_a_runtime_does_not_know(tmp_path: Path) -> None:
    found = answers(save_tiny(cut(made("qwen3_moe"), {}), tmp_path / "moe"))
    assert found["vllm"].loads and found["llama.cpp"].loads and found["transformers-4.57"].loads
    assert not found["onnxruntime"].loads and "each token runs its own experts" in found["onnxruntime"].sentence
    other = answers(uneven(tmp_path / "uneven", "qwen3_moe"))
    assert not other["transformers-4.57"].loads and "experts in other modules" in other["transformers-4.57"].sentence
    olmoe = answers(save_tiny(tiny("olmoe"), tmp_path / "olmoe"))
    assert not olmoe["transformers-4.57"].loads
    assert olmoe["vllm"].sentence.endswith("models of the kind olmoe were not tried in it")
    assert "opt models cannot be" in answers(save_tiny(tiny_opt(), tmp_path / "opt"))["llama.cpp"].sentence


def test_heads_that_all_stay_are_no_matter_to_a_runtime() -> None:
    """Those of a Qwen3 mixture make up more than its hidden size, and experts alone are removed."""
    decoder = Decoder(made("olmoe", num_key_value_heads=2, num_attention_heads=4, hidden_size=64))
    kept = [replace(shape, experts=3) for shape in decoder.shapes()]
    assert RUNTIMES["vllm"].refuses(decoder, kept) is None
    fewer = [replace(shape, kv_heads=1) for shape in kept]
    assert "fewer heads than the hidden size says" in (RUNTIMES["vllm"].refuses(decoder, fewer) or "")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = uneven(tmp_path / "model"), tmp_path / "found.json"
    assert main(["serve-check", str(folder), "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("vllm: no: it does not take blocks of different shapes")
    assert [each["loads"] for each in json.loads(file.read_text())["runtimes"]] == [True, True, False, True, True]
    assert main(["serve-check", str(folder), "--runtime", "llama.cpp"]) == 0
    assert main(["serve-check", str(folder), "--runtime", "vllm"]) == 1
    capsys.readouterr()
    assert main(["serve-check", str(folder), "--runtime", "sglang"]) == 2
    assert "the runtime 'sglang' is unknown: give transformers, " in capsys.readouterr().err
    assert main(["serve-check", str(tmp_path / "none")]) == 2
    with pytest.raises(InputError):
        serving(tmp_path / "none")
