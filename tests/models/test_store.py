"""Models read block by block: the same weights, shapes, logits and errors as a model in memory."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optprune.errors import InputError
from optprune.export.shards import Content
from optprune.models import LoadedModel, load_model, open_model
from optprune.models.store import BlockStore, ShardSink
from optprune.report import model_patterns
from tests.helpers.mixed_models import mixed
from tests.helpers.tiny_models import TINY_MODELS, save_tiny, tiny_llama, tiny_opt, tiny_sliding
from tests.helpers.weights import weights_of

MAKERS = {
    **TINY_MODELS,
    "sliding": tiny_sliding,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "bfloat16": lambda: tiny_llama().to(torch.bfloat16),
    "mixed llama": lambda: mixed(tiny_llama(num_hidden_layers=4)),
    "mixed opt": lambda: mixed(tiny_opt(num_hidden_layers=4)),
}
IDS = torch.arange(24).reshape(2, 12)
FIRST = "model.layers.0.mlp.down_proj.weight"


def store_of(loaded: LoadedModel) -> BlockStore:
    assert loaded.store is not None
    return loaded.store


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad(), loaded.decoder().running():
        return loaded.model(IDS).logits


def in_memory(model: nn.Module) -> int:
    return sum(not weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize("shard", ["200KB", "5GB"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_model_that_is_loaded_whole(name: str, shard: str, tmp_path: Path) -> None:
    MAKERS[name]().save_pretrained(tmp_path, max_shard_size=shard)
    whole, opened = both = load_model(tmp_path), open_model(tmp_path)
    assert torch.equal(logits(opened), logits(whole))
    assert type(opened.model) is type(whole.model)
    assert opened.model.config.to_dict() == whole.model.config.to_dict()
    assert not opened.model.training
    tied = [each.model.get_output_embeddings().weight is each.model.get_input_embeddings().weight for each in both]
    assert tied[0] == tied[1]
    decoder = opened.decoder()
    assert all(weight.is_meta for weight in decoder.blocks.parameters())
    assert decoder.shapes() == whole.decoder().shapes()
    assert model_patterns(decoder) == model_patterns(whole.decoder())
    expected, found = weights_of(whole.decoder()), weights_of(decoder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) and value.dtype == expected[key].dtype for key, value in found.items())
    assert all(torch.equal(a, b) for a, b in zip(opened.model.buffers(), whole.model.buffers(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_another_dtype(dtype: str, tmp_path: Path) -> None:
    tiny_opt().save_pretrained(tmp_path)
    assert torch.equal(logits(open_model(tmp_path, dtype=dtype)), logits(load_model(tmp_path, dtype=dtype)))


def test_a_folder_of_the_model_without_its_head(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    named = {name.removeprefix("model."): value for name, value in load_file(tmp_path / "model.safetensors").items()}
    named["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # of an older transformers
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(open_model(tmp_path)), logits(load_model(tmp_path)))


def test_values_of_a_folder_are_read_with_one_block_in_memory(tmp_path: Path) -> None:
    save_tiny(tiny_llama(num_hidden_layers=3), tmp_path / "model")
    decoder = open_model(tmp_path / "model").decoder()
    content = Content.of(decoder)
    held = [sum(in_memory(block) > 0 for block in decoder.blocks) for _ in content.values(list(content.tensors))]
    assert set(held) == {0, 1}


def test_what_a_context_did_is_forgotten_or_kept(tmp_path: Path) -> None:
    save_tiny(tiny_llama(), tmp_path / "model")
    save_file({FIRST: torch.ones(64, 128)}, tmp_path / "model.layers.0.safetensors")  # of another run
    opened = open_model(tmp_path / "model", sink=ShardSink(tmp_path))
    decoder, source = opened.decoder(), tmp_path / "model" / "model.safetensors"
    before = {name: value.clone() for name, value in load_file(source).items()}
    for keep in (False, True):
        with decoder.resident(0, keep=keep) as block, decoder.resident(0):
            assert in_memory(block) == len(list(block.parameters()))
            assert in_memory(decoder.blocks[1]) == 0
            decoder.layer(0, "mlp.down_proj").weight.data.zero_()
        assert in_memory(block) == 0
        found = weights_of(decoder)[FIRST]
        assert torch.equal(found, torch.zeros_like(found) if keep else before[FIRST])
    with pytest.raises(ValueError, match="halfway"), decoder.resident(1, keep=True) as block:
        decoder.layer(1, "mlp.down_proj").weight.data.zero_()
        raise ValueError("halfway")
    assert in_memory(block) == 0
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.layers.0.safetensors"]
    assert load_file(tmp_path / "model.layers.0.safetensors").keys() == {n for n in before if n.startswith(FIRST[:15])}
    assert all(torch.equal(value, before[name]) for name, value in load_file(source).items())


def test_a_block_with_less_in_it_comes_back_so(tmp_path: Path) -> None:
    save_tiny(tiny_llama(), tmp_path)
    decoder = open_model(tmp_path).decoder()
    with decoder.without([(0, "mlp")]), decoder.resident(0):
        assert decoder.shape(0).mlp_width == 0
    assert decoder.shape(0).mlp_width
    with decoder.resident(0, keep=True):
        decoder.remove(0, "attention")
    with decoder.resident(0) as block:
        assert decoder.shape(0).kv_heads == 0
        assert in_memory(block) == 4


def test_what_does_not_stay_goes_with_the_store(tmp_path: Path) -> None:
    save_tiny(tiny_llama(), tmp_path / "model")
    opened = open_model(tmp_path / "model", scratch=tmp_path)
    with opened.decoder().resident(0, keep=True):
        pass
    put, parts = store_of(opened), {"a": torch.randn(3, 2), "b": torch.tensor(1.0).bfloat16(), "c": torch.ones(0, 4)}
    aside = put.offload.keep_all(parts)
    assert all(torch.equal(value, parts[name]) for name, value in aside().items())
    folders = [put.scratch(name) for name in ("pruned", "aside")]
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 0], "what is put aside has no name"
    assert folders[0].is_relative_to(tmp_path)
    del opened, put
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tiny_llama(), tmp_path)
    decoder = open_model(tmp_path).decoder()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("optprune.models.store.write_tensors", full)
    sentence = r"the disk is full, so .*model.layers.0.* was not written"
    with pytest.raises(InputError, match=sentence), decoder.resident(0, keep=True):
        pass
    assert in_memory(decoder.blocks) == 0


# -- what is refused


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_tiny(tiny_llama(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="200KB")
    return tmp_path / "model"


def renamed(folder: Path, name: str) -> None:
    """Rename the first shard in the index and on disk."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = min(index["weight_map"].values())
    (folder / first).rename(folder / name)
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../model-1.safetensors", "model.bin", "model.json"])
def test_an_index_that_leads_elsewhere(sharded: Path, name: str) -> None:
    renamed(sharded, name)
    with pytest.raises(InputError, match="for weights, but only safetensors in the folder itself"):
        open_model(sharded)


def test_a_shard_that_is_missing(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"incomplete: there is no model-00002-of-00003.safetensors; copy"):
        open_model(sharded)


def test_no_weights_at_all(sharded: Path) -> None:
    for file in sharded.glob("model*"):
        file.unlink()
    with pytest.raises(InputError, match=r"incomplete: there is no model.safetensors; copy"):
        open_model(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(InputError, match=r"is in two files, model-00001-of-00003.safetensors and model-00002"):
        open_model(sharded)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-1], "model.safetensors of .* is cut short in the tensor"),
        (lambda data: data[:5], "is not a whole safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "is not a whole safetensors file"),
        (lambda data: data[:9] + b"}" + data[10:], "the header of model.safetensors of .* is damaged"),
        (lambda data: data.replace(b'"F32"', b'"F64"'), "the header of model.safetensors of .* is damaged"),
        (lambda data: data.replace(b'"F32"', b'"I32"'), "holds tensors of I32, but pruning needs plain weights"),
        (lambda data: data.replace(b"[512,64]", b"[64,512]"), r"misshapen, such as .* \(\[64, 512\], not \[512"),
        (lambda data: data.replace(b"mlp.down_proj", b"mlp.dawn_proj"), "does not have, such as .*dawn_proj"),
        (lambda data: data + b"more", "model.safetensors of .* has 4 bytes after its last tensor"),
    ],
    ids=range(9),
)
def test_a_damaged_file(damage, sentence: str, tmp_path: Path) -> None:
    save_tiny(tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=sentence):
        open_model(tmp_path)


@pytest.mark.parametrize("read", [load_model, open_model])
def test_bytes_behind_the_last_tensor_are_refused_however_a_model_is_read(read, tmp_path: Path) -> None:
    save_tiny(tiny_llama(), tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"PK payload of a zip archive")
    with pytest.raises(InputError, match=r"model\.safetensors|weights of"):
        read(tmp_path)


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_weights_that_change_on_the_disk_at_the_same_size_are_noticed(how: str, tmp_path: Path) -> None:
    """Blocks are read when they are needed, and never from a checkpoint that has changed since."""
    save_tiny(tiny_llama(), tmp_path / "model")
    opened, file = open_model(tmp_path / "model"), tmp_path / "model" / "model.safetensors"
    logits(opened)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if how == "in place":
        with file.open("r+b") as stream:
            stream.write(data)
    else:
        (tmp_path / "other").write_bytes(data)
        (tmp_path / "other").replace(file)
    with pytest.raises(InputError, match=r"^model.safetensors changed after its header was read"):
        logits(opened)


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Two tensors over the same bytes would hide bytes that belong to no tensor."""
    save_tiny(tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = (f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1))
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    file.write_bytes(data[:8] + text + data[8 + length :])
    with pytest.raises(InputError, match="does not begin where the tensor before it ends"):
        open_model(tmp_path)


def test_the_generation_config_of_the_folder_is_kept(tmp_path: Path) -> None:
    save_tiny(tiny_llama(), tmp_path)
    file = tmp_path / "generation_config.json"
    stated = {**json.loads(file.read_text()), "do_sample": True, "temperature": 0.375, "eos_token_id": [2, 7]}
    file.write_text(json.dumps(stated))
    for load in (open_model, load_model):
        found = load(tmp_path).model.generation_config
        assert found is not None and found.do_sample
        assert (found.temperature, found.eos_token_id) == (0.375, [2, 7])


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    save_tiny(tiny_llama(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[FIRST]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"incomplete: 1 tensor is missing or misshapen, such as {FIRST}: copy"):
        open_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [FIRST, "model.norm.weight"])
def test_a_weight_that_is_no_number_is_named(name: str, value: float, tmp_path: Path) -> None:
    model = tiny_llama()
    model.get_parameter(name).data.view(-1)[3] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{name} of .* holds NaN or infinity: the checkpoint is damaged, fetch it"):
        logits(open_model(tmp_path))


def test_a_weight_beyond_a_dtype_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    model.get_parameter(FIRST).data[0, 0] = 1e6
    model.save_pretrained(tmp_path)
    for load in (open_model, load_model):
        with pytest.raises(InputError, match=rf"{FIRST} of .* holds 1e\+06, which is beyond float16: load it as bfl"):
            logits(load(tmp_path, dtype="float16"))
