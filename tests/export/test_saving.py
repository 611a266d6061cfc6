"""Saving and loading: whole or not at all, in the stock format where it can be, checked by a fresh process."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import optprune
from optprune.allocation import Allocation
from optprune.errors import InputError, OptpruneError
from optprune.export import GgufFile, TransformersFolder, cast, check_output, export, save_model
from optprune.export.place import (
    WRITTEN,
    Scratch,
    check_apart,
    delete_left_behind,
    entries,
    model_files,
    put_in_place,
    record_written,
)
from optprune.export.shards import write_weights
from optprune.models import BlockAllocation, Decoder, load_model, load_tokenizer
from optprune.models import load as load_module
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.texts import demo_articles
from tests.helpers.tiny_models import TINY_MODELS, VOCABULARY, save_tiny, tiny_llama, tiny_tokenizer
from tests.helpers.token_batches import batches

CHECK_TOKENS = torch.arange(10, 42)[None]


def pruned(name: str, units: str) -> torch.nn.Module:
    model = TINY_MODELS[name]()
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(5, 500, (2, 48), generator=generator) for _ in range(4)]
    prune(model, batches, load_recipe("fasp", {"units": units, "sparsity": 0.15}))
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama" else pytest.mark.e2e) for name in TINY_MODELS]
)
def test_mlp_pruning_gives_a_folder_that_plain_transformers_loads(name: str, tmp_path: Path) -> None:
    dense_bytes = save_model(TINY_MODELS[name](), tmp_path / "dense").bytes
    model = pruned(name, "mlp")
    saved = save_model(
        model, tmp_path / "out", check_tokens=CHECK_TOKENS, tokenizer=tiny_tokenizer(), files={"report.json": "{}"}
    )
    assert saved.stock and saved.logits_difference is not None
    width = {"opt": "ffn_dim"}.get(name, "intermediate_size")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[width] == getattr(model.config, width) < 128
    # In proportion: exactly the float32 weights that are gone, up to the header.
    gone = sum(p.numel() for p in TINY_MODELS[name]().parameters()) - sum(p.numel() for p in model.parameters())
    assert abs(dense_bytes - saved.bytes - 4 * gone) < 1024
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "print(m.generate(torch.arange(10, 20)[None], max_new_tokens=4, do_sample=False).tolist());"
        "assert not any(name.startswith('optprune') for name in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    expected = model.generate(torch.arange(10, 20)[None], max_new_tokens=4, do_sample=False).tolist()
    assert json.loads(run.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("units", ["vo", "all"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_value_pruning_gives_a_folder_that_optprune_loads(name: str, units: str, tmp_path: Path) -> None:
    model = pruned(name, units)
    saved = save_model(model, tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert not saved.stock
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    with torch.no_grad():
        assert torch.equal(again(CHECK_TOKENS).logits, model(CHECK_TOKENS).logits)


@pytest.mark.e2e
@pytest.mark.usefixtures("real_reload_check")
def test_a_pruned_folder_can_be_pruned_again(tmp_path: Path) -> None:
    for units in ("vo", "mlp"):
        model = pruned("llama", units)
        save_model(model, tmp_path / units)
        again = load_model(str(tmp_path / units)).model
        report = prune(again, [torch.randint(5, 500, (2, 48))], load_recipe("fasp", {"sparsity": 0.2}))
        assert report.sparsity_reached == pytest.approx(0.2, abs=0.03)
        # The check is a process of its own, of several seconds.
        save_model(again, tmp_path / f"{units} twice", check_tokens=CHECK_TOKENS if units == "mlp" else None)


def test_an_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    model = tiny_llama()
    save_model(model, tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        save_model(model, tmp_path / "out")
    save_model(model, tmp_path / "out", overwrite=True, files={"second": ""})
    assert (tmp_path / "out" / "second").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(InputError, match="has no record of what optprune wrote there"):
        save_model(model, tmp_path / "notes", overwrite=True)


@pytest.mark.parametrize(
    "fault",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("anything")],
    ids=["full disk", "interrupt", "crash"],
)
def test_a_failure_while_writing_leaves_nothing(
    fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    save_model(model, tmp_path / "old")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "old").iterdir())}

    def fail(*args: object, **kwargs: object) -> None:
        raise fault

    monkeypatch.setattr("optprune.export.folder.make_portable", fail)
    for target in ("old", "new", "deep/er/new"):
        with pytest.raises((OptpruneError, KeyboardInterrupt, RuntimeError)):
            save_model(model, tmp_path / target, check_tokens=CHECK_TOKENS, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path: path.read_bytes() for path in sorted((tmp_path / "old").iterdir())} == before


def test_the_old_folder_survives_an_interrupt_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_llama(), tmp_path / "out", files={"NOTICE": ""})
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_llama(), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "NOTICE").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from optprune.export import place

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

where = Path(sys.argv[1])
scratch = place.Scratch(where)
draft = scratch.folder / "model"
draft.mkdir()
(draft / "config.json").write_text('{"model_type": "new"}')
if sys.argv[2] == "between":
    rename = Path.rename
    Path.rename = lambda self, target: kill() if self == draft else rename(self, target)
else:
    place.shutil.rmtree = kill
place.put_in_place(draft, where, overwrite=True)
"""
"""a program that is killed between the two renames of a replacement, or when it is to delete what it has replaced"""


@pytest.mark.parametrize("moment", ["between", "after"])
def test_a_folder_whose_replacement_was_killed_is_deleted_or_named(moment: str, tmp_path: Path) -> None:
    place, theirs, messages = tmp_path / "out", tmp_path / ".out.0123abcd.old", list[str]()
    old, new = '{"model_type": "old"}', '{"model_type": "new"}'
    for folder in (place, theirs):
        folder.mkdir()
        (folder / "config.json").write_text(old)
        (folder / "model.safetensors").touch()
    record_written(place)
    run = subprocess.run([sys.executable, "-c", KILLED, str(place), moment], check=False)
    assert run.returncode == -signal.SIGKILL
    (former,) = (path for path in tmp_path.glob(".out.*.old") if path != theirs)
    scratch = former.with_name(former.name.removesuffix(".old"))
    assert scratch.is_dir() and (former / "config.json").read_text() == old
    delete_left_behind(place, messages.append)
    note = "{} may be what was in {} before a run was killed: rename it, or delete it"
    assert not scratch.exists() and note.format(theirs, place) in messages
    assert (theirs / "config.json").read_text() == old
    if moment == "after":
        assert not former.exists() and f"deleting {former}, which a killed run had replaced" in messages
        assert (place / "config.json").read_text() == new
    else:
        assert not place.exists() and note.format(former, place) in messages
        assert (former / "config.json").read_text() == old


def test_an_export_reports_what_may_be_a_former_output(tmp_path: Path) -> None:
    """But not of one whose process is at work."""
    source, place = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "out.gguf"
    former, working = tmp_path / ".out.gguf.0123abcd.old", Scratch(place)
    former.mkdir()
    working.folder.with_name(f"{working.folder.name}.old").mkdir()
    (note,) = (note for note in export(source, place, GgufFile()).notes if ".old" in note)
    assert note.startswith(f"{former} may be") and former.is_dir()
    working.discard()


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_reloaded_model_that_differs_is_called_unchecked(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    if there:
        save_model(model, tmp_path / "out", files={"NOTICE": ""})

    def corrupt(decoder: Decoder, *rest: Any) -> None:
        with torch.no_grad():
            decoder.model.model.norm.weight[0] += 0.5
            write_weights(decoder, *rest)
            decoder.model.model.norm.weight[0] -= 0.5

    monkeypatch.setattr("optprune.export.folder.write_weights", corrupt)
    with pytest.raises(OptpruneError, match=r"is in .*out\.unchecked, but its check failed: .* logits differ"):
        save_model(model, tmp_path / "out", check_tokens=CHECK_TOKENS, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out.unchecked", *(["out"] if there else [])}
    assert not there or (tmp_path / "out" / "NOTICE").exists()
    # It stays, since nobody said that it may go; a second one gets a name of its own.
    with pytest.raises(OptpruneError, match=r"is in .*out\.unchecked-2, but its check failed"):
        save_model(model, tmp_path / "out", check_tokens=CHECK_TOKENS, overwrite=True)
    monkeypatch.undo()
    save_model(model, tmp_path / "out", check_tokens=CHECK_TOKENS, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.unchecked", "out.unchecked-2"}


def test_where_the_memory_ends_in_the_check_the_output_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("optprune.export.folder.compare", full)
    with pytest.raises(OptpruneError, match=r"the memory is not enough to check the .*, which is in .*out\.unchecked$"):
        save_model(tiny_llama(), tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unchecked"]


def test_missing_tensors_are_an_error_and_not_random_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tiny_llama(), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensor is missing or misshapen.*layers.1.mlp.up_proj"):
        load_model(str(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_kept(dtype: str, tmp_path: Path) -> None:
    save_model(tiny_llama(), tmp_path / "dense")
    loaded = load_model(str(tmp_path / "dense"), dtype=dtype).model
    prune(loaded, [torch.randint(5, 500, (2, 48))], load_recipe("fasp"))
    save_model(loaded, tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert str(load_model(str(tmp_path / "out")).model.dtype) == f"torch.{dtype}"


@pytest.mark.e2e
@pytest.mark.usefixtures("real_reload_check")
def test_the_reload_check_imports_what_the_parent_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch in the user's site-packages or on PYTHONPATH: the interpreter itself does not know of it."""
    monkeypatch.setattr(sys, "executable", sys._base_executable)  # type: ignore[attr-defined]  # knows no venv
    assert save_model(tiny_llama(), tmp_path / "out", check_tokens=CHECK_TOKENS).logits_difference is not None


@pytest.mark.usefixtures("real_reload_check")
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("path", [], "cannot import its packages .*torch.*: check that"),
        ("executable", "/no/python", "cannot be started .*: run optprune with"),
        ("executable", None, "cannot be started .*: run optprune with"),
    ],
)
def test_a_reload_check_that_cannot_run_says_so(
    name: str, value: object, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    model(CHECK_TOKENS)  # so that nothing is imported on the way
    with monkeypatch.context() as patched:
        patched.setattr(sys, name, value)
        with pytest.raises(OptpruneError, match=reason) as caught:
            save_model(model, tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unchecked"]
    with torch.no_grad():
        assert torch.equal(
            optprune.load_model(tmp_path / "out.unchecked", device="cpu").model(CHECK_TOKENS).logits,
            model(CHECK_TOKENS).logits,
        )


@pytest.mark.usefixtures("real_reload_check")
def test_a_reload_check_that_is_killed_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr("optprune.export.reload_check.__file__", str(tmp_path / "killed.py"))
    with pytest.raises(
        OptpruneError, match="killed by signal 9, probably for lack of memory: free as much as a block and"
    ):
        save_model(tiny_llama(), tmp_path / "out", check_tokens=CHECK_TOKENS)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.unchecked" / "config.json").is_file()


def test_a_tokenizer_with_several_chat_templates_is_saved_in_folders_that_can_be_entered(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    save_model(tiny_llama(), tmp_path / "out", tokenizer=tokenizer)
    [folder] = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert folder.stat().st_mode & 0o700 == 0o700
    modes = {file.stat().st_mode for file in (tmp_path / "out").rglob("*") if file.is_file()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}
    again = load_tokenizer(tmp_path / "out")
    assert again is not None and again.chat_template == tokenizer.chat_template


def test_a_tokenizer_that_is_only_a_sentencepiece_model(tmp_path: Path) -> None:
    import sentencepiece

    folder = save_model(tiny_llama(), tmp_path / "out").folder
    (tmp_path / "news.txt").write_text("\n".join(demo_articles("calibration")[:20]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        input=str(tmp_path / "news.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(folder)
    text = "The news of the day."
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    save_model(tiny_llama(), tmp_path / "again", tokenizer=tokenizer)
    again = load_tokenizer(tmp_path / "again")
    assert again is not None and again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_an_output_that_cannot_work_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("words")
    with pytest.raises(InputError, match=r"t\.txt is not a folder"):
        check_output(tmp_path / "t.txt" / "out", False)
    with pytest.raises(InputError, match=r"t\.txt is a file"):
        check_output(tmp_path / "t.txt", True)
    save_model(tiny_llama(), tmp_path / "out")
    (tmp_path / "out" / "deeper").mkdir()
    for here, folder in (("out", "."), ("out", "../out"), ("out/deeper", ".."), ("out/deeper", str(tmp_path / "out"))):
        monkeypatch.chdir(tmp_path / here)
        for overwrite in (False, True):
            with pytest.raises(InputError, match="is the current folder or a parent of it"):
                check_output(Path(folder), overwrite)


@pytest.mark.parametrize(
    "name",
    [
        *("my_eval.py", "adapter_model.safetensors", "model_backup.safetensors", "notes.index.json"),
        *("my.model", "prompt.jinja", "model.onnx.bak", "additional_chat_templates/notes.txt"),
    ],
)
def test_a_folder_with_a_file_that_no_model_has_is_not_overwritten(name: str, tmp_path: Path) -> None:
    save_model(tiny_llama(), folder := tmp_path / "out")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("weeks of work", encoding="utf-8")
    before = {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=rf"out holds '{re.escape(name)}', which optprune did not write there, so it"):
        save_model(tiny_llama(), folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / name).unlink()
    save_model(tiny_llama(), folder, overwrite=True)


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "generation_config.json", "report.json"])
def test_a_file_that_the_user_changed_is_not_overwritten(name: str, tmp_path: Path) -> None:
    save_model(tiny_llama(), folder := tmp_path / "out", files={"README.md": "a card"})
    data = (folder / name).read_bytes() if (folder / name).exists() else b"weeks of work"
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    told = "which optprune did not write there" if name == "report.json" else "was changed after optprune wrote it"
    with pytest.raises(InputError, match=f"{re.escape(name)}'.* {told}"):
        save_model(tiny_llama(), folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / name).unlink()
    save_model(tiny_llama(), folder, overwrite=True)


def test_equal_models_have_equal_records(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_model(tiny_llama(), tmp_path / name, max_shard_size="100KB")
    assert (tmp_path / "one" / WRITTEN).read_bytes() == (tmp_path / "two" / WRITTEN).read_bytes()


def test_files_of_a_model_are_known_by_its_configs_and_index(tmp_path: Path) -> None:
    """Modules of configs and of their parts, what these import, and shards by an index, with names of any kind."""
    tiny_llama().save_pretrained(folder := tmp_path / "out", max_shard_size="100KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    texts = {
        "processor_config.json": json.dumps({"image_processor": {"auto_map": {"AutoImageProcessor": "seen.Seen"}}}),
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["read.Slow", None]}}),
        "seen.py": "from .helping import help\n",
        "helping.py": "from .seen import Seen\nfrom .further import more\n",
        "further.py": "",
        "read.py": "",
        "model.safetensors.index.fp16.json": json.dumps({"weight_map": {"a": "part_a.safetensors"}}),
        "part_a.safetensors": "",
        "model.fp16-00001-of-00002.safetensors": "",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        **dict.fromkeys(["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"], ""),
    }
    (folder / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "notes.txt").write_text("weeks of work", encoding="utf-8")
    assert model_files(folder) == set(entries(folder)) - {"notes.txt"}


def test_a_folder_whose_blocks_differ_is_overwritten(tmp_path: Path) -> None:
    """It has modelling files, of which config.json names one and that one imports the others."""
    model = tiny_llama()
    shapes = Decoder(model).shapes()
    allocation = Allocation.of(
        Decoder(model), [BlockAllocation(replace(shape, mlp_width=40 + 8 * i)) for i, shape in enumerate(shapes)]
    )
    prune(model, batches(), load_recipe("fasp"), allocation=allocation)
    saved = save_model(model, folder := tmp_path / "out", max_shard_size="100KB")
    assert not saved.stock
    assert len([*folder.glob("*.py")]) > 1
    save_model(tiny_llama(), folder, overwrite=True)
    assert not [*folder.glob("*.py")]


PROJECT = {
    "config.json": json.dumps({"port": 80}),
    **dict.fromkeys(["README.md", "LICENSE", "merges.txt"], "weeks of work"),
}
"""a folder of somebody's project, whose files all have names that files of a model have"""


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"model.safetensors": ""},
        {"config.json": json.dumps({"model_type": "llama"})},
        {"config.json": json.dumps({"model_type": 3}), "model.safetensors": ""},
        {"config.json": "[]", "model.safetensors": ""},
        {"config.json": "{", "model.safetensors": ""},
        {"config.json": json.dumps({"model_type": "llama"}), "model.safetensors": ""},
        {"config.json": json.dumps({"architectures": ["LlamaForCausalLM"]}), "model.onnx": ""},
        {WRITTEN: "{}"},
        {WRITTEN: json.dumps({"files": []})},
    ],
)
def test_a_folder_of_others_is_not_overwritten(more: dict[str, str], tmp_path: Path) -> None:
    (folder := tmp_path / "project").mkdir()
    for name, text in {**PROJECT, **more}.items():
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="project has no record of what optprune wrote there"):
        save_model(tiny_llama(), folder, overwrite=True)
    assert {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()} == {**PROJECT, **more}


@pytest.mark.parametrize("inner", ["notes.txt", "linked.pyc", "folder.pyc", "a file", "a link"])
def test_compiled_modules_alone_may_lie_beside_a_model(inner: str, tmp_path: Path) -> None:
    save_model(tiny_llama(), folder := tmp_path / "out")
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "own.cpython-311.pyc").write_text("compiled", encoding="utf-8")
    cache = folder / "__pycache__"
    if inner == "a file":
        cache.write_text("weeks of work", encoding="utf-8")
    elif inner == "a link":
        cache.symlink_to(theirs)
    else:
        cache.mkdir()
        (cache / "own.cpython-311.pyc").write_text("compiled", encoding="utf-8")
        save_model(tiny_llama(), folder, overwrite=True)
        assert not cache.exists()
        cache.mkdir()
        {
            "notes.txt": lambda file: file.write_text("weeks of work", encoding="utf-8"),
            "linked.pyc": lambda file: file.symlink_to(theirs / "own.cpython-311.pyc"),
            "folder.pyc": lambda file: file.mkdir(),
        }[inner](cache / inner)
    named = "__pycache__" if inner.startswith("a ") else f"__pycache__/{inner}"
    with pytest.raises(InputError, match=f"out holds '{named}', which optprune did not write there, so it"):
        save_model(tiny_llama(), folder, overwrite=True)
    assert os.path.lexists(folder / named)


@pytest.mark.parametrize(
    "name", ["../beside.txt", "../../beside.txt", "inner/x.txt", "/beside.txt", "..", ".", "", "a\\b"]
)
def test_a_text_beside_the_output_is_not_written(name: str, tmp_path: Path) -> None:
    name = name.replace("/beside", f"{tmp_path}/beside") if name.startswith("/") else name
    with pytest.raises(InputError, match="of a file of the folder is not plain: give it without a path") as caught:
        save_model(tiny_llama(), tmp_path / "out", files={"NOTICE": "", name: "x"})
    assert repr(name) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_saved_in_place_of_the_one_that_it_was_loaded_from(tmp_path: Path) -> None:
    """Nor in place of its teacher, or of a folder with a file that the folder links to."""
    save_model(tiny_llama(), dense := tmp_path / "models" / "dense")
    (tmp_path / "link").symlink_to(dense)
    (view := tmp_path / "view").mkdir()
    for file in dense.iterdir():
        (view / file.name).symlink_to(file)
    before = {file: file.read_bytes() for file in dense.iterdir()}
    loaded = load_model(str(dense))
    for output in (dense, tmp_path / "link", dense.parent, dense / ".." / "dense"):
        with pytest.raises(InputError, match=r"would replace the model that is read \(.*dense\): name another"):
            save_model(loaded, output, overwrite=True)
    with pytest.raises(InputError, match=r"would replace the model that is read \(.*dense\): name another"):
        save_model(tiny_llama(), dense, teacher=str(dense), overwrite=True)
    with pytest.raises(InputError, match=r"would replace the model that is read \(.*view\): name another"):
        check_apart(dense, [str(view)])
    assert {file: file.read_bytes() for file in dense.iterdir()} == before
    # An output in its folder, or one that a link there leads to, replaces none of its files.
    for output in (dense / "out", tmp_path / "out"):
        save_model(tiny_llama(), output)
    (dense / "latest").symlink_to(tmp_path / "out")
    for output in (dense / "out", tmp_path / "out"):
        save_model(loaded, output, overwrite=True)


def test_a_model_under_two_names_of_one_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a folder is mounted twice, or where case does not count."""
    save_model(tiny_llama(), tmp_path / "model")
    (tmp_path / "MODEL").mkdir()
    monkeypatch.setattr(Path, "samefile", lambda self, other: str(self).lower() == str(other).lower())
    with pytest.raises(InputError, match="would replace the model that is read"):
        check_apart(tmp_path / "MODEL", [str(tmp_path / "model")])
    check_apart(tmp_path / "other", [str(tmp_path / "model")])


def test_names_on_the_hub_and_the_demo_are_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_llama(), tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    check_apart("demo", ["demo", "owner/name", "", "x" * 5000])


NAMED = ("renamed", "model")
"""what is done to a draft at the end"""


class Flushed:
    """What is flushed to the disk, renamed and deleted, in this order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, Path]] = []
        fsync, rmtree = os.fsync, shutil.rmtree

        def flushed(number: int) -> None:
            self.done.append(("flushed", Path(f"/proc/self/fd/{number}").readlink()))
            fsync(number)

        def renaming(rename: Callable[..., Any]) -> Callable[..., Any]:
            def renamed(path: Path, target: Path, **more: Any) -> Any:
                self.done.append(("renamed", path))
                return rename(path, target, **more)

            return renamed

        def deleted(path: Path, **more: Any) -> None:
            self.done.append(("deleted", path))
            rmtree(path, **more)

        monkeypatch.setattr(os, "fsync", flushed)
        for owner, name in ((Path, "rename"), (Path, "replace"), (os, "link")):
            monkeypatch.setattr(owner, name, renaming(getattr(owner, name)))
        monkeypatch.setattr("optprune.export.place.shutil.rmtree", deleted)

    def renamed(self) -> tuple[Path, int]:
        """The path of the draft, and the place in the list at which it is renamed or gets its name."""
        [(draft, at)] = [(path, at) for at, (what, path) in enumerate(self.done) if (what, path.name) == NAMED]
        return draft, at

    def flushed(self, begin: int = 0, end: int | None = None) -> set[Path]:
        """The paths that are flushed in a part of the list."""
        return {path for what, path in self.done[begin:end] if what == "flushed"}


def test_an_output_is_on_the_disk_before_the_old_one_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder of it before it gets its name, and after that its name and those of the parents."""
    tokenizer, place = tiny_tokenizer(), tmp_path / "new" / "out"
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    save_model(tiny_llama(), place)
    seen = Flushed(monkeypatch)
    save_model(tiny_llama(), place, tokenizer=tokenizer, overwrite=True)
    draft, at = seen.renamed()
    [deleted] = [at for at, (what, path) in enumerate(seen.done) if what == "deleted" and path.name.endswith(".old")]
    assert {draft, *(draft / path.relative_to(place) for path in place.rglob("*"))} <= seen.flushed(end=at)
    assert {place.parent, tmp_path} <= seen.flushed(at, deleted)


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_file_is_on_the_disk_before_it_has_its_name(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "out.gguf"
    if there:
        place.touch()
    seen = Flushed(monkeypatch)
    export(source, place, GgufFile(), overwrite=there)
    draft, at = seen.renamed()
    assert draft in seen.flushed(end=at) and tmp_path in seen.flushed(at)


def test_a_file_that_put_in_place_gets_is_flushed_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as what is written after the check."""
    seen, draft = Flushed(monkeypatch), tmp_path / "scratch" / "model"
    (draft / "inner").mkdir(parents=True)
    (draft / "inner" / "x").write_text("x", encoding="utf-8")
    put_in_place(draft, tmp_path / "out", overwrite=False)
    _, at = seen.renamed()
    assert {draft, draft / "inner", draft / "inner" / "x"} <= seen.flushed(end=at)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_nothing_is_no_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    save_model(tiny_llama(), tmp_path / "out", check_tokens=CHECK_TOKENS)
    save_model(tiny_llama(), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("late", [False, True], ids=["after writing", "after the check"])
def test_a_disk_that_is_full_when_files_are_flushed(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems that allocate late, or that are elsewhere, say so only then."""
    save_model(tiny_llama(), tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    fsync, checked = os.fsync, list[bool]()
    compare = optprune.export.folder.compare

    def full(number: int) -> None:
        file = Path(f"/proc/self/fd/{number}").readlink()
        if checked or (not late and file.name == "config.json"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        fsync(number)

    def then_full(*args: Any) -> float:
        found = compare(*args)
        checked.append(True)
        return found

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("optprune.export.folder.compare", then_full)
    with pytest.raises(InputError, match=r"the quota of disk space is used up, so .*out was not written: make room"):
        save_model(tiny_llama(), tmp_path / "out", check_tokens=CHECK_TOKENS, overwrite=True)
    assert bool(checked) == late
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    save_model(tiny_llama(), tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    save_model(tiny_llama(), tmp_path / "link", overwrite=True, files={"second": ""})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / "second").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_model_in_float64(tmp_path: Path) -> None:
    model = tiny_llama().double()
    assert save_model(model, tmp_path / "out", check_tokens=CHECK_TOKENS).logits_difference is not None


def test_values_beyond_a_dtype_are_not_saved_as_infinity() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(
        InputError, match=r"model.norm.weight holds 1e\+06, which is beyond float16: save it as bfloat16 or"
    ):
        cast(model, torch.float16)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    cast(model, torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_a_number_that_became_infinite_in_half_precision_is_not_saved(tmp_path: Path) -> None:
    model = tiny_llama().half()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[2, 3] *= 1e9
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj.weight holds NaN or infinity, so it is not"):
        save_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_an_exported_folder_holds_no_infinity(dtype: str, tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[2, 3] = 7e4
    model.save_pretrained(tmp_path / "model")
    if dtype == "auto":
        config = (tmp_path / "model" / "config.json").read_text()
        (tmp_path / "model" / "config.json").write_text(config.replace('"float32"', '"float16"'))
    named = r"model.layers.1.mlp.down_proj.weight of .* holds 70000, which is beyond float16: load it as bfloat16"
    with pytest.raises(InputError, match=named):
        export(tmp_path / "model", tmp_path / "out", TransformersFolder(dtype=dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["opt", "qwen2"])
def test_tied_embeddings_stay_tied_in_another_dtype(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = TINY_MODELS[name]()
    assert model.config.tie_word_embeddings
    cast(model, torch.bfloat16)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head is not None and head.weight is embeddings.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == TINY_MODELS[name]().num_parameters()
    save_model(model, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_paths_may_be_texts_or_paths(tmp_path: Path) -> None:
    model = tiny_llama()
    save_model(model, str(tmp_path / "out"))
    for folder in (tmp_path / "out", str(tmp_path / "out")):
        loaded = load_model(folder)
        assert loaded.source == str(tmp_path / "out")
        assert torch.equal(loaded.model(CHECK_TOKENS).logits, model(CHECK_TOKENS).logits)


def test_a_hub_model_without_safetensors_is_refused_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def missing(where: str, **options: object) -> None:
        asked.update(options)
        raise OSError(f"{where} has no model.safetensors. Please do not set `use_safetensors=True`.")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what is beside the weights is not asked for over and over
    monkeypatch.setattr(load_module, "_config", lambda *_: (tiny_llama().config, None))
    monkeypatch.setattr(load_module.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(InputError, match=r"owner/name has no weights as safetensors; pickle files"):
        load_model("owner/name")
    assert asked["use_safetensors"] is True
