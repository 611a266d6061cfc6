"""GGUF files read block by block: converted to safetensors once, with the numbers that transformers reads."""

import weakref
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

from benchmarks.tiny_models import tiny
from optprune.errors import InputError
from optprune.export.source_files import origin_of
from optprune.models import DTYPES, load_config, load_model, load_tokenizer, open_model
from optprune.models import gguf as gguf_files
from optprune.models.sources import demo_model_file
from optprune.report import audit
from optprune.system.files import digest_of_file
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import save_tiny, tiny_llama, tiny_qwen2
from tests.helpers.weights import weights_of

MAKERS = {
    "llama": tiny_llama,
    "llama, tied": lambda: tiny_llama(tie_word_embeddings=True),
    "qwen2": tiny_qwen2,
    # Whose config and file call the family by two names, and whose norms are stored one higher.
    "gemma3_text": lambda: tiny("gemma3_text"),
}
KINDS = pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name
)


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


@KINDS
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_model_that_transformers_loads(name: str, kind: Kind, tmp_path: Path) -> None:
    file = write_gguf(MAKERS[name](), tmp_path / "tiny.gguf", kind)
    for dtype in ("auto", "bfloat16"):
        whole, opened = load_model(file, dtype=dtype), open_model(file, dtype=dtype, scratch=tmp_path / "scratch")
        expected, found = weights_of(whole.decoder()), weights_of(opened.decoder())
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value.dtype == expected[key].dtype == DTYPES.get(dtype, torch.float32)
            assert torch.equal(value.view(torch.uint8), expected[key].view(torch.uint8))
        assert type(opened.model) is type(whole.model)
        assert opened.model.config.to_dict() == whole.model.config.to_dict()
        assert opened.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
        assert opened.tokenizer is not None
        assert all(torch.equal(a, b) for a, b in zip(opened.model.buffers(), whole.model.buffers(), strict=True))
    if kind is Kind.F32:
        for key, value in weights_of(load_model(file).decoder()).items():
            # What is stored one higher, at most 4, is rounded by half of the last digit.
            stored_higher = name.startswith("gemma") and key.endswith("norm.weight")
            difference = (value - MAKERS[name]().state_dict()[key]).abs().max()
            assert difference <= (4 * 2**-24 if stored_higher else 0)


@pytest.mark.e2e
def test_the_demo_model_is_the_one_that_transformers_loads(tmp_path: Path) -> None:
    expected = dict(load_model("demo").model.named_parameters())
    decoder = open_model("demo", scratch=tmp_path).decoder()
    for name, weight in decoder.model.named_parameters():
        if not weight.is_meta:
            assert torch.equal(weight, expected.pop(name))
    for index in range(len(decoder.blocks)):
        with decoder.resident(index) as block:
            for name, weight in block.named_parameters():
                assert torch.equal(weight, expected.pop(decoder.name(index, name)))
    assert not expected


def test_a_file_is_turned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, scratch = write_gguf(tiny_llama(), tmp_path / "tiny.gguf"), tmp_path / "scratch"
    turned: list[str] = []
    write = gguf_files.write_tensors
    monkeypatch.setattr(gguf_files, "write_tensors", lambda *args: (turned.append("once"), write(*args)))
    first = weights_of(open_model(file, scratch=scratch).decoder())
    assert all(
        torch.equal(value, first[name])
        for name, value in weights_of(open_model(file, scratch=scratch).decoder()).items()
    )
    # Each file has another with its digest beside it.
    assert len(turned) == len(files_in(scratch)) / 2 == 1
    open_model(file, scratch=scratch, dtype="bfloat16")
    # The same name, other bytes.
    write_gguf(tiny_llama(seed=1), file)
    other = weights_of(open_model(file, scratch=scratch).decoder())
    assert not torch.equal(other["lm_head.weight"], first["lm_head.weight"])
    assert len(turned) == len(files_in(scratch)) / 2 == 3
    [one] = [place for place in files_in(scratch) if place.match(f"{digest_of_file(file)}-float32.safetensors")]
    damaged = bytearray(one.read_bytes())
    damaged[-1] ^= 1
    one.write_bytes(damaged)
    again = weights_of(open_model(file, scratch=scratch).decoder())
    assert all(torch.equal(value, other[name]) for name, value in again.items())
    assert len(turned) == 4


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, alive, most = write_gguf(tiny_llama(), tmp_path / "tiny.gguf"), weakref.WeakSet[torch.Tensor](), [0]
    read = gguf_files.GgufTensor.read

    def watched(part: gguf_files.GgufTensor) -> torch.Tensor:
        alive.add(tensor := read(part))
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(gguf_files.GgufTensor, "read", watched)
    open_model(file, scratch=tmp_path)
    # The one that is being written, and the next.
    assert 1 <= most[0] <= 2


def test_without_a_scratch_folder_it_goes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    opened = open_model(file)
    assert len(files_in(tmp_path)) == 3
    del opened
    assert files_in(tmp_path) == [file]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")

    def full(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(gguf_files, "write_tensors", full)
    with pytest.raises(InputError, match=r"the disk is full, so .* was not written"):
        open_model(file, scratch=tmp_path / "scratch")
    assert files_in(tmp_path) == [file]


def test_a_file_that_is_cut_short_behind_its_header(tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    data = demo_model_file().read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cannot be loaded: .*; check that the file is whole"):
        open_model(file, scratch=tmp_path / "scratch")


def test_a_file_that_has_changed_is_parsed_anew(tmp_path: Path) -> None:
    file = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    first = load_config(file)
    assert first.num_hidden_layers != 5
    first.num_hidden_layers = 7  # a caller's own copy
    assert load_config(file).num_hidden_layers != 7
    write_gguf(tiny_llama(num_hidden_layers=5), file)
    assert load_config(file).num_hidden_layers == 5


def test_a_file_is_parsed_once_for_its_config_and_once_for_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, parsed = write_gguf(tiny_llama(), tmp_path / "tiny.gguf"), list[str]()
    read = GGUFReader.__init__

    def counted(self: GGUFReader, path: str, *args: Any) -> None:
        parsed.append(str(path))
        read(self, path, *args)

    monkeypatch.setattr(GGUFReader, "__init__", counted)
    for _ in range(2):
        load_config(file)
        load_tokenizer(file)
        open_model(file, scratch=tmp_path / "scratch")
    # And once for the weights, which stay in the scratch folder.
    assert len(parsed) == 3


def test_transformers_has_the_reader_of_gguf_again_when_a_file_is_read(tmp_path: Path) -> None:
    load_config(write_gguf(tiny_llama(), tmp_path / "tiny.gguf"))
    assert gguf.GGUFReader is GGUFReader
    with pytest.raises(InputError):
        (tmp_path / "none.gguf").write_bytes(b"GGUF")
        load_config(tmp_path / "none.gguf")
    assert gguf.GGUFReader is GGUFReader


def test_a_folder_whose_name_ends_as_a_files_does_is_a_folder(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "out.gguf")
    assert load_model(folder).source == str(folder)
    assert origin_of(str(folder)).licence_files == {}


def test_an_infinite_scale_is_a_fault_of_the_audit(tmp_path: Path) -> None:
    """It gives NaN where the quantised number is zero: numpy's warning is no error of its own."""
    file = write_gguf(tiny_llama(), tmp_path / "tiny.gguf", Kind.Q8_0)
    tensor = next(each for each in GGUFReader(file).tensors if each.name == "blk.0.ffn_up.weight")
    assert tensor.tensor_type is Kind.Q8_0
    data, start = bytearray(file.read_bytes()), int(tensor.data_offset)
    data[start : start + 2] = b"\x00\x7c"  # infinity in half precision
    data[start + 2 : start + 34] = bytes(32)
    file.write_bytes(data)
    faults = [fault.sentence for fault in audit(file).faults]
    assert len(faults) == 1 and "NaN" in faults[0] and "up_proj" in faults[0]


def test_weights_are_not_written_through_a_link(tmp_path: Path) -> None:
    file, elsewhere = write_gguf(tiny_llama(), tmp_path / "tiny.gguf"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / gguf_files.CONVERTED).symlink_to(elsewhere)
    with pytest.raises(InputError, match="converted is a link, but converted weights are written to a folder there"):
        open_model(file, scratch=tmp_path / "scratch")
    assert not list(elsewhere.iterdir())


def test_the_ending_of_a_file_may_be_in_capitals(tmp_path: Path) -> None:
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf").rename(tmp_path / "TINY.GGUF")
    assert load_config(tmp_path / "TINY.GGUF").model_type == "llama"
