"""A dense model in fewer bits beside pruned ones: the rows, the verdict on them, the page, and that it resumes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import optprune
from optprune.comparison import Frontier, FrontierRow, Speed, frontier, frontier_run, frontier_session
from optprune.comparison.frontier import Pair
from optprune.comparison.frontier_folder import FrontierFolder
from optprune.comparison.frontier_session import Wanted
from optprune.errors import InputError, NumericalError
from optprune.measure import ModelSpeed, Repeats, SpeedWorkload, bits_per_byte, perplexity
from optprune.measure.llama_cpp import LlamaRequest, LlamaRun, run
from optprune.models import load_tokenizer
from optprune.report.frontier_picture import Mark, frontier_svg
from optprune.report.simple_page import Continuation
from optprune.texts import evaluation_windows, read_documents, tokenise
from tests.helpers.html_pages import ids, loaded, parsed, references
from tests.helpers.two_texts import TwoTexts

SMALL: dict[str, Any] = {"samples": 4, "seq_length": 48, "windows": 2, "generations": 2}
TYPES: dict[str, Any] = {"types": ["f16", "q4_0"], "pruned_types": ["q8_0"]}


def check_page(page: str) -> None:
    """One file, well formed, that loads nothing, and in which every reference leads somewhere."""
    root = parsed(page)
    assert loaded(root) == [] and len(set(ids(root))) == len(ids(root)) and references(root) <= set(ids(root))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TwoTexts:
    return TwoTexts.into(tmp_path_factory.mktemp("texts"))


def measured(texts: TwoTexts, place: Path, **more: Any) -> Frontier:
    asked = {"recipes": ["magnitude"], "sparsities": [0.3], "settings": {"units": "mlp"}, **SMALL, **TYPES, **more}
    if not asked["recipes"]:
        asked["settings"] = more.get("settings")
    calibration = asked.pop("calibration", str(texts.calibration))
    return frontier(texts.model, text=str(texts.text), calibration=calibration, folder=place, **asked)


@pytest.fixture(scope="module")
def finished(texts: TwoTexts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Frontier]:
    place = tmp_path_factory.mktemp("frontiers") / "one"
    return place, measured(texts, place, speed=SpeedWorkload(8, 4, 1, 2))


def test_every_model_is_there_in_every_type(finished: tuple[Path, Frontier]) -> None:
    _, found = finished
    names = [row.name for row in found.rows]
    assert names == ["dense-f16", "dense-q4_0-imatrix", "dense-q4_0", "magnitude-0.3-q8_0"]
    sizes = {row.name: row.bytes for row in found.rows}
    assert sizes["dense-f16"] > sizes["magnitude-0.3-q8_0"] > sizes["dense-q4_0"]
    first, *others = found.rows
    assert first.divergence is not None and first.divergence < 1e-4
    assert all(row.divergence is not None and row.divergence > 1e-3 for row in others)
    assert all(row.speed and len(row.speed.decode) == 2 and min(row.speed.prefill) > 0 for row in found.rows)
    assert all(len(row.texts) == 2 for row in found.rows) and len(found.prompts) == 2


def test_the_dense_row_has_the_dense_model_s_bits(finished: tuple[Path, Frontier], texts: TwoTexts) -> None:
    model, tokenizer = optprune.load_model(texts.model, device="cpu").model, load_tokenizer(texts.model)
    windows = evaluation_windows(tokenise(tokenizer, read_documents(str(texts.text))), 48, 2)
    expected = bits_per_byte(perplexity(model, windows), windows, tokenizer)  # type: ignore[arg-type]
    assert finished[1].rows[0].bits_per_byte == pytest.approx(expected, rel=1e-4)


def test_the_folder_holds_page_table_and_figures(finished: tuple[Path, Frontier]) -> None:
    place, found = finished
    names = {path.name for path in place.iterdir()}
    assert names == {"frontier.html", "frontier.json", "frontier.md", "pruned", "rows", "run.json", "speeds.json"}
    page = (place / "frontier.html").read_text()
    check_page(page)
    assert page.index(found.verdict()[:20]) < page.index("<svg") < page.index("<table")
    assert "Continuations" in page and "dense in q4_0 by importance" in page
    assert (place / "frontier.md").read_text() == found.markdown()
    content = json.loads((place / "frontier.json").read_text())
    assert content["verdict"] == found.verdict() and len(content["rows"]) == 4
    assert [row["dominated"] for row in content["rows"]] == [found.dominated(row) for row in found.rows]
    assert str(found).endswith(found.verdict())


def test_a_finished_one_measures_nothing_again(
    finished: tuple[Path, Frontier], texts: TwoTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, found = finished
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    for name in ("export", "DensePredictions", "measure_in_turn", "decode_into"):
        monkeypatch.setattr(frontier_session, name, None)
    assert measured(texts, place, speed=SpeedWorkload(8, 4, 1, 2)) == found
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


@pytest.mark.e2e
def test_one_that_was_stopped_goes_on_with_its_rows(
    finished: tuple[Path, Frontier], texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = frontier_session.decode_into
    done = list[Path]()

    def stopping(model: Any, file: Path, *given: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(file)
        whole(model, file, *given)

    monkeypatch.setattr(frontier_session, "decode_into", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(texts, tmp_path / "out")
    assert len(list((tmp_path / "out" / "rows").iterdir())) == 2 and not (tmp_path / "out" / "frontier.html").exists()
    done.clear()
    found = measured(texts, tmp_path / "out")
    assert len(done) == 2
    plain = [replace(row, speed=None) for row in finished[1].rows]
    assert list(found.rows) == plain


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"windows": 1}, "the windows evaluated was 2 and is 1"),
        ({"types": ["f16"]}, "the types was"),
        ({"sparsities": [0.2]}, "the sparsities was"),
        ({"settings": {"units": "mlp", "damping": 0.5}}, r"the settings.damping was None and is 0\.5"),
    ],
)
def test_other_options_are_refused(
    finished: tuple[Path, Frontier], texts: TwoTexts, more: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=f"the frontier in .* cannot continue: {what}"):
        measured(texts, finished[0], **{"speed": SpeedWorkload(8, 4, 1, 2), **more})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"types": ["q3"]}, "the type 'q3' is unknown: give f32, f16"),
        ({"types": ["f16", "q8_0", "f16"]}, "the types f16, q8_0, f16 repeat one: give each once"),
        ({"pruned_types": ["f16", "f16"], "runtime": "transformers"}, "the types f16, f16 repeat one"),
        ({"runtime": "vllm"}, r"the runtime 'vllm' is unknown: give llama\.cpp or transformers"),
        ({"calibration": None}, "recipes need sparsities and a calibration text"),
        ({"sparsities": []}, "recipes need sparsities and a calibration text"),
        ({"against": ["x/one", "y/one"]}, "the pruned folders are called one: give folders of different names"),
        ({"against": ["x/dense"]}, "give folders of different names"),
        ({"recipes": ["wandda"]}, "wandda"),
        ({"settings": {"bogus": 1}}, "bogus"),
        ({"sparsities": [1.5]}, "1.5"),
        ({"samples": 0}, "samples cannot be 0"),
        ({"generations": -1}, "generations cannot be -1"),
        (
            {"recipes": [], "sparsities": [], "settings": {"units": "mlp"}},
            "units cannot be set without recipes to prune by",
        ),
        ({"samples": 4000}, "4000"),  # more than the calibration text has
    ],
)
def test_options_that_do_not_fit_change_nothing(
    texts: TwoTexts, tmp_path: Path, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        measured(texts, tmp_path / "out", **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", ["llama.cpp", "transformers"])
@pytest.mark.parametrize("wrong", ["missing", "empty", "without weights", "without a tokenizer", "a file"])
def test_a_wrong_folder_is_refused_before_anything_is_loaded(
    texts: TwoTexts, tmp_path: Path, wrong: str, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontier_run, "load_model", None)
    place = tmp_path / "pruned"
    if wrong == "a file":
        place.write_text("none")
    elif wrong != "missing":
        place.mkdir()
    if wrong.startswith("without"):
        left_out = {"without weights": "model.safetensors", "without a tokenizer": "tokenizer.json"}[wrong]
        for file in texts.model.iterdir():
            if file.name not in (left_out, "tokenizer_config.json"):
                (place / file.name).write_bytes(file.read_bytes())
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="pruned"):
        measured(texts, tmp_path / "out", against=[place], runtime=runtime)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_error_after_the_first_row_names_the_folder_and_how_to_go_on(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, whole, made = tmp_path / "out", frontier_session.decode_into, list[Any]()

    def failing(*given: Any) -> None:
        made.append(given)
        if len(made) == 2:
            raise NumericalError("the second is NaN")
        whole(*given)

    monkeypatch.setattr(frontier_session, "decode_into", failing)
    with pytest.raises(NumericalError) as caught:
        measured(texts, place, recipes=[], sparsities=[], calibration=None)
    assert str(caught.value) == f"the second is NaN; what is finished is kept in {place}: run again to continue"
    assert len(list((place / "rows").iterdir())) == 1
    with pytest.raises(InputError, match=r"the windows evaluated was 2 and is 1; nothing was changed[^;]*$"):
        measured(texts, place, recipes=[], sparsities=[], calibration=None, windows=1)


def test_one_that_fails_before_its_first_row_leaves_no_folder(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options would only refuse the right ones."""
    monkeypatch.setattr(frontier_session, "load_model", None)
    with pytest.raises(TypeError):
        measured(texts, tmp_path / "new" / "out", recipes=[], sparsities=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.e2e
def test_folders_of_pruned_models_in_transformers(
    finished: tuple[Path, Frontier], texts: TwoTexts, tmp_path: Path
) -> None:
    """As they are stored; the divergence is that of llama.cpp's f16 row but for its rounding."""
    [pruned] = (finished[0] / "pruned" / "models").iterdir()
    more: dict[str, Any] = {"recipes": [], "sparsities": [], "calibration": None}
    found = measured(texts, tmp_path / "out", runtime="transformers", against=[pruned], **more)
    assert [row.name for row in found.rows] == ["dense-as-stored", f"{pruned.name}-as-stored"]
    assert found.rows[0].divergence == 0.0
    more["samples"] = 10**9  # nothing is calibrated, so the number is no fact of the run
    assert measured(texts, tmp_path / "out", runtime="transformers", against=[pruned], **more) == found
    again = measured(texts, tmp_path / "two", against=[pruned], pruned_types=["f32"], types=["f16"], **more)
    assert again.rows[1].bits_per_byte == pytest.approx(found.rows[1].bits_per_byte, rel=1e-5)


def test_which_rows_there_are() -> None:
    plain, weighted = Wanted(), Wanted(importance=True)
    assert [kind for kind, _ in plain.rows("dense")] == ["f16", "q8_0", "q6_K", "q5_K", "q4_K", "q4_0"]
    assert list(weighted.rows("dense"))[2:4] == [("q6_K", True), ("q6_K", False)]
    assert list(weighted.rows("pruned")) == [("f16", False), ("q8_0", False), ("q4_K", True), ("q4_0", True)]


# -- the verdict


def row(model: str, kind: str, mib: float, bits: float) -> FrontierRow:
    return FrontierRow(model, kind, False, round(mib * 2**20), bits, 9.0, 0.1, 0.9, texts=("a b c",))


DENSE = (row("dense", "f16", 200, 1.0), row("dense", "q8_0", 100, 1.01), row("dense", "q4_0", 60, 1.1))


def test_where_pruning_loses_the_verdict_says_so_and_by_how_much() -> None:
    found = Frontier("m", (*DENSE, row("p", "f16", 250, 1.08), row("p", "q8_0", 80, 1.21)))
    assert found.verdict() == (
        "It does not pay here: in as many bytes the dense model in fewer bits is better. Closest, p in f16 at "
        "250.0 MiB has 1.0800 bits per byte, the dense model 1.0000 (dense in f16, 200.0 MiB), 8.0% more for the "
        "given one."
    )
    assert [one.name for one in found.rows if found.dominated(one)] == ["p-f16", "p-q8_0"]


def test_where_pruning_wins_it_says_at_which_size() -> None:
    found = Frontier("m", (*DENSE, row("p", "q8_0", 80, 1.04), row("p", "q4_0", 50, 1.3)))
    assert found.verdict() == (
        "It pays: 1 of 1 files of the given models are better than the dense model in as many bytes. p in q8_0 at "
        "80.0 MiB has 1.0400 bits per byte, the dense model 1.0550 (on the line between dense in q4_0, 60.0 MiB, and "
        "dense in q8_0, 100.0 MiB), 1.4% fewer for the given one. Below 60.0 MiB, the size of dense in q4_0 (1.1000), "
        "only pruned files are left; the best is p in q4_0, with 1.3000 at 50.0 MiB."
    )
    assert not any(found.dominated(one) for one in found.rows)


def test_a_row_in_a_gap_between_types_does_not_win() -> None:
    """It is better than the next smaller dense file, and worse than dense files of mixed types would be there."""
    gap = row("p", "q8_0", 99, 1.05)
    [pair] = Frontier("m", (*DENSE, gap)).pairs()
    assert pair.smaller.bits_per_byte > gap.bits_per_byte > pair.expected == pytest.approx(1.1 - 0.09 * 39 / 40)
    assert "It does not pay" in Frontier("m", (*DENSE, gap)).verdict()


def test_a_dominated_dense_row_is_no_neighbour() -> None:
    worse = row("dense", "q5_0", 105, 1.5)
    [pair] = Frontier("m", (*DENSE, worse, row("p", "q8_0", 99.9, 1.2))).pairs()
    assert isinstance(pair, Pair) and pair.smaller.kind == "q8_0"  # as large, to a fifth of a percent
    assert pair.larger is not None and pair.larger.kind == "f16" and pair.excess == pytest.approx(1.2 / 1.01 - 1)
    assert "nothing to compare" in Frontier("m", DENSE).verdict()


def test_equal_rows_do_not_dominate_each_other() -> None:
    one, same, larger = row("a", "f16", 5, 1.0), row("b", "f16", 5, 1.0), row("c", "f16", 6, 1.0)
    assert not one.dominates(same) and not same.dominates(one)
    assert one.dominates(larger) and not larger.dominates(one)
    with_a_name = replace(row("a", "f16", 5, 0.9), bytes=one.bytes + 60)
    assert with_a_name.dominates(one) and not one.dominates(with_a_name)


def test_the_page_divides_texts_where_they_part_and_escapes_them() -> None:
    assert Continuation.beside("x", "the cat sat", "the car") == Continuation("x", "the ca", "t sat")
    assert Continuation.beside("x", "the", "the car") == Continuation("x", "the", "")
    own = replace(row("p", "q8_0", 80, 1.05), texts=("a b <x>",))
    page = Frontier("<m>", (*DENSE, own), prompts=("say <hi>",)).page()
    check_page(page)
    assert '<span class="same">a b </span>&lt;x&gt;' in page and "say &lt;hi&gt;" in page


def test_the_picture_names_what_is_not_dominated() -> None:
    marks = [Mark(100, 1.0, "good", dense=True, dominated=False), Mark(120, 9.0, "bad", dense=False, dominated=True)]
    svg = frontier_svg(marks, "title")
    assert svg is not None and ">good<" in svg and ">bad<" not in svg
    assert frontier_svg([], "title") is None


def test_speeds_are_kept_for_the_rows_that_were_timed_together(tmp_path: Path) -> None:
    """A model that failed before, and is there now, is timed with all others again."""
    place = FrontierFolder(tmp_path / "out")
    place.begin({})
    made = list[tuple[str, ...]]()

    def timed(*names: str) -> dict[str, Speed]:
        made.append(names)
        return {name: Speed((1.0,), (2.0,), None) for name in names}

    for names in (("a",), ("a",), ("a", "b"), ("a", "b")):
        assert set(place.speeds(list(names), lambda names=names: timed(*names))) == set(names)
    assert made == [("a",), ("a", "b")]
    place.close()


# -- llama.cpp in a process of its own


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match=r"llama\.cpp cannot run .*x\.gguf"):
        run(LlamaRequest(str(tmp_path / "x.gguf"), (1, 2, 3), 2))


def test_a_vocabulary_of_its_own_is_measured_in_its_own_tokens(texts: TwoTexts, tmp_path: Path) -> None:
    """Bits per byte are there for it, and no divergence."""
    other = tmp_path / "other"
    other.mkdir()
    for file in texts.model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text())
    # The same pieces under other names: what was the last merge is none, so that a text has more tokens.
    content["model"]["merges"].pop()
    content["added_tokens"].append({**content["added_tokens"][0], "id": 511, "content": "<other>"})
    (other / "tokenizer.json").write_text(json.dumps(content))
    more: dict[str, Any] = {"recipes": [], "sparsities": [], "calibration": None, "types": ["f32"]}
    found = measured(texts, tmp_path / "out", runtime="transformers", against=[other], **more)
    dense, own = found.rows
    assert own.divergence is None and own.agreement is None
    assert own.bits_per_byte == pytest.approx(dense.bits_per_byte, rel=0.2)


def test_speeds_are_of_the_rows_there_are(texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[list[str]]()

    def timed(requests: dict[str, LlamaRequest], repeats: int) -> dict[str, list[LlamaRun]]:
        seen.append([Path(request.file).name for request in requests.values()])
        assert all(Path(request.file).is_file() for request in requests.values())
        return {name: [LlamaRun(10.0 * number, 5.0, 7) for number in range(repeats)] for name in requests}

    monkeypatch.setattr(frontier_session, "measure_in_turn", timed)
    found = measured(texts, tmp_path / "out", recipes=[], sparsities=[], speed=SpeedWorkload(8, 4, 1, 3))
    assert seen == [["dense-f16.gguf", "dense-q4_0-imatrix.gguf", "dense-q4_0.gguf"]]
    assert found.rows[0].speed == Speed((0.0, 10.0, 20.0), (5.0, 5.0, 5.0), 7)
    assert "| 10 | 5.0 | 0 |" in found.markdown()
    assert torch.get_num_threads() >= 1 and not (tmp_path / "out" / "files").exists()


def test_speeds_in_transformers_are_those_of_the_models(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(models: dict[str, Any], work: SpeedWorkload) -> list[ModelSpeed]:
        return [ModelSpeed(name, Repeats((10.0,)), Repeats((5.0,)), 1, 2, 7) for name in models]

    monkeypatch.setattr(frontier_session, "measure_speed", timed)
    more: dict[str, Any] = {"recipes": [], "sparsities": [], "calibration": None, "types": ["f32"]}
    work = SpeedWorkload(8, 4, 1, 1)
    found = measured(texts, tmp_path / "out", runtime="transformers", speed=work, **more)
    assert [row.speed for row in found.rows] == [Speed(prefill=(10.0,), decode=(5.0,), peak_bytes=7)]
