"""The folder of a comparison: it goes on where it was, and only as it was begun."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from filelock import FileLock

import optprune
from optprune.comparison import Comparison, picture_of, run, session
from optprune.comparison.kept_folder import ComparisonFolder
from optprune.errors import InputError
from optprune.solvers import Magnitude, Wanda
from optprune.system.interrupts import done_sentence
from tests.helpers.html_pages import ids, parsed, references
from tests.helpers.html_pages import loaded as loaded_by
from tests.helpers.two_texts import TwoTexts, loaded

RECIPES, SPARSITIES = ["fasp", "magnitude"], [0.2, 0.3]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TwoTexts:
    return TwoTexts.into(tmp_path_factory.mktemp("texts"))


def compared(texts: TwoTexts, place: Path, **more: object) -> Comparison:
    asked = texts.asked(recipes=RECIPES, sparsities=SPARSITIES, settings={"units": "mlp"}) | more
    return optprune.compare(loaded(), asked.pop("recipes"), asked.pop("sparsities"), folder=place, **asked)


@pytest.fixture(scope="module")
def finished(texts: TwoTexts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    place = tmp_path_factory.mktemp("comparisons") / "new" / "one"
    return place, compared(texts, place)


@pytest.mark.e2e
def test_it_holds_the_table_the_figures_and_the_picture(finished: tuple[Path, Comparison]) -> None:
    place, found = finished
    assert {file.name for file in place.iterdir()} == {
        *("cells", "comparison.json", "comparison.md", "comparison.html", "run.json"),
    }
    assert (place / "comparison.md").read_text() == found.markdown()
    assert (place / "comparison.json").read_text() == found.to_json()
    page = (place / "comparison.html").read_text()
    root = parsed(page)
    assert page == found.page() and loaded_by(root) == [] and references(root) <= set(ids(root))
    [picture] = root.all("svg")
    assert {"fasp", "magnitude", "dense", "seconds of pruning"} <= {part.text for part in picture.all("text")}
    assert next(iter(root.tables().values()))[0][0] == "recipe"
    best = min((row for row in found.rows() if row.sparsity == 0.2), key=lambda row: row.mean("divergence") or 0.0)
    assert f"At a sparsity of 0.2 {best.recipe} is closest to it" in root.text
    assert ElementTree.fromstring(picture_of(found)).tag.endswith("svg")


def test_a_finished_one_measures_nothing_again(
    finished: tuple[Path, Comparison], texts: TwoTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, found = finished
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    monkeypatch.setattr(session, "prune", None)
    monkeypatch.setattr(session, "DensePredictions", None)
    monkeypatch.setattr(session, "collect", None)
    assert compared(texts, place) == found
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


@pytest.mark.e2e
def test_one_that_was_stopped_goes_on(
    finished: tuple[Path, Comparison], texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune, runs = session.prune, list[tuple[str, float]]()

    def stopping(model, batches, recipe, **more):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append((recipe.name, recipe.sparsity))
        return prune(model, batches, recipe, **more)

    monkeypatch.setattr(session, "prune", stopping)
    with pytest.raises(KeyboardInterrupt):
        compared(texts, tmp_path / "out")
    assert not (tmp_path / "out" / "comparison.json").exists()
    assert len(list((tmp_path / "out" / "cells").glob("*-seed0.json"))) == 2
    runs.clear()

    def noted(model, batches, recipe, **more):
        runs.append((recipe.name, recipe.sparsity))
        return prune(model, batches, recipe, **more)

    monkeypatch.setattr(session, "prune", noted)
    found = compared(texts, tmp_path / "out")
    assert runs == [("magnitude", 0.2), ("magnitude", 0.3)]
    # But for the seconds it is what it would have been.
    of = [(each.cell, each.figures.perplexity, each.figures.divergence) for each in found.results]  # type: ignore[union-attr]
    whole = finished[1].results
    assert of == [(each.cell, each.figures.perplexity, each.figures.divergence) for each in whole]  # type: ignore[union-attr]


def test_one_that_goes_on_does_not_generate_again(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"recipes": ["magnitude"], "generated": 2, "sparsities": [0.2]}
    with monkeypatch.context() as patch:
        patch.setattr(session, "collect", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            compared(texts, tmp_path / "out", **asked)
    assert "windows for seed 0 are generated, and kept in" in done_sentence()
    assert (tmp_path / "out" / "generated-seed0.json").exists()
    monkeypatch.setattr(session, "generated_windows", None)
    assert not compared(texts, tmp_path / "out", **asked).failures
    with pytest.raises(InputError, match="the number of generated windows was 2 and is 3"):
        compared(texts, tmp_path / "out", **asked | {"generated": 3})


def _interrupt(*arguments: object, **more: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.e2e
def test_what_the_user_has_put_beside_it_stays(texts: TwoTexts, tmp_path: Path) -> None:
    place, notes = tmp_path / "out", tmp_path / "out" / "mine" / "notes.txt"
    compared(texts, place, recipes=["magnitude"], sparsities=[0.2])
    notes.parent.mkdir()
    notes.write_text("mine")
    compared(texts, place, recipes=["magnitude"], sparsities=[0.2])
    assert notes.read_text() == "mine"


def test_one_that_another_process_is_at_work_on_is_refused(texts: TwoTexts, tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "out" / "in-use")  # of another kind than ours, and so as if of another process
    (tmp_path / "out").mkdir()
    with lock, pytest.raises(InputError, match="another process is using the comparison in"):
        compared(texts, tmp_path / "out")


@pytest.mark.e2e
def test_a_cell_that_failed_is_tried_again(texts: TwoTexts, tmp_path: Path) -> None:
    for _ in range(2):
        found = compared(texts, tmp_path / "out", recipes=["structured_best"], sparsities=[0.7])
        assert len(found.failures) == 1
        assert [file.name for file in (tmp_path / "out" / "cells").iterdir()] == ["dense.json"]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"sparsities": [0.2, 0.25]}, "the sparsities was [0.2, 0.3] and is [0.2, 0.25]"),
        ({"recipes": ["fasp"]}, "has the recipes fasp, magnitude, and this command asks for fasp; nothing was changed"),
        ({"settings": {"units": "mlp", "damping": 0.02}}, "the recipes.fasp.damping was 0.01 and is 0.02"),
        ({"seeds": 2}, "the seeds was [0] and is [0, 1]"),
        ({"samples": 7}, "the samples was 8 and is 7"),
        ({"windows": 2}, "the windows evaluated was 3 and is 2"),
        ({"keep_models": True}, "whether models are kept was False and is True"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_changed_options_are_refused_by_name(
    more: dict, what: str, finished: tuple[Path, Comparison], texts: TwoTexts
) -> None:
    place, _ = finished
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=re.escape(what)):
        compared(texts, place, **more)
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


def test_another_model_of_the_same_name_is_refused(finished: tuple[Path, Comparison], texts: TwoTexts) -> None:
    other = loaded()
    other.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    asked = texts.asked(settings={"units": "mlp"}, folder=finished[0])
    with pytest.raises(InputError, match="cannot continue: the weights were others; nothing was changed"):
        optprune.compare(other, RECIPES, SPARSITIES, **asked)


@dataclass(frozen=True)
class Own(Magnitude):
    """A user's solver."""

    def answer(self, problem, start):
        return super().answer(problem, start)


def test_changed_code_of_the_users_own_solver_is_refused(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = optprune.Recipe(name="own", units="weights", solver=Own())
    asked = {"recipes": [recipe], "sparsities": [0.5], "settings": {}}
    found = compared(texts, tmp_path / "one", **asked)
    monkeypatch.setattr(session, "prune", None)
    assert compared(texts, tmp_path / "one", **asked) == found
    monkeypatch.setattr(Own, "answer", lambda self, problem, start: Wanda().answer(problem, start))
    with pytest.raises(InputError, match=f"cannot continue: the user's own code.own.{__name__}:Own was"):
        compared(texts, tmp_path / "one", **asked)


def test_a_folder_of_something_else_stays_as_it_is(texts: TwoTexts, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for place, why in ((tmp_path, "is not the folder of a comparison"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(InputError, match=why):
            compared(texts, place)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("foreign", ["cells/dense.json", "cells/x.json"])
def test_a_refused_one_that_was_killed_keeps_every_byte(
    foreign: str, finished: tuple[Path, Comparison], texts: TwoTexts, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    shutil.copytree(finished[0], place)
    killed = ComparisonFolder(place)
    killed.forget([foreign])
    (killed.work / "offload").mkdir()
    (killed.work / "offload" / "block.bin").write_text("half of a block")
    killed.release()
    (place / foreign).write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*") if path.name != "in-use"}
    with pytest.raises(InputError, match=f"{foreign} was not written by this comparison: move it away"):
        compared(texts, place)
    after = {path: path.is_file() and path.read_bytes() for path in place.rglob("*") if path.name != "in-use"}
    assert after == before


def test_one_that_could_not_begin_leaves_nothing(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise InputError("the weights are damaged")

    with monkeypatch.context() as patch:
        patch.setattr(run, "digest_of_weights", broken)
        with pytest.raises(InputError, match="the weights are damaged"):
            compared(texts, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    # What one leaves that was killed as early is no obstacle.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "in-use").touch()
    assert not compared(texts, tmp_path / "out", recipes=["magnitude"], sparsities=[0.2]).failures


@pytest.mark.slow
@pytest.mark.parametrize("name", ["magnitude-0.2-seed0", "dense"])
def test_a_damaged_cell_is_measured_again(name: str, texts: TwoTexts, tmp_path: Path) -> None:
    place, said = tmp_path / "out", list[str]()
    expected = compared(texts, place, recipes=["magnitude"], sparsities=[0.2]).results[0].figures
    file = place / "cells" / f"{name}.json"
    for text in (file.read_text()[:20], json.dumps({"cell": 1}), file.read_text().replace("1", "2")):
        file.write_text(text)
        again = compared(texts, place, recipes=["magnitude"], sparsities=[0.2], say=said.append).results[0].figures
        assert f"cells/{name}.json of {place} was damaged, so it was measured again" in said
        assert again is not None and expected is not None
        assert (again.perplexity, again.divergence) == (expected.perplexity, expected.divergence)
        said.clear()


def test_a_cell_of_an_infinite_perplexity_has_failed(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = session.Session._figures

    def destroyed(self, loaded, found, sparsity, *more):
        told = figures(self, loaded, found, sparsity, *more)
        return replace(told, perplexity=float("inf")) if sparsity else told

    monkeypatch.setattr(session.Session, "_figures", destroyed)
    found = compared(texts, tmp_path / "out", recipes=["magnitude"], sparsities=[0.2])
    assert len(found.failures) == 1 and session.DESTROYED in str(found.failures)
    assert not (tmp_path / "out" / "cells" / "magnitude-0.2-seed0.json").exists()


def test_without_matplotlib_there_is_a_table_all_the_same(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optprune.comparison.results.can_draw", lambda: False)
    compared(texts, tmp_path / "out", recipes=["magnitude"], sparsities=[0.2])
    assert {file.suffix for file in (tmp_path / "out").glob("comparison.*")} == {".md", ".json", ".html"}
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<svg" not in page and "magnitude" in page
