"""The disk that a plan tells of while a folder is saved, against the files that are there."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_models import tiny
from optprune.cli import main
from optprune.export import TransformersFolder
from optprune.export.shards import size_of
from optprune.models import Decoder
from optprune.program.memory import DISK, parts_of
from optprune.recipe import load_recipe
from tests.helpers.programs import program_of
from tests.helpers.tiny_models import save_tiny, tiny_llama

LENGTH = 32
HEADER = 300
"""the most bytes that a tensor of a short name takes in the header of its file, with the padding of that"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("max_shard", "linked", "family"),
    [
        ("5GB", False, "llama"),
        ("200KB", True, "llama"),
        ("100KB", False, "llama"),
        ("500KB", False, "mixtral"),  # files of the stock class have other names
        ("500KB", False, "gpt_oss"),  # and tensors of all experts
    ],
)
def test_the_disk_while_saving_is_what_the_files_take(
    max_shard: str, linked: bool, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks in the run folder, and the output, whose shards are links to those where they may be so large."""
    seen, check = dict[int, int](), TransformersFolder.check

    def look(self: TransformersFolder, *given: Any) -> float | None:
        for file in tmp_path.rglob("*.safetensors"):
            if tmp_path / "model" not in file.parents and "logits" not in file.name:
                seen[file.stat().st_ino] = file.stat().st_size
        return check(self, *given)

    monkeypatch.setattr(TransformersFolder, "check", look)
    decoder = Decoder(tiny_llama() if family == "llama" else tiny(family))
    model, text = save_tiny(decoder.model, tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("Prices rose again in March, the office said, and they will not fall before June. " * 40)
    words = ["--recipe", "wanda", "--sparsity", "0.5", "--samples", "4", "--seq-length", str(LENGTH)]
    places = ["--calibration", str(text), "--output", str(tmp_path / "out"), "--max-shard-size", max_shard]
    assert main(["prune", str(model), *words, *places]) == 0
    recipe = load_recipe("wanda", {"sparsity": 0.5})
    program = program_of(recipe, 4, decoder, length=LENGTH, max_shard=size_of(max_shard))
    planned = sum(each.bytes for each in parts_of(program, "saving", 0, 0) if each.where == DISK)
    written = sum(seen.values())
    tensors = len(decoder.model.state_dict())
    assert planned <= written <= planned + HEADER * 2 * tensors
    once = sum(weight.nbytes for weight in decoder.model.parameters())
    assert (planned == once) == linked
