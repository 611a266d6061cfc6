"""Runs of a model whose blocks are read one at a time: the same bytes as in memory, and no more than one block."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optprune.errors import InputError
from optprune.models import Decoder, load_model, open_model
from optprune.models.checkpoint import Checkpoint
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.report import BlockFinished, Event, Report
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama, tiny_sliding
from tests.helpers.token_batches import batches
from tests.helpers.weights import weights_of

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fasp": ("fasp", {}),
    "fasp under cross": ("fasp", {"propagation": "cross", "refit.recovery": 1, "refit.held_out": 0.2}),
    "alps under intra": ("alps", {"propagation": "intra"}),
    "sparse_best": ("sparse_best", {"refit.held_out": 0.2}),
    "structured_best": ("structured_best", {"sparsity": 0.3, "allocation.least": 0.1, "allocation.probe_tokens": 50}),
    "N:M with probes": ("sparse_best", {"units.weights": "2:4", "sparsity": 0.4, "allocation.probe_tokens": 50}),
    "whole layers": ("depth", {"sparsity": 0.3, "allocation.parts": "layers", "allocation.score": "influence"}),
    "sub-blocks": ("depth", {"sparsity": 0.3}),
    "recovery": ("spap", {}),
}
CHANGING = ("seconds", "floor_seconds", "phases", "calibration", "model")
"""what two reports of the same run do not share"""


@contextmanager
def one_at_a_time(model: nn.Module, decoder: Decoder) -> Iterator[list[int]]:
    """Whenever a linear layer of a block runs, no other block is in memory."""
    seen: list[int] = []

    def look(index: int) -> Any:
        def hook(*_: Any) -> None:
            there = [i for i, block in enumerate(blocks) if any(not w.is_meta for w in block.parameters())]
            assert there == [index]
            seen.append(index)

        return hook

    blocks = list(decoder.blocks)
    handles = [
        module.register_forward_pre_hook(look(index))
        for index, block in enumerate(blocks)
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def told(report: Report) -> Any:
    def cleared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleared(each) for key, each in value.items() if key not in CHANGING}
        return [cleared(each) for each in value] if isinstance(value, list | tuple) else value

    return cleared(json.loads(report.to_json()))


def check(folder: Path, recipe: Recipe) -> None:
    whole, opened = load_model(folder), open_model(folder)
    expected = prune(whole.model, batches(), recipe)
    with one_at_a_time(opened.model, opened.decoder()) as seen:
        found = prune(opened.model, batches(), recipe, store=opened.store)
    assert set(seen) == set(range(len(expected.blocks)))
    assert told(found) == told(expected)
    assert opened.model.config.to_dict() == whole.model.config.to_dict()
    assert type(opened.model) is type(whole.model)
    left, there = weights_of(whole.decoder()), weights_of(opened.decoder())
    assert there.keys() == left.keys()
    assert all(torch.equal(value.view(torch.uint8), left[name].view(torch.uint8)) for name, value in there.items())


@pytest.mark.e2e
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_bytes_are_those_of_a_run_in_memory(name: str, run: str, tmp_path: Path) -> None:
    TINY_MODELS[name](num_hidden_layers=3).save_pretrained(tmp_path, max_shard_size="200KB")
    recipe, settings = RUNS[run]
    check(tmp_path, load_recipe(recipe, settings))


def test_blocks_whose_masks_differ(tmp_path: Path) -> None:
    tiny_sliding().save_pretrained(tmp_path)
    check(tmp_path, load_recipe("fasp"))


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    check(tmp_path, load_recipe("fasp"))


def test_a_skeleton_without_its_store_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="pass the store that open_model returned with it"):
        prune(open_model(tmp_path).model, batches(), load_recipe("fasp"))


READS = {
    "fasp": ("fasp", {}, 1),
    # The metric forward and backward, the costs with their probes, the run.
    "structured_best": ("structured_best", {"allocation.probe_tokens": 50}, 4),
    # Two removals, each chosen by a pass; the run.
    "sub-blocks": ("depth", {"sparsity": 0.25}, 3),
}


@pytest.mark.parametrize("run", READS)
def test_a_pass_reads_each_block_once(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path)
    recipe, settings, times = READS[run]
    opened, read = open_model(tmp_path), Counter[str]()
    load = Checkpoint.read

    def counted(self: Checkpoint, prefix: str, *arguments: Any) -> Any:
        read[prefix] += 1
        return load(self, prefix, *arguments)

    monkeypatch.setattr(Checkpoint, "read", counted)
    prune(opened.model, batches(), load_recipe(recipe, settings), store=opened.store)
    assert read == {f"model.layers.{index}": times for index in range(4)}


def test_a_run_notices_that_its_model_changes_on_the_disk(tmp_path: Path) -> None:
    """At the same size, when the first of its blocks is done."""
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path)
    opened, file = open_model(tmp_path), tmp_path / "model.safetensors"

    def change(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.block == 0:
            data = bytearray(file.read_bytes())
            data[-4096:] = bytes(4096)
            file.write_bytes(data)

    with pytest.raises(InputError, match=r"^model\.safetensors changed after its header was read"):
        prune(opened.model, batches(), load_recipe("magnitude"), store=opened.store, on_event=change)
