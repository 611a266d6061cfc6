"""A GGUF file of a mixture loses the experts that a pruned folder lost, and nothing else of it changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import optprune
from optprune.allocation.uniform import removed_by_experts
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import GgufExperts, GgufFile, export, save_model
from optprune.export.gguf_experts import matching_rows
from optprune.models import load_model
from optprune.models.gguf import PlainReader
from optprune.recipe import load_recipe
from tests.helpers.gguf_models import PROMPT, apart, expected_of, made, saved
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.short_runs import batches

FAMILIES = (
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe_text"),
    *("qwen3_moe", "qwen3_next"),
)


def mixture(family: str, folder: Path) -> Path:
    return saved(made(family), folder)


def run(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def prune(dense: Path, output: Path, recipe: str = "experts_best", sparsity: float | None = None, **more: Any) -> Path:
    """Three of four experts left in every block, where no sparsity is given."""
    loaded = load_model(dense, device="cpu")
    share = removed_by_experts(loaded.decoder(), 2)[3] if sparsity is None else sparsity
    changes = {"refit.recovery": "none"} if recipe == "experts_best" else {}
    found = load_recipe(recipe, {"sparsity": share, **changes, **more})
    save_model(loaded, output, report=optprune.prune(loaded.model, batches(), found), recipe=found)
    return output


def raw(file: Path) -> dict[str, Any]:
    return {tensor.name: np.array(tensor.data) for tensor in PlainReader(file).tensors}


def left(dense: Path, folder: Path, key: str) -> list[int]:
    """The experts of the dense model that a folder has, by the bytes of one matrix of each: `key` has the number."""
    before, after = load_file(dense / "model.safetensors"), load_file(folder / "model.safetensors")
    matrices = [before[key.format(number)] for number in range(4)]
    return [next(n for n, one in enumerate(matrices) if torch.equal(one, after[key.format(k)])) for k in range(3)]


def test_the_file_of_the_dense_model_is_not_replaced(tmp_path: Path) -> None:
    (original := tmp_path / "dense.gguf").write_bytes(b"GGUF")
    (tmp_path / "link.gguf").symlink_to(original)
    for output in (original, tmp_path / "link.gguf"):
        with pytest.raises(InputError, match=r"would replace the model that is read \(.*dense\.gguf\): name another"):
            export(tmp_path / "pruned", output, GgufExperts(original), overwrite=True)
    assert original.read_bytes() == b"GGUF"


def test_what_stays_is_copied_byte_for_byte(tmp_path: Path) -> None:
    dense = mixture("qwen3_moe", tmp_path / "dense")
    folder = prune(dense, tmp_path / "pruned")
    original = export(dense, tmp_path / "dense.gguf", GgufFile(kind="q4_0")).path
    output = tmp_path / "small.gguf"
    run("export", str(folder), "--original", str(original), "--output", str(output))
    before, after = raw(original), raw(output)
    assert before.keys() == after.keys()
    cut = 0
    for name, numbers in before.items():
        block = name.split(".")[1]
        expected = numbers
        if "_exps." in name or ".ffn_gate_inp." in name:
            kept = left(dense, folder, f"model.layers.{block}.mlp.experts.{{}}.up_proj.weight")
            expected = np.stack([numbers[number] for number in kept])
            cut += 1
        assert after[name].tobytes() == expected.tobytes(), name
    assert cut == 16
    fields = (PlainReader(original).fields, PlainReader(output).fields)
    changed = {name for name in fields[0] if fields[0][name].contents() != fields[1][name].contents()}
    assert fields[0].keys() == fields[1].keys() and changed == {"qwen3moe.expert_count"}
    assert fields[1]["qwen3moe.expert_count"].contents() == 3


@pytest.mark.parametrize("kind", ["f32", "q4_0"])
def test_infinity_in_the_original_is_not_copied(kind: str, tmp_path: Path) -> None:
    dense = mixture("qwen3_moe", tmp_path / "dense")
    folder = prune(dense, tmp_path / "pruned")
    original = export(dense, tmp_path / "dense.gguf", GgufFile(kind=kind)).path
    tensor = next(one for one in PlainReader(original).tensors if one.name == "blk.1.attn_q.weight")
    with original.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.array(np.inf, "<f4" if kind == "f32" else "<f2").tobytes())  # a number, or the scale of a block
    with pytest.raises(InputError, match=r"the tensor blk.1.attn_q.weight of .* holds NaN or infinity"):
        export(folder, tmp_path / "small.gguf", GgufExperts(original))
    assert not (tmp_path / "small.gguf").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_runs_it(family: str, tmp_path: Path) -> None:
    dense = mixture(family, tmp_path / "dense")
    folder = prune(dense, tmp_path / "pruned")
    original = export(dense, tmp_path / "dense.gguf", GgufFile(kind="f32")).path
    written = export(folder, tmp_path / "small.gguf", GgufExperts(original))
    expected, tolerance = expected_of(folder, PROMPT)
    assert apart(written.path, expected, PROMPT) < tolerance


def test_rounded_weights_are_those_that_rounding_the_folder_gives(tmp_path: Path) -> None:
    dense = mixture("qwen3_moe", tmp_path / "dense")
    folder = prune(dense, tmp_path / "pruned")
    original = export(dense, tmp_path / "dense.gguf", GgufFile(kind="q8_0")).path
    copied = export(folder, tmp_path / "copied.gguf", GgufExperts(original)).path
    rounded = export(folder, tmp_path / "rounded.gguf", GgufFile(kind="q8_0")).path
    assert LlamaCpp(copied).log_probabilities(PROMPT) == LlamaCpp(rounded).log_probabilities(PROMPT)


def test_refusals_name_the_reason_and_write_nothing(tmp_path: Path) -> None:
    dense = mixture("qwen3_moe", tmp_path / "dense")
    original = export(dense, tmp_path / "dense.gguf", GgufFile(kind="f16")).path
    narrow = prune(dense, tmp_path / "narrow", "fasp", 0.2)
    folder = prune(dense, tmp_path / "pruned")
    refitted = prune(dense, tmp_path / "refitted", **{"refit.recovery": 1})
    other = export(saved(made("qwen3_moe", hidden_size=32), tmp_path / "o"), tmp_path / "o.gguf", GgufFile()).path
    stranger = export(saved(made("qwen3_moe", seed=1), tmp_path / "s"), tmp_path / "s.gguf", GgufFile()).path
    (tmp_path / "text.gguf").write_text("no model")
    cases = (
        (narrow, original, r"lost more than experts \(model.layers.0"),
        (refitted, original, r"were refitted \(model.layers.0.mlp\).* --set refit.recovery=none"),
        (folder, other, "has embedding_length 32, and the dense model of .* 64"),
        (folder, stranger, "the router of block 0 .* has rows that .* does not have"),
        (folder, tmp_path / "text.gguf", "is not a GGUF file that can be read"),
        (dense, original, "has no report.json"),
    )
    for source, file, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            export(source, tmp_path / "out.gguf", GgufExperts(file))
    assert not (tmp_path / "out.gguf").exists()


def test_rows_are_found_in_their_order_only() -> None:
    dense = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    left = dense[[1, 2, 5]]
    assert matching_rows(left.bfloat16(), dense) is not None
    assert (found := matching_rows(left, dense)) is not None and found.tolist() == [1, 2, 5]
    assert matching_rows(left.flip(0), dense) is None
    assert matching_rows(left * 1.02, dense) is None
    assert matching_rows(left[:, :16], dense) is None
