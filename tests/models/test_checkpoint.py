"""Weights are read from safetensors in the model's own folder, and from nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from optprune.errors import InputError
from optprune.models import load_model
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import save_tiny, tiny_llama

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    save_tiny(tiny_llama(), folder)
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="200KB")
    assert (folder / INDEX).is_file()
    return folder


def with_shard(folder: Path, name: Any) -> None:
    """Rename the first shard in the index."""
    index = json.loads((folder / INDEX).read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


class Code:
    """Pickle that would leave a file behind if it were run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        pytest.fail("pickle was read")

    monkeypatch.setattr(torch, "load", read)


def test_an_index_that_names_pickle(sharded: Path, tmp_path: Path) -> None:
    torch.save({"lm_head.weight": Code(tmp_path / "ran")}, sharded / "pytorch_model.bin")
    with_shard(sharded, "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"'pytorch_model.bin' for weights, but only safetensors in the folder itself"
    ) as told:
        load_model(sharded)
    assert "weights_only" not in str(told.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "ABSOLUTE", "sub/../../model.safetensors", "model.pt", "", 3, None, ["a.safetensors"]],
)
def test_an_index_that_names_something_else(sharded: Path, name: Any) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "model.safetensors")
    with_shard(sharded, str(sharded.parent / "model.safetensors") if name == "ABSOLUTE" else name)
    with pytest.raises(
        InputError, match=f"{INDEX} of .* names .* for weights, but only safetensors in the folder itself"
    ):
        load_model(sharded)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', "{", '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    with pytest.raises(InputError, match=f"{INDEX} of ") as told:
        load_model(sharded)
    assert len(str(told.value)) < 600


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["adapter_model.bin", "model.safetensors", 1])
def test_weights_that_the_config_names(attempt: Attempt, name: Any) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    file = attempt.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "transformers_weights": name}))
    sentence = attempt.fails(attempt.command())
    assert f"the config of {attempt.model} names its weights (transformers_weights {name!r})" in sentence


def test_weights_that_are_pickle_by_another_name(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    torch.save({"lm_head.weight": Code(tmp_path / "ran")}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"the weights of .* cannot be loaded") as told:
        load_model(folder)
    assert "weights_only" not in str(told.value)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def cached(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the sharded model as in the hub's cache: links to files that are named by their hashes."""
    cache = tmp_path / "hub"
    commit = "0" * 40
    snapshot, blobs = cache / "models--someone--tiny" / "snapshots" / commit, cache / "models--someone--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (cache / "models--someone--tiny" / "refs").mkdir()
    (cache / "models--someone--tiny" / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_the_links_of_the_hubs_cache(cached: Path) -> None:
    for source in (cached, "someone/tiny"):
        weights = load_model(source).model.state_dict()
        for name, weight in tiny_llama().state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)


def test_an_index_of_the_hub_that_names_pickle(cached: Path) -> None:
    torch.save({}, cached / "pytorch_model.bin")
    blob = (cached / INDEX).resolve()
    index = blob.read_text()
    blob.write_text(index.replace("model-00001-of-00003.safetensors", "pytorch_model.bin"))
    with pytest.raises(InputError, match=r"of someone/tiny names 'pytorch_model.bin' for weights"):
        load_model("someone/tiny")
