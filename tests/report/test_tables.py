"""Reports, recipes and loaded models as tables: plain text, rich and HTML, without markup in their texts."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from optprune.models import LoadedModel
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.report import Report
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import tiny_llama, tiny_tokenizer

EVIL = "[red]<script>alert(1)</script>&\x1b[2J"


@pytest.fixture(scope="module")
def report() -> Report:
    recipe = load_recipe("fasp", {"refit.held_out": 0.5, "allocation.multiple": 1})
    return prune(tiny_llama(num_hidden_layers=6), batches(), recipe, source="some model", calibration="demo:speeches")


@pytest.fixture(scope="module")
def objects(report: Report) -> dict[str, Any]:
    recipe = load_recipe("fasp", {"summary": EVIL, "source": EVIL})
    return {
        "report": replace(
            report, model=EVIL, calibration=EVIL, notes=(EVIL,), layers=(replace(report.layers[0], name=EVIL),)
        ),
        "recipe": recipe,
        "model": LoadedModel(tiny_llama(), None, EVIL),
    }


def test_a_report_tells_what_was_done(report: Report) -> None:
    told = str(report)
    for text in (
        *("report of fasp", "some model", f"{report.sparsity_reached:.2%} of the linear weights (20.00% requested)"),
        *("256 tokens, demo:speeches", "over 12 layers", "held out", "converged"),
    ):
        assert text in told, told
    shown = [layer for layer in report.layers if layer.name in told]
    assert len(shown) == 10
    errors = [layer.relative_error for layer in report.layers]
    assert sorted(layer.relative_error for layer in shown) == sorted(errors)[2:]
    assert repr(report) == (
        f"Report('some model', 'fasp', {report.sparsity_reached:.2%} removed, 20.00% requested, 12 layers solved)"
    )


def test_a_report_of_nothing_has_no_table(report: Report) -> None:
    told = str(replace(report, layers=()))
    assert "layer" not in told and "mean relative error" not in told


def test_a_recipe_tells_its_fields() -> None:
    recipe = load_recipe("fasp")
    told = str(recipe)
    assert told.startswith("recipe fasp: MLP units")
    for line in ("units        all", "fit_bias     true", 'allocation   {"kind": "uniform", "multiple": null}'):
        assert line in told
    assert repr(recipe).startswith("Recipe(name='fasp', ") and "\n" not in repr(recipe)


def test_a_loaded_model_tells_what_it_is() -> None:
    tokenizer = tiny_tokenizer()
    loaded = LoadedModel(tiny_llama(), tokenizer, "folder")
    parameters = f"{sum(weight.numel() for weight in loaded.model.parameters()):,} parameters"
    assert repr(loaded) == f"LoadedModel('folder', llama, {parameters}, float32 on cpu)"
    told = str(loaded)
    assert "2, of MLP width 128" in told and "512 tokens, no chat template" in told and parameters in told
    tokenizer.chat_template = "{{ messages }}"
    assert "512 tokens, a chat template" in str(loaded)


@pytest.mark.parametrize("name", ["report", "recipe", "model"])
def test_nothing_in_a_table_is_read_as_markup(name: str, objects: dict[str, Any]) -> None:
    page = objects[name]._repr_html_()
    assert "<script" not in page and "[red]&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page
    assert page.count("<table>") == page.count("</table>") > 0
    stream = io.StringIO()
    Console(file=stream, width=200, force_terminal=True).print(objects[name])
    for text in (str(objects[name]), stream.getvalue()):
        assert "[red]<script>" in text and "\x1b[2J" not in text
    assert "\n" not in repr(objects[name])


def test_a_table_is_text_in_a_notebook_too(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    told = str(report)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(report) == told


def test_a_table_prints_alike_by_rich_and_by_print(report: Report) -> None:
    stream = io.StringIO()
    Console(file=stream, width=100, color_system=None).print(report)
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == str(report).splitlines()
