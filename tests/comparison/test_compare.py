"""A comparison: what it measures, what it shares, and what it does about cells that fail."""

import copy
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

import optprune
from optprune import Recipe, Statistics
from optprune.calibration import dense_statistics
from optprune.calibration.generated import generated_windows, with_generated
from optprune.comparison import Cell, CellResult, Comparison, session
from optprune.comparison.results import Figures, Row
from optprune.errors import InputError, NumericalError
from optprune.measure import SpeedWorkload, divergence_from
from optprune.models import load_model
from optprune.report import Report
from optprune.solvers import Wanda
from optprune.texts import (
    calibration,
    calibration_batches,
    draw_windows,
    evaluation_windows,
    read_documents,
    read_texts,
    tokenise,
)
from tests.helpers.short_runs import same
from tests.helpers.two_texts import SMALL, TwoTexts, loaded


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TwoTexts:
    return TwoTexts.into(tmp_path_factory.mktemp("texts"))


@pytest.mark.e2e
def test_each_cell_is_what_its_run_alone_gives(texts: TwoTexts) -> None:
    model = loaded()
    before = copy.deepcopy(model.model)
    recipes, sparsities = ["fasp", "structured_best"], [0.2, 0.3]
    found = optprune.compare(model, recipes, sparsities, seeds=[3, 1], **texts.asked())
    assert same(model.model, before)
    assert [result.cell for result in found.results] == [
        Cell(recipe, sparsity, seed) for seed in (3, 1) for recipe in recipes for sparsity in sparsities
    ]
    tokens, told = (tokenise(model.tokenizer, read_documents(str(file))) for file in (texts.calibration, texts.text))  # type: ignore[arg-type]
    windows = evaluation_windows(told, SMALL["seq_length"], SMALL["windows"])
    for result in found.results[1:6:2]:
        cell, figures, alone = result.cell, result.figures, copy.deepcopy(before)
        recipe = optprune.load_recipe(cell.recipe, {"sparsity": cell.sparsity, "seed": cell.seed})
        report = optprune.prune(alone, calibration_batches(tokens, 8, 64, cell.seed), recipe)
        expected = divergence_from(alone, before, windows)
        assert figures is not None
        assert figures.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
        assert figures.divergence == pytest.approx(expected.divergence, rel=1e-4)
        assert (figures.agreement, figures.sparsity) == (expected.agreement, report.sparsity_reached)
        parts = [*alone.parameters(), *alone.buffers()]
        assert figures.bytes == sum(part.numel() * part.element_size() for part in parts)
        linear = [layer.weight for layer in alone.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
        assert figures.weights == sum(int(torch.count_nonzero(weight)) for weight in linear)
        assert figures.notes == report.notes
        assert figures.seconds >= result.spent > 0


def test_cells_of_a_seed_share_the_windows_that_the_dense_model_generates(texts: TwoTexts) -> None:
    model, held_out = loaded(), {"refit.held_out": 0.25}
    recipe = optprune.load_recipe("structured_uniform_best", held_out)
    found = optprune.compare(model, ["fasp", recipe], [0.3], seeds=[2], generated=4, **texts.asked())
    assert "8 windows of 64 tokens and 4 that the dense model generated; evaluated on" in found.markdown()
    fitted = draw_windows(model.tokenizer, read_texts(str(texts.calibration)), 8, 64, seed=2).batches  # type: ignore[arg-type]
    every = with_generated(fitted, generated_windows(model.model, fitted, 4, seed=2), held_out=0.25, seed=2)
    assert torch.equal(torch.cat(every)[-3:], torch.cat(fitted)[-3:])  # the text's own are held out
    told = tokenise(model.tokenizer, read_documents(str(texts.text)))  # type: ignore[arg-type]
    windows = evaluation_windows(told, SMALL["seq_length"], SMALL["windows"])
    for result, base in zip(found.results, ("fasp", recipe), strict=True):
        alone, settings = copy.deepcopy(model.model), {"sparsity": 0.3, "seed": 2}
        own = optprune.load_recipe(base, settings) if isinstance(base, str) else Recipe(dict(base), settings)
        optprune.prune(alone, every, own)
        assert result.figures is not None
        assert result.figures.divergence == pytest.approx(divergence_from(alone, model.model, windows).divergence)


@pytest.mark.e2e
@pytest.mark.parametrize("sequences", ["packed", "whole"])
def test_several_texts_are_drawn_from_by_their_shares(
    sequences: str, texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, tokenised = texts.calibration.read_text().splitlines(), list[object]()
    first, second = (tmp_path / f"{name}.jsonl" for name in ("first", "second"))
    first.write_text("\n".join(lines[:4]))
    second.write_text("\n".join(lines[4:]))
    spec, model = f"{first}=0.75,{second}=0.25", loaded()
    asked = texts.asked(calibration=spec, sequences=sequences) | {"samples": 4}
    with monkeypatch.context() as patch:
        real = calibration.tokenise
        patch.setattr(calibration, "tokenise", lambda *given: (tokenised.append(given[1]), real(*given))[1])
        found = optprune.compare(model, ["fasp"], [0.3], seeds=2, settings={"units": "mlp"}, **asked)
    assert sequences == "whole" or len(tokenised) == 2, "each text once, for all seeds"
    assert found.options["the calibration text"] == spec and found.options["the sequences"] == sequences
    told = tokenise(model.tokenizer, read_documents(str(texts.text)))  # type: ignore[arg-type]
    windows = evaluation_windows(told, SMALL["seq_length"], SMALL["windows"])
    for seed, result in enumerate(found.results):
        recipe = optprune.load_recipe("fasp", {"sparsity": 0.3, "seed": seed, "units": "mlp"})
        drawn = draw_windows(model.tokenizer, read_texts(spec), 4, 64, seed, sequences=sequences)  # type: ignore[arg-type]
        assert drawn.counts == (3, 1)
        alone = copy.deepcopy(model.model)
        optprune.prune(alone, drawn.batches, recipe)
        expected = divergence_from(alone, model.model, windows)
        assert result.figures is not None and result.figures.agreement == expected.agreement
        assert result.figures.perplexity == pytest.approx(expected.perplexity, rel=1e-6)


def test_a_deviation_is_that_of_a_sample() -> None:
    """Of 10, 12 and 17, whose mean is 13: the square root of (9 + 1 + 16) / 2."""
    figures = [Figures(value, 0.1, 0.9, 0.2, 100, 400, 1.0) for value in (10.0, 12.0, 17.0)]
    row = Row("wanda", 0.2, tuple(figures))
    assert row.deviation("perplexity") == pytest.approx(13**0.5)
    assert row.deviation("divergence") == pytest.approx(0.0)
    assert Row("wanda", 0.2, tuple(figures[:1])).deviation("perplexity") is None
    cells = [Cell("wanda", 0.2, seed) for seed in range(3)]
    results = tuple(CellResult(cell, found) for cell, found in zip(cells, figures, strict=True))
    assert "13.00 ± 3.61" in str(Comparison("tiny", figures[0], results, {}))


@pytest.mark.e2e
def test_rows_draw_the_seeds_together_and_the_dense_model_is_first(texts: TwoTexts) -> None:
    found = optprune.compare(loaded(), ["magnitude"], [0.2], seeds=3, settings={"units": "mlp"}, **texts.asked())
    dense, row = found.rows()
    assert (dense.recipe, dense.figures[0].agreement, dense.figures[0].divergence) == ("dense", 1.0, 0.0)
    values = [result.figures.perplexity for result in found.results if result.figures is not None]
    assert len(values) == 3
    assert row.mean("perplexity") == mean(values) and row.deviation("perplexity") == stdev(values)
    assert dense.deviation("perplexity") is None
    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["recipe", "requested", "seeds", "removed"] and "tokens/s" not in lines[0]
    assert lines[1].startswith("dense ")
    assert f"{mean(values):.2f} ± {stdev(values):.2f}" in lines[2]
    assert found.markdown().splitlines()[2].startswith("| recipe | requested | seeds | removed | perplexity |")
    assert f"| {mean(values):.2f} ± {stdev(values):.2f} |" in found._repr_markdown_()
    data = json.loads(found.to_json())
    assert data["rows"][1]["perplexity"] == {"mean": mean(values), "deviation": stdev(values)}
    assert data["rows"][0]["recipe"] == "dense" and len(data["cells"]) == 3


@pytest.mark.slow
def test_what_the_cells_of_a_seed_share_is_measured_once(texts: TwoTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, predicted = list[str](), list[object]()
    metrics, curve = dense_statistics.collect_metrics, dense_statistics.removal_curve
    predictions = session.DensePredictions
    for name, real in (("collect_metrics", metrics), ("removal_curve", curve)):

        def counted(*arguments: object, name: str = name, real: object = real, **more: object) -> object:
            measured.append(name)
            return real(*arguments, **more)  # type: ignore[operator]

        monkeypatch.setattr(dense_statistics, name, counted)

    def counted_predictions(*arguments: object) -> object:
        predicted.append(arguments)
        return predictions(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "DensePredictions", counted_predictions)
    optprune.compare(loaded(), ["structured_best"], [0.1, 0.2, 0.3], seeds=2, **texts.asked())
    assert measured.count("collect_metrics") == 2  # a seed draws other tokens
    assert measured.count("removal_curve") == 2 * 2 * 3  # seeds, blocks, and kinds: units, value dimensions, pairs
    assert len(predicted) == 1


@pytest.mark.e2e
def test_statistics_that_are_too_large_are_in_the_folder_meanwhile(
    texts: TwoTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = optprune.compare(loaded(), ["alps"], [0.3], **texts.asked())
    folders = list[Path]()
    shelf = dense_statistics.FolderCache

    def noted(folder: Path, facts: dict) -> object:
        folders.append(folder)
        return shelf(folder, facts)

    monkeypatch.setattr(dense_statistics, "FolderCache", noted)
    monkeypatch.setattr(session, "free_memory", lambda device: 1000)
    found = optprune.compare(loaded(), ["alps"], [0.3], folder=tmp_path / "out", **texts.asked())
    assert len(folders) == 1 and not folders[0].exists()
    assert found.results[0].figures.perplexity == expected.results[0].figures.perplexity  # type: ignore[union-attr]
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.e2e
def test_a_cell_that_fails_says_so_and_the_others_go_on(texts: TwoTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    prune = session.prune

    def failing(model, batches, recipe, **more):
        if recipe.name == "alps":
            raise NumericalError("the moments\nare damaged")
        return prune(model, batches, recipe, **more)

    monkeypatch.setattr(session, "prune", failing)
    found = optprune.compare(loaded(), ["alps", "structured_best"], [0.2, 0.7], **texts.asked())
    assert [result.figures is None for result in found.results] == [True, True, False, True]
    first, second, third = found.failures
    assert first == "alps at 0.2, seed 0: the moments are damaged" and second.startswith("alps at 0.7")
    assert third.startswith("structured_best at 0.7, seed 0: a sparsity of 0.7 is out of reach")
    lines = str(found).splitlines()
    assert [line.split()[-1] == "failed" for line in lines[1:6]] == [False, True, True, False, True]
    assert f"failed: {third}" in lines


@dataclass(frozen=True)
class Failing(Wanda):
    """A solver of one's own that fails: when it solves, or when it is asked whether it can."""

    when: str = "answer"

    def answer(self, problem: Any, start: Any) -> Any:
        return super().answer(problem, start) if self.when != "answer" else {}["nothing"]

    def unsupported(self, problem: Any) -> str | None:
        return super().unsupported(problem) if self.when != "unsupported" else {}["nothing"]


@pytest.mark.parametrize("when", ["answer", "unsupported"])
def test_a_cell_whose_own_code_fails_says_where_and_the_others_go_on(texts: TwoTexts, when: str) -> None:
    own = Recipe(name="mine", units="weights", sparsity=0.5, solver=Failing(when=when))
    found = optprune.compare(loaded(), [own, "wanda"], [0.5], **texts.asked())
    assert [result.figures is None for result in found.results] == [True, False]
    place = r"mine at 0\.5, seed 0: the code of your own in .*test_compare\.py, line \d+, raises KeyError"
    assert re.match(place, found.failures[0])


def test_an_error_of_ours_is_no_failed_cell(texts: TwoTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(session, "prune", broken)
    with pytest.raises(ZeroDivisionError):
        optprune.compare(loaded(), ["fasp"], [0.2], **texts.asked())


@pytest.mark.e2e
def test_models_are_kept_and_speed_is_measured_only_where_asked(texts: TwoTexts, tmp_path: Path) -> None:
    work = SpeedWorkload(prompt_tokens=8, new_tokens=2, repeats=1)
    more = {"folder": tmp_path / "out", "keep_models": True, "speed": work}
    found = optprune.compare(texts.model, ["fasp"], [0.2], device="cpu", **more, **texts.asked())
    figures = found.results[0].figures
    assert figures is not None and figures.prefill > 0 and figures.decode > 0  # type: ignore[operator]
    assert found.dense.prefill > 0 and "decoding, tokens/s" in str(found)  # type: ignore[operator]
    kept = tmp_path / "out" / "models" / "fasp-0.2-seed0"
    tokens = tokenise(load_model(kept).tokenizer, read_documents(str(texts.text)))  # type: ignore[arg-type]
    windows = evaluation_windows(tokens, SMALL["seq_length"], SMALL["windows"])
    assert optprune.perplexity(load_model(kept, device="cpu").model, windows).perplexity == pytest.approx(
        figures.perplexity, rel=1e-5
    )


@pytest.mark.e2e
def test_a_recipe_of_ones_own_and_a_file_may_be_compared(texts: TwoTexts, tmp_path: Path) -> None:
    own = optprune.Recipe(name="mine", units="mlp", solver="magnitude", damping=0.1)
    file = tmp_path / "other.YAML"
    file.write_text(own.to_yaml())
    found = optprune.compare(loaded(), [own, str(file)], [0.2], settings={"damping": 0.2}, **texts.asked())
    mine, other = found.results
    assert (mine.cell.recipe, other.cell.recipe) == ("mine", "other")
    assert mine.figures is not None and other.figures is not None
    assert mine.figures.perplexity == other.figures.perplexity
    assert {recipe["damping"] for recipe in found.options["the recipes"].values()} == {0.2}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"recipes": []}, "give at least one"),
        ({"recipes": ["fasp", "fasp"]}, "the recipes are fasp, fasp: give at least one, and each once"),
        ({"recipes": ["fast"]}, "the recipe 'fast' is not known"),
        ({"sparsities": [0.2, 0.2]}, "the sparsities 0.2, 0.2 repeat a value"),
        ({"sparsities": [0.2, 0.2000001]}, "the sparsities 0.2, 0.2000001 repeat a value"),
        (
            {"recipes": [Recipe(name="../fasp", units="mlp", solver="magnitude", damping=0.1)]},
            "name '../fasp' cannot be that of",
        ),
        ({"sparsities": []}, "needs at least one sparsity and one seed"),
        ({"seeds": 0}, "needs at least one sparsity and one seed"),
        ({"seeds": 2**64}, "the number of seeds cannot be 18446744073709551616: give at most 1000"),
        ({"sparsities": [1.5]}, "'sparsity' cannot be 1.5"),
        ({"settings": {"sparsity": 0.3}}, "'sparsity' differs between cells"),
        ({"settings": {"dampening": 0.3}}, "no field 'dampening'"),
        ({"keep_models": True}, "models are kept in the folder of the comparison: name a folder"),
        ({"samples": 10**6}, "the calibration text has"),
        ({"windows": 10**6}, "the evaluation text has"),
        ({"dtype": "float8"}, "the dtype 'float8' is not known"),
        ({"sequences": "loose"}, "--sequences cannot be 'loose'"),
        ({"generated": -1}, "the dense model cannot generate -1 windows: give 0 to 1000000"),
        (
            {"generated": 40, "settings": {"refit.held_out": 0.5}},
            "24 of 48 windows are held out, and only 8 are from the text: give more samples, or fewer generated",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    more: dict, reason: str, texts: TwoTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "DensePredictions", None)
    asked = texts.asked(recipes=["fasp"], sparsities=[0.2]) | more
    with pytest.raises(InputError, match=reason):
        optprune.compare(loaded(), asked.pop("recipes"), asked.pop("sparsities"), **asked)


def test_texts_with_an_article_in_common_are_refused(texts: TwoTexts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shares 6 of its 6 documents with the calibration text"):
        optprune.compare(loaded(), ["fasp"], [0.2], **texts.asked(text=str(texts.calibration)))
    shared = f"{texts.text}=0.5,{texts.calibration}=0.5"
    with pytest.raises(InputError, match=r"shares 3 of its 3 documents with the calibration text"):
        optprune.compare(loaded(), ["fasp"], [0.2], **texts.asked(calibration=shared))
    # One article among others, with other spaces, is as bad.
    mixed = tmp_path / "mixed.jsonl"
    first, other = (file.read_text().splitlines()[0] for file in (texts.calibration, texts.text))
    again = json.loads(first)["text"].replace(" ", "  ")
    mixed.write_text("\n".join([other, json.dumps({"text": again})]))
    with pytest.raises(InputError, match=r"shares 1 of its 2 documents"):
        optprune.compare(loaded(), ["fasp"], [0.2], **texts.asked(text=str(mixed)))


RUN, EACH = 7.0, 100.0
"""the seconds that every run is said to take, and everything that it need not measure"""


@pytest.mark.slow
def test_a_cell_takes_its_run_and_what_was_measured_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune, calls = session.prune, list[int]()

    def save(self: Statistics, seconds: float) -> None:
        self.seconds_saved += EACH
        if calls:  # else the model is measured for all of them, before the first
            calls[-1] += 1

    def timed(*arguments: Any, **options: Any) -> Report:
        calls.append(0)
        return replace(prune(*arguments, **options), seconds=RUN)

    monkeypatch.setattr(Statistics, "_add_saved", save)
    monkeypatch.setattr(session, "prune", timed)
    recipes = ["magnitude", "structured_best", "structured_uniform_best"]
    found = optprune.compare(loaded(), recipes, [0.2, 0.3], **TwoTexts.into(tmp_path).asked())
    cells = [result for result in found.results if result.figures is not None]
    assert len(cells) == len(calls) == 6
    assert sum(calls) > len(calls)
    for result, count in zip(cells, calls, strict=True):
        assert result.figures is not None
        assert (result.spent, result.figures.seconds) == (RUN, RUN + count * EACH)
