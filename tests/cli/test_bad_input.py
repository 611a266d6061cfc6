"""Bad input: one sentence on stderr, a non-zero exit, and nothing left behind."""

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from optprune.allocation.allocation import everything
from optprune.allocation.uniform import uniform
from optprune.cli import main
from optprune.export.place import record_written
from optprune.models import Decoder, Mlp
from optprune.models.checkpoint import StoredTensor
from optprune.models.sources import demo_model_file
from tests.helpers.attempts import Attempt, snapshot
from tests.helpers.tiny_models import save_tiny, tiny_llama, tiny_opt

# -- found before any weight is loaded


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "more", "reason"),
    [
        (
            {"recipe": "faspp"},
            (),
            "the recipe 'faspp' is not known (did you mean fasp?): use one of alps, alps_plus, depth, "
            "expert_frequency, experts_best, fasp, ",
        ),
        ({"recipe": "none.yaml"}, (), "none.yaml cannot be read"),
        ({}, ("--set", "dampening=1"), "no field 'dampening' (did you mean damping?): it has name, "),
        ({}, ("--set", "damping"), "'damping' is not of the form KEY=VALUE"),
        ({}, ("--set", "damping=-1"), "the recipe field 'damping' cannot be -1"),
        ({}, ("--set", "damping=[1"), "is not valid YAML"),
        ({}, ("--set", "solver=guess"), "the solver 'guess' is not known: use one of "),
        ({"sparsity": 0.2}, ("--set", "sparsity=0.3"), "'sparsity' is given twice"),
        ({"ray": "local"}, (), "under the policy pruned every block depends on those before it"),
        ({"workers": 0, "propagation": "intra"}, (), "the number of workers cannot be 0"),
        ({"ray": "local"}, (), "choose the propagation dense or intra, or --workers without --ray"),
        ({"sparsity": 1}, (), "'sparsity' cannot be 1.0"),
        ({"sparsity": 1.5}, (), "'sparsity' cannot be 1.5"),
        ({"sparsity": -0.2}, (), "'sparsity' cannot be -0.2"),
        ({"sparsity": math.nan}, (), "'sparsity' cannot be nan"),
        ({"sparsity": "much"}, (), "Invalid value for '--sparsity'"),
        (
            {"sparsity": 0.9},
            (),
            "out of reach with units 'all': they hold only 83.3% of the decoder's linear weights; lower the sparsity",
        ),
        (
            {"sparsity": 0.8, "units": "mlp"},
            (),
            "66.7% of the decoder's linear weights; lower the sparsity, or use --units all",
        ),
        ({"sparsity": 0.001}, (), "rounds to nothing"),
        ({"units": "heads"}, (), "--units cannot be 'heads' (did you mean all-heads?): use mlp, vo, "),
        ({"propagation": "backwards"}, (), "--propagation cannot be 'backwards': use dense, pruned, "),
        ({"width_multiple": 0}, (), "'allocation.multiple' cannot be 0"),
        ({"calibration": "missing.txt"}, (), "there is no text 'missing.txt': give a .txt"),
        ({"calibration": "demo:training"}, (), "use demo:calibration or demo:evaluation"),
        ({"seq_length": 513}, (), "longer than the 512 positions of the model"),
        ({"seq_length": 1}, (), "--seq-length cannot be 1"),
        ({"samples": 0}, (), "--samples cannot be 0"),
        ({"samples": 100000}, (), "fewer than the 100000 needed: lower --samples"),
        (
            {},
            ("--set", "solver={greedy_obs: {batch: many}}"),
            "option batch of greedy_obs is 'many': Input should be a",
        ),
        ({}, ("--set", "solver={greedy_obs: {batch: 1.5}}"), "option batch of greedy_obs is 1.5: Input should be a"),
        ({}, ("--set", "solver={greedy_obs: 8}"), "the options of greedy_obs are written {option: value}, not 8"),
        (
            {},
            ("--set", "solver={greedy_obs: {size: 8}}"),
            "the solver greedy_obs has no option 'size': it has batch",
        ),
        ({}, ("--set", "solver=[greedy_obs, 8]"), "a chain holds solvers, not 8"),
        (
            {},
            ("--set", "solver={restore: {factor_dtype: float8}}"),
            "the dtype 'float8' is not known (did you mean float64?): use one of float32",
        ),
        ({}, ("--set", "solver={spap: {scale: large}}"), "option scale of spap is 'large'"),
        ({}, ("--set", "damping=2001-99-99"), "the value in --set damping=2001-99-99 is not valid YAML"),
        ({}, ("--set", "refit.dampings=0.1"), "'refit.dampings' has no effect without refit.held_out: set that"),
        ({"json": "missing/record.json"}, (), "there is no folder missing"),
        ({"dtype": "float99"}, (), "--dtype cannot be 'float99' (did you mean float32?): use auto, "),
        ({"save_dtype": "float99"}, (), "--save-dtype cannot be 'float99'"),
        ({"device": "meta"}, (), "the device 'meta' is not known"),
        ({"device": "hpu"}, (), "the device 'hpu' is not known"),
        ({"device": "cpu:3"}, (), "the device 'cpu:3' is not known"),
        ({"device": "abacus"}, (), "the device 'abacus' is not known: use auto, cpu, cuda or cuda:N"),
        (
            {"recipe": "wanda", "sparsity": 0.6, "pattern": "2:5"},
            (),
            "a 2:5 pattern needs a multiple of 5 inputs, not 6",
        ),
        (
            {"pattern": "2:4"},
            (),
            "the pattern 2:4 is for single weights, but units are all: choose a recipe with units weights, such as",
        ),
        (
            {"recipe": "sparse_best"},
            ("--set", "allocation.least=0.9", "--set", "allocation.most=0.1"),
            "no layer keeps at least 0.9 and at most 0.1 of its weights: lower allocation.least, or raise "
            "allocation.most",
        ),
        (
            {"units": "blocks"},
            ("--strict", "--set", "refit.recovery=1", "--set", "refit=0.1"),
            "recovery has nothing to refit",
        ),
        ({}, ("--frobnicate",), "No such option: --frobnicate"),
    ],
)
def test_options(attempt: Attempt, options: dict[str, object], more: tuple[str, ...], reason: str) -> None:
    assert reason in attempt.fails(attempt.command(*more, **options))


@pytest.mark.usefixtures("no_weights")
def test_a_text_that_is_too_short(attempt: Attempt) -> None:
    short = attempt.folder / "short.txt"
    short.write_text("A few words.")
    sentence = attempt.fails(attempt.command(calibration=short))
    assert "room for 0 windows of 64, fewer than the 8 needed: lower --seq-length, or give a longer text" in sentence


@pytest.mark.usefixtures("no_weights")
def test_an_output_folder_that_exists(attempt: Attempt) -> None:
    save_tiny(tiny_llama(), attempt.output)
    assert "exists already: choose another, or pass --overwrite" in attempt.fails(attempt.command())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "report.json", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("there", [False, True])
def test_a_json_file_in_place_of_the_models_own(attempt: Attempt, name: str, there: bool) -> None:
    if there:
        record_written(save_tiny(tiny_llama(), attempt.output))
    file = attempt.folder / "new" / "out" / ".." / "out" / name if there else attempt.output / name
    sentence = attempt.fails(attempt.command("--overwrite", json=file))
    assert f"the JSON file {file} has a name that a file of the model in {attempt.output} may have: choose" in sentence


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["config.json", "report.json"])
def test_a_json_file_in_place_of_one_of_the_model_that_is_read(attempt: Attempt, name: str) -> None:
    model = save_tiny(tiny_llama(), attempt.folder / "mine")
    expected = f"the JSON file {model / name} has a name that a file of the model in {model} may have: choose another"
    command = ["evaluate", str(model), "--text", str(attempt.text), "--json", str(model / name)]
    assert expected in attempt.fails(command)
    assert expected in attempt.fails(["audit", str(model), "--json", str(model / name)])


@pytest.mark.usefixtures("no_weights")
def test_overwriting_something_that_is_no_model(attempt: Attempt) -> None:
    attempt.output.mkdir(parents=True)
    (attempt.output / "thesis.tex").write_text("years of work")
    assert "not overwritten" in attempt.fails(attempt.command("--overwrite"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("./missing", "there is no model folder './missing'"),
        ("missing.gguf", "there is no GGUF file missing.gguf"),
        ("", "there is no model folder ''"),
        ("modle", "there is no model folder 'modle': give a model folder, a .gguf file, a hub name (OWNER/NAME) or"),
        ("models/", "there is no model folder 'models/'"),
        ("a\\b", "there is no model folder"),
        ("optprune/modle", "there is no model folder 'optprune/modle'"),
    ],
)
def test_a_model_that_is_not_there(attempt: Attempt, source: str, reason: str) -> None:
    command = attempt.command()
    command[1] = source
    assert reason in attempt.fails(command)


@pytest.mark.usefixtures("no_weights")
def test_an_unknown_architecture(attempt: Attempt) -> None:
    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2)
    attempt.model = save_tiny(BloomForCausalLM(config), attempt.folder / "bloom")
    sentence = attempt.fails(attempt.command())
    assert "the architecture 'bloom' is not known: optprune prunes deepseek_v2, " in sentence
    assert "lacks self_attention.query_key_value (Linear)" in sentence


CODE = """
from pathlib import Path
Path("ran").touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class FooConfig(PretrainedConfig):
    model_type = "foo"
class FooTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        (
            "config.json",
            {"model_type": "foo", "auto_map": {"AutoConfig": "foo.FooConfig"}},
            "the architecture 'foo' is not known: optprune prunes deepseek_v2, ",
        ),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "FooTokenizer", "auto_map": {"AutoTokenizer": [None, "foo.FooTokenizer"]}},
            "is code in its folder, which is not run: save it as tokenizer.json",
        ),
    ],
)
def test_code_in_a_model_folder_is_not_run_whatever_is_answered(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, file: str, fields: dict[str, object], reason: str
) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    (attempt.model / "foo.py").write_text(CODE)
    known = json.loads((attempt.model / file).read_text())
    (attempt.model / file).write_text(json.dumps(known | fields))
    monkeypatch.chdir(attempt.folder)  # where the code would leave its mark
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    assert reason in attempt.fails(attempt.command())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(attempt: Attempt) -> None:
    assert "the device 'cuda' cannot be used" in attempt.fails(attempt.command(device="cuda"))


@pytest.mark.usefixtures("no_weights")
def test_recovery_that_the_architecture_does_not_know(attempt: Attempt) -> None:
    attempt.model = save_tiny(tiny_opt(), attempt.folder / "opt")
    sentence = attempt.fails(
        attempt.command("--strict", "--set", "refit.recovery=1", units="mlp", recipe="structured_best")
    )
    assert "of opt it knows self_attn where a layer is pruned, and units mlp prune none there" in sentence


@pytest.mark.usefixtures("no_weights")
def test_an_allocation_for_another_model(attempt: Attempt) -> None:
    file = attempt.folder / "allocation.json"
    file.write_text(everything(Decoder(tiny_llama(num_hidden_layers=3))).to_json())
    sentence = attempt.fails(attempt.command(allocation=file))
    assert f"the allocation file {file} does not fit: the allocation is for 3 blocks, but the model has 2" in sentence


@pytest.mark.usefixtures("no_weights")
def test_a_sparsity_beside_an_allocation_that_comes_to_one(attempt: Attempt) -> None:
    file = attempt.folder / "allocation.json"
    file.write_text(uniform(Decoder(tiny_llama()), 0.2, Mlp(), 8).to_json())
    sentence = attempt.fails(attempt.command(allocation=file, sparsity=0.3))
    assert f"the allocation file {file} already decides the sparsity: leave out --sparsity" in sentence
    assert "leave out --sparsity" in attempt.fails(attempt.command("--set", "sparsity=0.3", allocation=file))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("method", ["aqlm", "bitsandbytes"])
def test_a_quantised_checkpoint(attempt: Attempt, method: str) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    file = attempt.model / "config.json"
    config = {**json.loads(file.read_text()), "quantization_config": {"quant_method": method, "bits": 4}}
    file.write_text(json.dumps(config))
    sentence = attempt.fails(attempt.command())
    assert f"is quantised ({method}), which is not read: load the unquantised original" in sentence


@pytest.mark.usefixtures("no_weights")
def test_weights_in_pickle(attempt: Attempt) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    (attempt.model / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), attempt.model / "pytorch_model.bin")
    sentence = attempt.fails(attempt.command())
    assert "pickle files (pytorch_model.bin)" in sentence
    assert "from_pretrained(OLD).save_pretrained(NEW)" in sentence


@pytest.mark.usefixtures("no_weights")
def test_a_file_that_is_no_allocation(attempt: Attempt) -> None:
    file = attempt.folder / "allocation.json"
    file.write_text("{}")
    sentence = attempt.fails(attempt.command(allocation=file))
    assert f"the allocation file {file} cannot be used: this is not an allocation" in sentence


@pytest.mark.usefixtures("no_weights")
def test_a_model_without_a_tokenizer(attempt: Attempt) -> None:
    attempt.model = attempt.folder / "bare"
    tiny_llama().save_pretrained(attempt.model)
    assert "has no tokenizer to read text" in attempt.fails(attempt.command())


@pytest.mark.usefixtures("no_weights")
def test_a_config_that_is_not_json(attempt: Attempt) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    (attempt.model / "config.json").write_text("{")
    assert "the config of " in attempt.fails(attempt.command())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("hidden_size", "abc", "TypeError: Field 'hidden_size' expected int, got str (value: 'abc')"),
        ("num_attention_heads", 5, "The hidden size (64) is not a multiple of the number of attention heads (5)"),
        ("dtype", "float99", "no attribute 'float99'"),
    ],
)
def test_a_config_that_is_wrong(attempt: Attempt, field: str, value: object, reason: str) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    file = attempt.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    sentence = attempt.fails(attempt.command())
    assert f"the config of {attempt.model} cannot be loaded: " in sentence
    assert f"{reason}; correct config.json, or fetch it again" in sentence


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("size", [0, 3, 8, 1000, 100_000, 2_000_000])
def test_a_truncated_gguf_file(attempt: Attempt, size: int) -> None:
    attempt.model = attempt.folder / "cut.gguf"
    with demo_model_file().open("rb") as whole:
        attempt.model.write_bytes(whole.read(size))
    sentence = attempt.fails(attempt.command())
    assert f"the config of {attempt.model} cannot be loaded: " in sentence
    assert "; check that the file is whole" in sentence


# -- found in the weights


def test_weights_that_do_not_fit_into_memory(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(StoredTensor, "read", full)
    assert "the memory is not enough" in attempt.fails(attempt.command())


def test_a_truncated_safetensors_file(attempt: Attempt) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    file = attempt.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"model.safetensors of {attempt.model} is cut short" in attempt.fails(attempt.command())


def test_what_a_terminal_would_obey_is_spelled_out(attempt: Attempt) -> None:
    """In the name of a tensor, which the file brings along."""
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    file = attempt.model / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"x\x1b]0;mine\x07\x1b[31m\u202e": torch.zeros(1)}, file, {"format": "pt"})
    sentence = attempt.fails(attempt.command())
    assert r"x\x1b]0;mine\x07\x1b[31m\u202e" in sentence


def test_nan_weights(attempt: Attempt) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    attempt.model = save_tiny(broken, attempt.folder / "nan")
    sentence = attempt.fails(attempt.command())
    assert "model.layers.1.mlp.down_proj.weight of" in sentence
    assert "holds NaN or infinity" in sentence


# -- evaluate


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--text", "missing.txt"], "there is no text 'missing.txt'"),
        (
            ["--text", "TEXT", "--seq-length", "2048"],
            "longer than the 512 positions of the model: pass --seq-length 512",
        ),
        (["--text", "TEXT", "--seq-length", "64", "--windows", "9999"], "fewer than the 9999 needed: lower --windows"),
        ([], "there is nothing to measure the model on: give --text, --questions or --tasks"),
    ],
)
def test_evaluate(attempt: Attempt, options: list[str], reason: str) -> None:
    words = [str(attempt.text) if word == "TEXT" else word for word in options]
    record = attempt.folder / "record.json"
    assert reason in attempt.fails(["evaluate", str(attempt.model), *words, "--json", str(record)])


# -- audit


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("file", "reason"),
    [("kept.jpg", "must end in .png, .pdf, .svg"), ("missing/kept.png", "there is no folder"), ("kept", "must end in")],
)
def test_audit(attempt: Attempt, file: str, reason: str) -> None:
    assert reason in attempt.fails(["audit", str(attempt.model), "--plot", str(attempt.folder / file)])


def test_a_plot_without_matplotlib(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sentence = attempt.fails(["audit", str(attempt.model), "--plot", str(attempt.folder / "kept.png")])
    assert "pip install -e '.[plot]'" in sentence


# -- benchmark-model


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--prompt-tokens", "0"], "--prompt-tokens cannot be 0: it is at least 1"),
        (["--new-tokens", "-1"], "--new-tokens cannot be -1"),
        (["--batch", "0"], "--batch cannot be 0"),
        (["--repeats", "0"], "--repeats cannot be 0"),
        (["--prompt-tokens", "500", "--new-tokens", "13"], "need 513 positions, but "),
        (["--against", "./missing"], "there is no model folder './missing'"),
        (["--against", "MODEL"], "itself: name the model to compare with"),
    ],
)
def test_benchmark_model(attempt: Attempt, options: list[str], reason: str) -> None:
    words = [str(attempt.model) if word == "MODEL" else word for word in options]
    if "--prompt-tokens" not in words:
        words += ["--prompt-tokens", "8"]
    record = attempt.folder / "record.json"
    assert reason in attempt.fails(["benchmark-model", str(attempt.model), *words, "--json", str(record)])


def test_benchmark_model_in_two_dtypes(attempt: Attempt) -> None:
    half = save_tiny(tiny_llama().to(torch.bfloat16), attempt.folder / "half")  # type: ignore[arg-type]
    sentence = attempt.fails(["benchmark-model", str(attempt.model), "--against", str(half), "--prompt-tokens", "8"])
    assert f"different dtypes (float32 of {attempt.model}, bfloat16 of {half})" in sentence
    assert "choose one" in sentence


def test_unknown_words(attempt: Attempt) -> None:
    assert "No such command 'trim' (see optprune --help)" in attempt.fails(["trim"])
    assert "Missing argument 'FILE' (see optprune solve --help)" in attempt.fails(["solve"])
    assert "the recipe 'trim' is not known" in attempt.fails(["recipes", "trim"])


# -- what can go wrong on the way


@pytest.mark.parametrize("late", [False, True])
def test_a_full_disk(attempt: Attempt, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    attempt.output.parent.mkdir()  # so that there is something to leave as it was
    if late:
        written = Path.write_text

        def full(path: Path, data: str, *args: str, **kwargs: str) -> int:
            if path.name == "recipe.yaml":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return written(path, data, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", full)
    else:

        def half(_: PreTrainedModel, folder: Path, **__: Any) -> None:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half of it")
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
    sentence = attempt.fails(attempt.command(), keeps_run=True)
    assert f"the disk is full, so {attempt.output} was not written" in sentence
    assert "2 of 2 blocks are done, and kept in" in sentence


def test_a_disk_that_is_full_for_the_json_file(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    record = attempt.folder / "record.json"
    command = ["evaluate", str(attempt.model), "--text", str(attempt.text), "--seq-length", "64", "--windows", "2"]
    sentence = attempt.fails([*command, "--json", str(record)])
    assert "cannot be written (No space left on device), but the perplexity is" in sentence


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "the memory is not enough"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the memory is not enough"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory is not enough"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/some/file"),
            "/some/file cannot be used: Permission denied",
        ),
        (ZeroDivisionError("division by zero\nmore"), "ZeroDivisionError: division by zero (unexpected: "),
    ],
)
def test_what_the_machine_raises(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("optprune.pruning.run_program", fail)
    assert reason in attempt.fails(attempt.command())


def test_debugging_shows_the_traceback(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(attempt.command(recipe="none")) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("OPTPRUNE_DEBUG", "1")
    assert main(attempt.command(recipe="none")) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


# -- interruptions, for real

DEEP = 60
# A shell may start a test run with Ctrl-C switched off, and children inherit that.
LAUNCHER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from optprune.allocation.allocation import everything
from optprune.cli import main
from optprune.models import Decoder
sys.exit(main())
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("moment", "sent"),
    [("pruning, block", signal.SIGTERM), ("saving to", signal.SIGINT)],
)
def test_an_interrupted_run_leaves_nothing_but_finished_blocks(
    attempt: Attempt, moment: str, sent: signal.Signals
) -> None:
    if moment.startswith("pruning"):
        # Deep enough that the run is still in its first blocks when the signal comes.
        attempt.model = save_tiny(tiny_llama(num_hidden_layers=DEEP), attempt.folder / "deep")
    before = snapshot(attempt.folder)
    command = attempt.command("--json", str(attempt.folder / "record.json"), samples=64)
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith(moment):
                break
        process.send_signal(sent)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    run, unchecked = (attempt.output.with_name(f"{attempt.output.name}.{end}") for end in ("run", "unchecked"))
    done = len(list(run.glob("block-*.json")))
    expected = "nothing was written"
    if unchecked.exists():
        expected = f"the pruned model is in {unchecked}, and was not seen to load"
    elif run.exists():
        assert done
        expected = f"{done} of {DEEP if moment.startswith('pruning') else 2} blocks are done, and kept in {run}"
        expected += ": continue with --resume"
    assert (process.returncode, err.splitlines()[-1]) == (130, f"interrupted; {expected}")
    assert out == ""
    assert "Traceback" not in err
    left = [name for name in snapshot(attempt.folder) if not name.startswith((str(run), str(unchecked)))]
    assert set(left) - {str(attempt.output.parent)} == set(before)
