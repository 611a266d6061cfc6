"""A folder as ONNX: ONNX Runtime gives the logits of transformers, and what does not is not written."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import optprune
from optprune.cli import main
from optprune.errors import InputError, OptpruneError
from optprune.export import OnnxFolder, export, exporter, onnx_folder, save_model
from optprune.export.onnx_folder import TELEMETRY
from optprune.models import ARCHITECTURES
from tests.helpers.mixed_models import PROMPT, generated, mixed
from tests.helpers.tiny_models import ALL_MODELS, LLAMA3, save_tiny, tiny_llama, tiny_opt, tiny_sliding, tiny_tokenizer

WITHIN = 1e-3


@dataclass(frozen=True)
class Exported:
    """A pruned folder and what was made of it."""

    source: Path
    folder: Path
    program: Any


def saved(model: PreTrainedModel, folder: Path, uneven: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    if uneven:
        mixed(model)
    return save_model(model.to(dtype), folder, tokenizer=tiny_tokenizer()).folder  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """An uneven OPT in float16, exported with its cache; exporting takes seconds, so that its graph is kept."""
    place, programs = tmp_path_factory.mktemp("onnx"), []
    source = saved(tiny_opt(num_hidden_layers=4), place / "model", uneven=True, dtype=torch.float16)
    real = onnx_folder.program_of

    def recorded(model: PreTrainedModel, cache: bool) -> Any:
        programs.append(real(model, cache))
        return programs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_folder, "program_of", recorded)
        written = export(source, place / "onnx", OnnxFolder(cache=True))
    assert written.summary == "with a key/value cache" and written.logits_difference < WITHIN
    yield Exported(source, written.path, programs[0])


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def positions_of(mask: Tensor) -> Tensor:
    """The positions of tokens that padding may stand before."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def step(
    session: onnxruntime.InferenceSession, ids: Tensor, mask: Tensor, past: dict[str, Any] | None
) -> tuple[Tensor, dict[str, Any]]:
    """Logits of the last tokens of texts, and what the next step takes."""
    positions = positions_of(mask)[:, -ids.shape[1] :]
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    for one in session.get_inputs():
        if one.name not in feed:
            batch, heads, _, dim = len(ids), one.shape[1], 0, one.shape[3]
            feed[one.name] = torch.zeros(batch, heads, 0, dim).numpy() if past is None else past[one.name]
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    logits = torch.from_numpy(found.pop("logits"))
    return logits, {name.replace("present", "past_key_values"): value for name, value in found.items()}


def check_alike(source: Path, folder: Path) -> None:
    """The logits of batches of several sizes, one of them padded, read at once."""
    model, session = optprune.load_model(source, device="cpu").model.float().eval(), session_of(folder)
    generator = torch.Generator().manual_seed(1)
    for batch, length, padding in ((1, 1, 0), (1, 50, 0), (4, 9, 2)):
        ids = torch.randint(500, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        # With transformers' own positions, but beside padding, which those that are learned (GPT-2) would count:
        # there with what `generate` gives.
        own = {} if bool(mask.all()) else {"position_ids": positions_of(mask)}
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, **own).logits
        found, _ = step(session, ids, mask, None)
        assert (found - expected)[mask.bool()].abs().max() < WITHIN


def check_generates(source: Path, folder: Path) -> None:
    """The greedy tokens, one by one from the cache."""
    model, session = optprune.load_model(source, device="cpu").model.float().eval(), session_of(folder)
    said, past, new = PROMPT, None, PROMPT
    for _ in range(12):
        logits, past = step(session, new, torch.ones_like(said), past)
        new = logits[:, -1:].argmax(-1)
        said = torch.cat([said, new], dim=1)
    assert said[0].tolist() == generated(model)


@pytest.mark.e2e
def test_an_uneven_folder(uneven: Exported) -> None:
    check_alike(uneven.source, uneven.folder)
    check_generates(uneven.source, uneven.folder)
    assert len(session_of(uneven.folder).get_inputs()) == 3 + 2 * 3  # one block of four has no attention
    names = {file.name for file in uneven.folder.iterdir()}
    assert names >= {"model.onnx", "config.json", "generation_config.json", "tokenizer.json"}
    text = "The minister said"
    own = AutoTokenizer.from_pretrained(uneven.folder)
    assert own(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


@pytest.mark.e2e
def test_a_stock_folder_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = save_tiny(tiny_llama(num_hidden_layers=1), tmp_path / "model"), tmp_path / "new" / "onnx"
    words = ["export", str(source), "--format", "onnx", "--output", str(folder)]
    assert main(words) == 0
    assert "without a key/value cache\ncheck passed: logits differ by at most" in capsys.readouterr().out
    check_alike(source, folder)
    before = (folder / "model.onnx").read_bytes()
    assert main(words) == 2
    assert "exists already: choose another, or pass --overwrite" in capsys.readouterr().err
    assert (folder / "model.onnx").read_bytes() == before


@pytest.mark.e2e
def test_a_graph_that_answers_otherwise_is_not_written(
    uneven: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_folder, "program_of", lambda model, cache: uneven.program)
    other = saved(tiny_opt(seed=1, num_hidden_layers=4), tmp_path / "other", uneven=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OptpruneError, match=r"nothing was written, because the logits of ONNX Runtime differ by \d"):
        export(other, tmp_path / "new" / "onnx", OnnxFolder(cache=True))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.e2e
def test_a_cache_in_the_wrong_order_is_not_written(
    uneven: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read at once it answers rightly."""
    program = uneven.program
    outputs = {value.name: value for value in program.model.graph.outputs}
    first, third = outputs["present.1.key"], outputs["present.2.key"]
    first.name, third.name = "swapped", "present.1.key"
    first.name = "present.2.key"
    monkeypatch.setattr(onnx_folder, "program_of", lambda model, cache: program)
    try:
        with pytest.raises(OptpruneError, match="nothing was written"):
            export(uneven.source, tmp_path / "onnx", OnnxFolder(cache=True))
    finally:
        first.name, third.name = "swapped", "present.2.key"
        first.name = "present.1.key"
    assert not list(tmp_path.iterdir())


@pytest.mark.e2e
def test_weights_too_large_for_one_file_lie_beside_the_graph(
    uneven: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_folder, "program_of", lambda model, cache: uneven.program)
    monkeypatch.setattr(onnx_folder, "LARGEST", 1000)
    written = export(uneven.source, tmp_path / "onnx", OnnxFolder(cache=True))
    graph, beside = written.path / "model.onnx", written.path / "model.onnx.data"
    assert written.bytes == graph.stat().st_size + beside.stat().st_size
    weights = sum(weight.numel() for weight in optprune.load_model(uneven.source, device="cpu").model.parameters())
    assert 0.9 * 4 * weights < beside.stat().st_size <= 4 * weights
    check_generates(uneven.source, written.path)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None) -> None:
    monkeypatch.setattr(exporter, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    source = save_tiny(tiny_llama(), tmp_path / "llama")
    for output, sentence in (
        (tmp_path / "x.onnx", "ONNX is written as a folder with model.onnx in it: name a folder instead of"),
        (source, "would replace the model that is read .*llama.: name another"),
        (tmp_path, "would replace the model that is read .*llama.: name another"),
    ):
        with pytest.raises(InputError, match=sentence):
            export(source, output, OnnxFolder(), overwrite=True)
    rotary = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    moving = save_tiny(tiny_llama(**rotary), tmp_path / "moving")
    with pytest.raises(InputError, match="rotary embeddings scaled by dynamic cannot be exported to ONNX"):
        export(moving, tmp_path / "onnx", OnnxFolder())
    monkeypatch.setattr(onnx_folder, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(
        InputError,
        match=r"the package onnxscript, .* not installed: run pip install -e '\.\[onnx\]' in optprune's checkout$",
    ):
        export(source, tmp_path / "onnx", OnnxFolder())
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "moving"}


def test_options_of_another_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*words, "--format", "onnx", "--type", "q8_0"]) == 2
    assert "ONNX is written in float32, not in 'q8_0': leave out --type" in capsys.readouterr().err
    assert main([*words, "--cache"]) == 2
    assert "--cache applies to --format onnx only" in capsys.readouterr().err


def ran_at_home(tmp_path: Path, program: str, *words: str) -> list[Path]:
    """What a program writes into a home directory that was empty."""
    home = tmp_path / "home"
    home.mkdir()
    inherited = {name: value for name, value in os.environ.items() if name not in (TELEMETRY, "XDG_CACHE_HOME")}
    environment = {**inherited, "HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""}
    subprocess.run([sys.executable, "-c", program, *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    return sorted(home.rglob("*"))


@pytest.mark.slow
def test_the_telemetry_is_off_when_onnxruntime_is_imported(tmp_path: Path) -> None:
    """What ONNX Runtime writes into a home directory by itself depends on the machine, what it reads does not."""
    stand_in = tmp_path / "packages" / "onnxruntime.py"
    stand_in.parent.mkdir()
    stand_in.write_text(f"import os\nprint(os.environ.get({TELEMETRY!r}))\nraise SystemExit")
    program = (
        "import sys; from pathlib import Path; from optprune.export import onnx_folder;"
        "sys.path.insert(0, sys.argv[1]); onnx_folder._session(Path('model.onnx'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != TELEMETRY}
    words = [sys.executable, "-c", program, str(stand_in.parent)]
    assert subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.slow
def test_the_check_writes_nothing_into_the_home_directory(uneven: Exported, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from optprune.export import onnx_folder;"
        "onnx_folder._session(Path(sys.argv[1]) / 'model.onnx')"
    )
    assert ran_at_home(tmp_path, program, str(uneven.folder)) == []


def test_nothing_else_imports_onnxruntime() -> None:
    importing = re.compile(r"^\s*(import|from) onnxruntime\b", re.MULTILINE)
    files = Path(optprune.__file__).parent.rglob("*.py")
    assert [file.name for file in files if importing.search(file.read_text(encoding="utf-8"))] == ["onnx_folder.py"]


@pytest.mark.slow
def test_an_export_writes_nothing_into_the_home_directory(tmp_path: Path) -> None:
    source = save_tiny(tiny_llama(num_hidden_layers=1), tmp_path / "model")
    words = ["export", str(source), "--format", "onnx", "--output", str(tmp_path / "onnx")]
    program = "import sys; from optprune.cli import main; sys.exit(main(sys.argv[1:]))"
    assert ran_at_home(tmp_path, program, *words) == []


SCALED = {"rope_parameters": {**LLAMA3, "rope_theta": 5e4}}
MODELS = {
    **{
        name: lambda make=make: make(num_hidden_layers=4)
        for name, make in ALL_MODELS.items()
        if not (ARCHITECTURES[name].mixture or ARCHITECTURES[name].recurrent or ARCHITECTURES[name].shared)
    },
    "qwen2, sliding window": tiny_sliding,
    "llama3's rotary embeddings": lambda: tiny_llama(num_hidden_layers=4, **SCALED),
    "opt, norm after attention": lambda: tiny_opt(num_hidden_layers=4, do_layer_norm_before=False),
}


@pytest.mark.parametrize(
    ("name", "reason"), [("mixtral", "experts"), ("gemma4_text", "its blocks hand keys and values on to others")]
)
def test_what_was_not_tried_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    source = save_tiny(ALL_MODELS[name](num_hidden_layers=4), tmp_path / "model")
    with pytest.raises(InputError, match=f"a {name} model cannot be exported to ONNX, because .*{reason}"):
        export(source, tmp_path / "onnx", OnnxFolder())
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("other", [False, True], ids=["stock", "uneven, bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str, other: bool, cache: bool, tmp_path: Path) -> None:
    source = saved(MODELS[name](), tmp_path / "model", other, torch.bfloat16 if other else torch.float32)
    written = export(source, tmp_path / "onnx", OnnxFolder(cache=cache))
    check_alike(source, written.path)
    if cache:
        check_generates(source, written.path)
