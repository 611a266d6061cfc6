"""An exporter of somebody else, in a package of its own, used through the public interface; and the shipped ones."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import optprune
from optprune.cli import export as command
from optprune.cli import main
from optprune.errors import InputError, OptpruneError
from optprune.export import EXPORTERS, Exporter, GgufFile, ModelSource, TransformersFolder, export
from optprune.models import load_model
from tests.helpers.tiny_models import save_tiny, tiny_llama, tiny_opt

STRANGER = '''
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from optprune.errors import OptpruneError
from optprune.export import Draft, Exporter, ModelSource
from optprune.work import Work


@dataclass(frozen=True)
class FlatFolder(Exporter):
    """One safetensors file with the linear weights of the blocks, and a JSON file with their shapes."""

    name = "flat"
    description = "a folder for my own runtime"
    transposed: bool = False

    def unsupported(self, source):
        kind = source.config.model_type
        return None if kind == "llama" else f"my runtime runs Llama only, not {kind}: give another model"

    def write(self, source, draft, on_event):
        draft.mkdir()
        decoder = source.load().decoder()
        weights = {
            decoder.name(block, path): decoder.layer(block, path).weight.detach()
            for block in range(len(decoder.blocks))
            for path in decoder.paths(block)
        }
        if self.transposed:
            weights = {name: weight.t() for name, weight in weights.items()}
        save_file({name: weight.contiguous() for name, weight in weights.items()}, draft / "flat.safetensors")
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        (draft / "config.json").write_text(json.dumps(shapes))
        size = (draft / "flat.safetensors").stat().st_size
        return Draft(draft, size, f"{len(weights)} matrices", ("biases are left out",), expected=weights)

    def check(self, source, draft, on_event):
        stored = load_file(draft.path / "flat.safetensors")
        if not all(torch.equal(stored[name], weight) for name, weight in draft.expected.items()):
            raise OptpruneError("the weights in the file are others")
        return None

    def work(self, source):
        return Work(bytes=4.0 * source.shapes.linear_weights())
'''


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package of somebody else."""
    package = tmp_path / "packages" / "my_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "my_runtime", raising=False)
    import my_runtime  # type: ignore[import-not-found]

    return my_runtime


def test_an_exporter_of_somebody_else(stranger: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, place = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "here" / "flat"
    written = export(model, place, stranger.FlatFolder())
    assert sorted(file.name for file in place.iterdir()) == ["config.json", "flat.safetensors", "optprune.json"]
    assert written.bytes == (place / "flat.safetensors").stat().st_size and written.notes == ("biases are left out",)
    assert [phase.name for phase in written.phases] == ["saving", "checking"]
    name = "model.layers.0.mlp.down_proj"
    shape = json.loads((place / "config.json").read_text())[name]
    with pytest.raises(InputError, match="exists already: choose another, or pass --overwrite"):
        export(model, place, stranger.FlatFolder())
    with pytest.raises(InputError, match="my runtime runs Llama only, not opt: give another model"):
        export(save_tiny(tiny_opt(), tmp_path / "opt"), tmp_path / "opt-flat", stranger.FlatFolder())
    # A loaded model works too, and its options are those of the exporter.
    loaded = load_model(model, device="cpu")
    with pytest.raises(InputError, match="exists already"):
        export(loaded, place, stranger.FlatFolder(transposed=True))
    other = export(loaded, tmp_path / "turned", stranger.FlatFolder(transposed=True)).path
    assert json.loads((other / "config.json").read_text())[name] == shape[::-1]

    # A draft that fails its check is deleted, with the folders that were made for it.
    monkeypatch.setattr(stranger, "load_file", lambda file: {name: torch.zeros(1) for name in shape_names(other)})
    with pytest.raises(OptpruneError, match="the weights in the file are others"):
        export(model, tmp_path / "new" / "flat", stranger.FlatFolder())
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def shape_names(folder: Path) -> list[str]:
    return list(json.loads((folder / "config.json").read_text()))


def test_an_exporter_without_its_work_cannot_be_made() -> None:
    class Half(Exporter):
        name, description = "half", "a folder"

        def unsupported(self, source: ModelSource) -> str | None:
            return None

    with pytest.raises(TypeError, match=r"abstract methods? .*check.*work.*write"):
        Half()  # type: ignore[abstract]


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_shipped_exporter_says_its_work(name: str, tmp_path: Path) -> None:
    source = ModelSource(save_tiny(tiny_llama(), tmp_path / "model"))
    work = EXPORTERS[name]().work(source)
    largest = max(weight.numel() for weight in tiny_llama().parameters())
    assert work.bytes >= 4 * largest and work.flops >= 0
    assert EXPORTERS[name].description.startswith(("a file", "a folder"))


def test_the_command_knows_all_shipped_exporters() -> None:
    assert set(command.FORMATS) == set(EXPORTERS)


def test_a_file_that_differs_from_what_was_written_is_noticed(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    exporter = GgufFile(kind="f32")
    draft = exporter.write(ModelSource(folder), tmp_path / "x.gguf", lambda event: None)
    for lost in (draft.expected[1:], [*draft.expected, draft.expected[0].__class__("more", (1,), 0, list)]):
        changed = draft.__class__(draft.path, draft.bytes, expected=lost)
        with pytest.raises(OptpruneError, match="please report this"):
            exporter.check(ModelSource(folder), changed, lambda event: None)
    draft.path.write_bytes(draft.path.read_bytes()[:-100_000])
    with pytest.raises(OptpruneError, match="cannot be read back"):
        exporter.check(ModelSource(folder), draft, lambda event: None)


def test_a_folder_in_another_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, place = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "half"
    (model / "LICENSE").write_text("Do as you like.")
    words = ["export", str(model), "--format", "transformers", "--type", "bfloat16", "--output", str(place)]
    assert main(words) == 0
    assert "check passed: logits differ by at most" in capsys.readouterr().out
    assert optprune.load_model(place, device="cpu").model.dtype == torch.bfloat16
    assert (place / "LICENSE").read_text() == "Do as you like." and (place / "tokenizer.json").is_file()
    with pytest.raises(InputError, match="float64"):
        export(model, tmp_path / "other", TransformersFolder(dtype="float64"))


def test_a_saver_of_version_0_1_warns(tmp_path: Path) -> None:
    loaded = load_model(save_tiny(tiny_llama(), tmp_path / "model"), device="cpu")
    recipe = optprune.load_recipe("magnitude")
    window = torch.arange(10, 42)
    report = optprune.prune(loaded.model, [window[None]], recipe)
    with pytest.warns(DeprecationWarning, match="save_pruned is deprecated: call save_model"):
        saved = optprune.save_pruned(loaded, tmp_path / "out", report, recipe, window=window)
    again = optprune.save_model(loaded, tmp_path / "again", report=report, recipe=recipe, check_tokens=window[None])
    names = [sorted(file.name for file in one.folder.iterdir()) for one in (saved, again)]
    assert names[0] == names[1] and saved.logits_difference == again.logits_difference


@pytest.mark.parametrize("exporter", [GgufFile(), TransformersFolder()], ids=lambda exporter: exporter.name)
def test_a_model_that_does_not_fit_in_memory_is_refused_by_its_work(
    exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    needed = exporter.work(ModelSource(folder)).bytes
    assert needed > 0
    monkeypatch.setattr("optprune.export.exporter.free_memory", lambda: int(needed / 2))
    with pytest.raises(InputError, match=rf"writing the {exporter.noun} takes .* of memory, and .* are free"):
        export(folder, tmp_path / "new" / "out", exporter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    monkeypatch.setattr("optprune.export.exporter.free_memory", lambda: needed)
    assert exporter.unsupported(ModelSource(folder)) is None
    export(folder, tmp_path / "out", exporter)
