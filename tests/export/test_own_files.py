"""What is copied from a model's folder: files of its own, and the blobs of the hub's cache, none that a link brings."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from optprune.cli import main
from optprune.errors import InputError
from optprune.export import GgufFile, OnnxFolder, check_own_files, export, save_model
from optprune.export.source_files import origin_of
from optprune.models import load_model
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.token_batches import batches

SECRET = "a key that is not for others"
HEALING: dict[str, Any] = {
    "before": {"divergence": 0.2, "perplexity": 9.0},
    "after": {"divergence": 0.1, "perplexity": 8.0},
    "dense_perplexity": 7.0,
    "steps": 1,
    "tokens": 64,
    "held_out_tokens": 64,
}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "private" / "secret"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny(tiny_llama(), tmp_path / "model")


def whole_text(folder: Path) -> str:
    return "".join(file.read_text(errors="replace") for file in sorted(folder.rglob("*")) if file.is_file())


def test_a_licence_that_is_a_link_to_elsewhere_is_left_out(source: Path, secret: Path, tmp_path: Path) -> None:
    (source / "LICENSE").symlink_to(secret)
    (source / "NOTICE").symlink_to("notices.txt")
    (source / "notices.txt").write_text("By us.")
    (source / "COPYING").symlink_to("COPYING")
    assert dict(origin_of(str(source)).licence_files) == {"NOTICE": "By us."}
    loaded, recipe = load_model(source), load_recipe("fasp")
    report = prune(loaded.model, batches(), recipe, source=str(source))
    folder = save_model(loaded, tmp_path / "out", report=report, recipe=recipe, check_tokens=batches()[0][:1]).folder
    assert SECRET not in whole_text(folder) and not (folder / "LICENSE").exists()


def test_a_card_that_is_a_link_to_elsewhere_tells_nothing(source: Path, secret: Path) -> None:
    secret.write_text("---\nlicense: mit\n---\n")
    (source / "README.md").symlink_to(secret)
    assert origin_of(str(source)).licence is None


def test_the_texts_of_a_healed_folder_are_its_own(source: Path, secret: Path, tmp_path: Path) -> None:
    for name in ("README.md", "recipe.yaml", "report.json"):
        (source / name).symlink_to(secret)
    window = batches()[0][0]
    folder = save_model(
        load_model(source), tmp_path / "out", healing=HEALING, teacher="demo", check_tokens=window[None]
    ).folder
    assert SECRET not in whole_text(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/a.jinja"])
def test_a_template_that_is_a_link_to_elsewhere_is_refused_by_all_that_write(
    name: str, source: Path, secret: Path, tmp_path: Path
) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    for write in (
        lambda: export(source, tmp_path / "out.gguf", GgufFile()),
        lambda: export(source, tmp_path / "onnx", OnnxFolder()),
        lambda: check_own_files(source),
    ):
        with pytest.raises(InputError, match=f"{name} of .* is a link to a file outside of the folder"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "private"]


@pytest.mark.usefixtures("no_weights")
def test_prune_refuses_it_before_anything_is_loaded(attempt: Attempt, secret: Path) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "copy"))
    (attempt.model / "chat_template.jinja").symlink_to(secret)
    assert "chat_template.jinja of" in attempt.fails(attempt.command())


def test_evaluate_may_read_what_it_does_not_write(attempt: Attempt, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    for file in attempt.model.iterdir():
        (folder / file.name).symlink_to(file)
    attempt.model = folder
    assert main(attempt.evaluate()) == 0


@pytest.mark.parametrize("shared", [False, True], ids=["of the repository", "of the cache"])
def test_the_links_of_the_hubs_cache_are_followed(source: Path, tmp_path: Path, shared: bool) -> None:
    (source / "LICENSE").write_text("Do as you like.")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    cache = tmp_path / "hub"
    snapshot, blobs = cache / "models--me--tiny" / "snapshots" / "0123", cache / "models--me--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    if shared:
        (cache / "blobs").mkdir()
        (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    for number, file in enumerate(sorted(source.iterdir())):
        place = (cache / "blobs" if shared else blobs) / f"{number:064x}"
        shutil.copy(file, place)
        if shared:
            (blobs / place.name).symlink_to(place)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / place.name)
    check_own_files(snapshot)
    assert origin_of(str(snapshot)).licence_files["LICENSE"] == "Do as you like."
    (snapshot / "NOTICE").symlink_to(source / "LICENSE")
    assert "NOTICE" not in origin_of(str(snapshot)).licence_files
