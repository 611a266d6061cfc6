"""Saving and loading: whole or not at all, in the stock format where it can be, checked by a fresh process."""

import errno
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import optprune
from optprune.allocation import Allocation
from optprune.errors import InputError, OptpruneError
from optprune.export import GgufFile, cast, check_output, export, save_model
from optprune.export.place import Scratch, delete_left_behind
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
    with pytest.raises(InputError, match="is not a model, so it is not overwritten"):
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
(draft / "config.json").write_text("new")
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
    for folder in (place, theirs):
        folder.mkdir()
        (folder / "config.json").write_text("old")
    run = subprocess.run([sys.executable, "-c", KILLED, str(place), moment], check=False)
    assert run.returncode == -signal.SIGKILL
    (former,) = (path for path in tmp_path.glob(".out.*.old") if path != theirs)
    scratch = former.with_name(former.name.removesuffix(".old"))
    assert scratch.is_dir() and (former / "config.json").read_text() == "old"
    delete_left_behind(place, messages.append)
    note = "{} may be what was in {} before a run was killed: rename it, or delete it"
    assert not scratch.exists() and note.format(theirs, place) in messages
    assert (theirs / "config.json").read_text() == "old"
    if moment == "after":
        assert not former.exists() and f"deleting {former}, which a killed run had replaced" in messages
        assert (place / "config.json").read_text() == "new"
    else:
        assert not place.exists() and note.format(former, place) in messages
        assert (former / "config.json").read_text() == "old"


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
    """Also where an `auto_map` names other modules, and one in a repository of that name."""
    save_model(tiny_llama(), folder := tmp_path / "out")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = {"AutoConfig": "own.Own", "AutoModel": "them/my_eval--my_eval.Theirs"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": named}), encoding="utf-8")
    (folder / "own.py").write_text("import my_eval\n", encoding="utf-8")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("weeks of work", encoding="utf-8")
    before = {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=rf"out holds '{re.escape(name)}', which is not a file of a model, so it is"):
        save_model(tiny_llama(), folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / name).unlink()
    save_model(tiny_llama(), folder, overwrite=True)
    assert not (folder / "own.py").exists()


def test_a_folder_with_code_and_shards_of_its_own_is_overwritten(tmp_path: Path) -> None:
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
    save_model(tiny_llama(), folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


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
    with pytest.raises(InputError, match=r"model.norm.weight holds values beyond torch.float16"):
        cast(model, torch.float16)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    cast(model, torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


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
