"""A folder as a GGUF file: llama.cpp gives the logits and the greedy text that transformers gives."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import optprune
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import GgufFile, export, exporter, gguf_file, save_model
from optprune.export.gguf_vocabulary import Vocabulary
from optprune.export.place import Scratch
from optprune.models import Decoder, KvGroups, Mlp, Values, load_model, load_tokenizer
from optprune.models.architecture import BlockShape
from optprune.models.gguf import PlainReader
from tests.helpers.begun_tokenizer import begun_tokenizer
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.mixed_models import narrow
from tests.helpers.tiny_models import (
    ALL_MODELS,
    LLAMA3,
    TINY_MODELS,
    VOCABULARY,
    save_tiny,
    tiny_llama,
    tiny_opt,
    tiny_tokenizer,
)

TEXT = "The minister said on Monday that 2500 people's houses,\nwhich they'd built"
UNEVEN = (BlockShape(96, 2, 16), BlockShape(0, 1, 16), BlockShape(64, 0, 0))
NARROW = (BlockShape(96, 2, 8), BlockShape(96, 2, 8), BlockShape(96, 2, 12))


def folder_of(model, folder: Path, shapes: tuple[BlockShape, ...] = ()) -> Path:
    decoder = Decoder(model)
    for block, shape in enumerate(shapes):
        for part in {"attention", "mlp"} - set(shape.parts):
            decoder.remove(block, part)
        kept = {KvGroups(): shape.kv_heads, Values(): shape.value_dim, Mlp(): shape.mlp_width}
        for units, count in kept.items():
            if count:
                narrow(decoder, block, units, count)
    decoder.record_shapes()
    save_model(model, folder, tokenizer=tiny_tokenizer())
    return folder


def check_alike(folder: Path, file: Path, tolerance: float) -> None:
    """The log-probabilities of the token behind a text, all of them, and what goes on from it."""
    model, tokenizer = optprune.load_model(folder, device="cpu").model.float().eval(), load_tokenizer(folder)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])  # type: ignore[misc]
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0, -1].double().log_softmax(-1)
    other = LlamaCpp(file)
    found = other.log_probabilities(ids)
    assert len(found) == VOCABULARY
    assert max(abs(found[token] - float(expected[token])) for token in found) < tolerance
    assert other.tokens(TEXT) == len(ids)


def test_the_likelihood_of_each_token_is_that_of_the_whole_vocabulary(tmp_path: Path) -> None:
    """Of what the tests of real models ask llama.cpp for, since the vocabulary takes too long."""
    folder = folder_of(tiny_llama(num_hidden_layers=3), tmp_path / "model", UNEVEN)
    windows = torch.randint(5, 500, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (
            optprune.load_model(folder, device="cpu")
            .model.float()(input_ids=windows)
            .logits[:, :-1]
            .double()
            .log_softmax(-1)
        )
    file = export(folder, tmp_path / "model.gguf", GgufFile(kind="f32")).path
    found = LlamaCpp(file, slots=3).log_likelihoods(windows)
    assert (found - expected.gather(2, windows[:, 1:, None])[..., 0]).abs().max() < 1e-4
    whole = LlamaCpp(file).log_probabilities(windows[1, :9])
    assert float(found[1, 8]) == pytest.approx(whole[int(windows[1, 9])], abs=1e-4)


@pytest.mark.parametrize("shapes", [(), UNEVEN, NARROW], ids=["whole", "uneven", "fewer value dimensions"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpp_gives_the_same_probabilities(family: str, shapes: tuple[BlockShape, ...], tmp_path: Path) -> None:
    folder = folder_of(TINY_MODELS[family](num_hidden_layers=3), tmp_path / "model", shapes)
    written = export(folder, tmp_path / "model.gguf", GgufFile(kind="f32"))
    assert written.summary == f"architecture {'deci' if shapes == UNEVEN else family}"
    assert bool(written.notes) == (shapes == NARROW)
    check_alike(folder, written.path, 1e-4)


@pytest.mark.parametrize("rotary", [LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=["llama3", "linear"])
def test_rotary_embeddings_that_are_scaled(rotary: dict, tmp_path: Path) -> None:
    parameters = {**rotary, "rope_theta": 50000.0}
    folder = folder_of(tiny_llama(rope_parameters=parameters, max_position_embeddings=1024), tmp_path / "model")
    check_alike(folder, export(folder, tmp_path / "model.gguf", GgufFile(kind="f32")).path, 1e-4)


@pytest.mark.parametrize(("kind", "bits"), [("f16", 16.0), ("q8_0", 8.5)])
def test_smaller_types(kind: str, bits: float, tmp_path: Path) -> None:
    """What is stored is the weight within the type's rounding; widths that q8_0 cannot hold are filled, and told."""
    folder = folder_of(tiny_llama(num_hidden_layers=3), tmp_path / "model", UNEVEN)
    written = export(folder, tmp_path / "model.gguf", GgufFile(kind=kind))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(written.path).tensors}
    up = optprune.load_model(folder, device="cpu").model.model.layers[0].mlp.up_proj.weight.detach()
    tensor = stored["blk.0.ffn_up.weight"]
    numbers = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(up.shape)
    block = up.view(-1, 32).abs().amax(1).max()
    assert float((numbers - up).abs().max()) <= float(block) * (2**-11 if kind == "f16" else 0.51 / 127)
    assert tensor.n_bytes == up.numel() * bits / 8
    assert stored["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert not written.notes
    odd = folder_of(tiny_llama(num_hidden_layers=3), tmp_path / "odd", (BlockShape(88, 2, 16),) * 3)
    told = export(odd, tmp_path / "odd.gguf", GgufFile(kind=kind)).notes
    assert ("fill up MLPs to whole blocks of q8_0, in units: 88 to 96" in "".join(told)) == (kind == "q8_0")


def test_the_vocabulary_and_the_template_go_along(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(vocab_size=VOCABULARY + 8), tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # type: ignore[union-attr]
    tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
    fields = gguf.GGUFReader(export(folder, tmp_path / "model.gguf", GgufFile()).path).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template  # type: ignore[union-attr]
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[:VOCABULARY] == tokenizer.convert_ids_to_tokens(range(VOCABULARY))  # type: ignore[union-attr]
    assert tokens[VOCABULARY:] == [f"[PAD{index}]" for index in range(VOCABULARY, VOCABULARY + 8)]
    assert {kinds[index] for index in (0, 1)} == {int(gguf.TokenType.CONTROL)}
    assert set(kinds[VOCABULARY:]) == {int(gguf.TokenType.UNUSED)}
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id  # type: ignore[union-attr]
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False


def test_pieces_are_merged_by_their_rank(tmp_path: Path) -> None:
    """As in Llama 2: byte fallback, a space before the text; the earlier a merge, the higher its score."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6}
    made = Tokenizer(BPE(vocabulary, [("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    found = Vocabulary.of(tokenizer, 7)
    assert found.model == "llama"
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    found.write(writer, tokenizer, tmp_path)
    (written,) = writer.kv_data
    assert written["tokenizer.ggml.add_space_prefix"].value is True
    assert found.scores[5] == 0.0 and found.scores[6] == -1.0 and found.scores[3] < -1.0
    kinds = [gguf.TokenType(kind).name for kind in found.kinds]
    assert kinds == ["UNKNOWN", "BYTE", "NORMAL", "NORMAL", "NORMAL", "NORMAL", "NORMAL"]


def test_a_text_is_split_as_o200k_splits_it(tmp_path: Path) -> None:
    """As for GPT-OSS: by merges across places where that splits, or where Llama 3's rule does."""
    words = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    )
    rest = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = f"{words % ('*', '+')}|{words % ('+', '*')}|{rest}"
    merges = [("l", "C"), ("t", "'"), ("1", "2"), ("12", "3"), ("123", "4"), ("!", "Ċ"), ("Ċ", "/"), ("M", "L")]
    text = "modelCase isn't it'll 12345 HTML hi!\n/x"
    found = split_by("gpt-4o", [pattern], merges, text, tmp_path)
    assert found & {"lC", "t'", "123", "1234", "!Ċ", "Ċ/", "ML"} == {"t'", "123", "!Ċ", "ML"}


def test_a_text_is_split_as_deepseek_v3_splits_it(tmp_path: Path) -> None:
    """Digits and Chinese or Japanese letters first; a sign goes with the Latin letters behind it."""
    lines = "\r\n"  # the letters themselves, as its tokenizer.json has them
    signs = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    words = rf"[^{lines}\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rest = rf"{signs}|{words}| ?[\p{{P}}\p{{S}}]+[{lines}]*|\s*[{lines}]+|\s+(?!\S)|\s+"
    merges = [("l", "C"), (".", "c"), ("c", "1"), ("1", "2"), ("12", "3"), ("123", "4"), ("!", "Ċ"), ("Ċ", "x")]
    text = "modelCase a.com c12345 hi!\nx 日本語 モデル и др. a\u0301 €5"
    found = split_by("deepseek-v3", [r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+", rest], merges, text, tmp_path)
    assert found & {"lC", ".c", "c1", "123", "1234", "!Ċ", "Ċx"} == {"lC", ".c", "123", "!Ċ"}


def test_a_text_is_split_as_qwen3_5_splits_it(tmp_path: Path) -> None:
    """Marks go with the letters before them, and digits are single."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    merges = [("a", "Ì"), ("1", "2"), ("t", "'"), ("!", "Ċ"), ("Ċ", "x"), (".", "c")]
    text = "isn't 12345 hi!\nx a.com a\u0301 क्षि и др."
    assert split_by("qwen35", [pattern], merges, text, tmp_path) & {"aÌ", "12", "t'", "!Ċ", "Ċx", ".c"} == {
        "aÌ",
        "!Ċ",
        ".c",
    }


def split_by(name: str, patterns: list[str], merges: list[tuple[str, str]], text: str, folder: Path) -> set[str]:
    """The tokens of a text that is split by patterns first, of which there are as many in llama.cpp."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", *letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(BPE({name: index for index, name in enumerate(names)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<unk>")
    save_model(tiny_llama(vocab_size=len(names)), folder / "model", tokenizer=tokenizer)
    file = export(folder / "model", folder / "model.gguf", GgufFile()).path
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    ids = tokenizer(text)["input_ids"]
    assert LlamaCpp(file).tokens(text) == len(ids)
    return {names[index] for index in ids}


def test_what_llama_cpp_has_no_words_for(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"opt models cannot be exported to GGUF: export one of deepseek_v2, .*, smollm3"
    ):
        export(save_tiny(tiny_opt(), tmp_path / "opt"), tmp_path / "x.gguf", GgufFile())
    folder = save_tiny(tiny_llama(), tmp_path / "llama")
    with pytest.raises(InputError, match="the type 'q9' is unknown: give f32, f16, q8_0, q6_K, q5_K, q5_0, q4_K, q4_0"):
        export(folder, tmp_path / "x.gguf", GgufFile(kind="q9"))
    other = json.loads((folder / "tokenizer.json").read_text())
    other["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="the tokenizer splits text by Whitespace, and none of"):
        export(folder, tmp_path / "x.gguf", GgufFile())
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def test_a_gguf_file_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "load_config", lambda *_: pytest.fail("the file was read"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for source in ("demo", str(tmp_path / "x.gguf")):
        assert main(["export", source, "--output", str(tmp_path / "out.gguf")]) == 2
        assert f"error: {source} is already a GGUF file: give a model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_link_where_a_draft_might_be_is_not_followed(tmp_path: Path) -> None:
    folder, mine = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "mine.txt"
    mine.write_text("do not lose me")
    link = tmp_path / ".model.gguf.part"
    link.symlink_to(mine)
    export(folder, tmp_path / "model.gguf", GgufFile())
    assert mine.read_text() == "do not lose me" and link.is_symlink()
    assert (tmp_path / "model.gguf").is_file() and not (tmp_path / "model.gguf").is_symlink()


def test_two_exports_into_one_file_leave_one_of_the_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first is half through its tensors."""
    folder, place = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "model.gguf"
    export(folder, tmp_path / "alone.gguf", GgufFile(kind="f16"))
    make, started = gguf_file.gguf.quantize, list[bool]()

    def interrupted(*args):
        if not started:
            started.append(True)
            export(folder, place, GgufFile(kind="f32"))
            assert place.stat().st_size > (tmp_path / "alone.gguf").stat().st_size
        return make(*args)

    monkeypatch.setattr(gguf_file.gguf, "quantize", interrupted)
    export(folder, place, GgufFile(kind="f16"), overwrite=True)
    assert place.read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_another_command_wrote_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file, write = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "x.gguf", gguf_file.write_tensors

    def meanwhile(*given: Any) -> None:
        write(*given)
        file.write_text("another's")

    monkeypatch.setattr(gguf_file, "write_tensors", meanwhile)
    with pytest.raises(InputError, match=r"another command wrote .*x\.gguf meanwhile"):
        export(model, file, GgufFile())
    assert file.read_text() == "another's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x.gguf"]
    file.unlink()
    monkeypatch.undo()
    assert export(model, file, GgufFile()).bytes == file.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x.gguf"]
    # Nor is a file of another kind replaced that came while one could be overwritten.
    monkeypatch.setattr(gguf_file, "write_tensors", meanwhile)
    with pytest.raises(InputError, match=r"x\.gguf does not begin with GGUF"):
        export(model, file, GgufFile(), overwrite=True)
    assert file.read_text() == "another's"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_is_not_replaced(overwrite: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, pipe = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="pipe is a device or a pipe, so it cannot be replaced: name another file"):
        export(model, pipe, GgufFile(), overwrite=overwrite)
    assert main(["export", str(model), "--output", str(pipe), *(["--overwrite"] if overwrite else [])]) == 2
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pipe"]


def test_only_a_gguf_file_or_an_empty_one_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And before the inputs of layers are measured."""
    model, other = (save_tiny(tiny_llama(), tmp_path / name) for name in ("model", "other"))
    file, gguf_one = other / "model.safetensors", tmp_path / "x.gguf"
    before = file.read_bytes()
    sentence = "does not begin with GGUF, as files of this format do, so it is not overwritten: choose another"
    with pytest.raises(InputError, match=rf"model\.safetensors {sentence}"):
        export(model, file, GgufFile(), overwrite=True)
    words = ["--type", "q4_0", "--calibration", str(tmp_path / "nowhere.txt"), "--overwrite"]
    assert main(["export", str(model), "--output", str(file), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert file.read_bytes() == before
    for content in (b"", b"GGUF and more"):
        gguf_one.write_bytes(content)
        export(model, gguf_one, GgufFile(), overwrite=True)
        assert gguf_one.stat().st_size > 1000


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "own.py", "link/config.json"]
)
def test_a_file_of_the_model_that_is_read_is_not_replaced(name: str, overwrite: bool, tmp_path: Path) -> None:
    """Even where it is not there."""
    model = save_tiny(tiny_llama(), tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    output = tmp_path / name if "/" in name else model / name
    with pytest.raises(InputError, match=r"would replace the model|has a name that a file of the model .* may have: "):
        export(model, output, GgufFile(), overwrite=overwrite)
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    export(model, model / "model.gguf", GgufFile(), overwrite=overwrite)


def test_weights_of_other_shapes_than_the_config_says_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 1}))
    with pytest.raises(InputError, match=r"\[\d+, \d+\] in the weights and \[.*\] by config\.json"):
        export(folder, tmp_path / "x.gguf", GgufFile())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": [1]}))
    with pytest.raises(InputError, match=r"the tokenizer of .* cannot be"):
        export(folder, tmp_path / "x.gguf", GgufFile())


@pytest.mark.e2e
def test_what_a_killed_export_left_goes_and_nothing_else_does(tmp_path: Path) -> None:
    folder, place = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "model.gguf"
    kill = (
        "import os, signal, sys; from optprune.export import GgufFile, export, gguf_file\n"
        "gguf_file.gguf.quantize = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export(*sys.argv[1:], GgufFile())"
    )
    run = subprocess.run([sys.executable, "-c", kill, str(folder), str(place)], check=False)
    assert run.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".model.gguf.????????")
    assert (left / "model").stat().st_size
    others = [".model.gguf.part", ".model.gguf.notes123.part", ".model.gguf.0123abcd", ".x.gguf.0123abcd"]
    for name in others:
        (tmp_path / name).write_text("do not lose me")
    (tmp_path / ".model.gguf.0123abce").mkdir()
    (tmp_path / ".model.gguf.0123abce" / "notes").write_text("do not lose me")
    writing = Scratch(place)
    export(folder, place, GgufFile())
    assert not left.exists() and place.is_file()
    kept = [*others, ".model.gguf.0123abce", writing.folder.name]
    assert {path.name for path in tmp_path.glob(".*")} == set(kept)
    assert all((tmp_path / name).read_text() == "do not lose me" for name in others)
    writing.discard()


def test_an_empty_scratch_folder_of_a_killed_export_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two last steps of deleting a scratch folder leaves it empty."""
    folder, scratch = save_tiny(tiny_llama(), tmp_path / "model"), Scratch(tmp_path / "model.gguf")

    def killed(self: Path) -> None:
        raise OSError("the process ended")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", killed)
        scratch.discard()
    assert scratch.folder.is_dir() and not any(scratch.folder.iterdir())
    theirs, full = tmp_path / ".model.gguf.0123abcd", tmp_path / ".model.gguf.0123abce"
    theirs.mkdir()
    theirs.chmod(0o755)  # whatever the umask is
    full.mkdir(mode=0o700)
    (full / "notes").write_text("do not lose me")
    export(folder, tmp_path / "model.gguf", GgufFile())
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf", theirs.name, full.name}
    assert (full / "notes").read_text() == "do not lose me"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_more_than_ten_experts_are_in_the_order_of_their_numbers(family: str, tmp_path: Path) -> None:
    """As words 10 and 11 come before 2."""
    counts = ("num_experts", *(["num_local_experts"] if family == "mixtral" else []))
    model = ALL_MODELS[family](num_hidden_layers=1, **dict.fromkeys(counts, 12))
    written = export(save_tiny(model, tmp_path / "model"), tmp_path / "model.gguf", GgufFile(kind="f32"))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written.path).tensors}
    weights = load_model(tmp_path / "model").decoder().weights(0)
    for own, theirs in (("gate", "gate"), ("up", "up"), ("down", "down")):
        stored = torch.from_numpy(tensors[f"blk.0.ffn_{theirs}_exps.weight"].data.copy())
        named = {
            int(name.split("experts.")[1].partition(".")[0]): value
            for name, value in weights.items()
            if "experts." in name and f"{own}_proj" in name
        }
        assert sorted(named) == list(range(12)) and len(stored) == 12
        for number, value in named.items():
            assert torch.equal(stored[number], value), (own, number)
    router = torch.from_numpy(tensors["blk.0.ffn_gate_inp.weight"].data.copy())
    assert torch.equal(router, next(value for name, value in weights.items() if name.endswith("gate.weight")))


def test_a_file_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    folder, before = save_tiny(tiny_llama(), tmp_path / "model"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"a file would be larger than .*, so .*model.gguf was not written: make"):
            export(folder, tmp_path / "model.gguf", GgufFile())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "model.gguf"
    assert main(["export", str(folder), "--output", str(file), "--type", "q8_0"]) == 0
    assert "architecture llama" in capsys.readouterr().out
    before = file.read_bytes()
    assert main(["export", str(folder), "--output", str(file)]) == 2
    assert "exists: pass --overwrite" in capsys.readouterr().err
    assert main(["export", str(folder), "--output", str(file), "--format", "mlx"]) == 2
    assert "the format 'mlx' is unknown" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert main(["export", str(folder), "--output", str(file), "--overwrite"]) == 0
    assert len(file.read_bytes()) > len(before)


@pytest.mark.parametrize(
    ("kind", "number", "named", "held"),
    [
        ("f16", 65_520.0, "65520 is beyond the numbers that f16 holds", "f32 or q8_0"),
        ("q8_0", 1e7, "1e+07 is beyond the numbers that q8_0 holds", "f32"),
    ],
)
def test_a_weight_beyond_the_type_is_named_with_the_types_that_hold_it(
    kind: str, number: float, named: str, held: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, 5] = number
    folder = save_tiny(model, tmp_path / "model")
    with pytest.raises(InputError) as refused:
        export(folder, tmp_path / "x.gguf", GgufFile(kind=kind))
    told = str(refused.value)
    assert "blk.1.ffn_down.weight (model.layers.1.mlp.down_proj.weight)" in told and named in told
    assert f"give --type {held}" in told
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for other in held.split(" or "):
        read = load_model(export(folder, tmp_path / f"{other}.gguf", GgufFile(kind=other)).path, dtype="float32")
        found = float(read.decoder().layer(1, "mlp.down_proj").weight.detach()[3, 5])
        assert abs(found / number - 1) < 0.01


@pytest.mark.parametrize("begun", [False, True])
def test_the_file_says_whether_texts_begin_with_bos(begun: bool, tmp_path: Path) -> None:
    tokenizer = begun_tokenizer() if begun else tiny_tokenizer()
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fields = PlainReader(export(tmp_path / "model", tmp_path / "x.gguf", GgufFile()).path).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is begun
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


def test_a_weight_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[3] = torch.nan
    folder = save_tiny(model, tmp_path / "model")
    with pytest.raises(InputError, match=r"the tensor output_norm.weight .* holds NaN or infinity"):
        export(folder, tmp_path / "x.gguf", GgufFile())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
