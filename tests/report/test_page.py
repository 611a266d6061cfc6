"""Page about a run: well formed, self-contained, with the figures of the report and no empty section."""

import re
import shlex
import sys
from dataclasses import asdict, replace
from importlib.resources import files
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

from optprune.models import BlockShape
from optprune.report import (
    BlockChange,
    EvaluationReport,
    LayerReport,
    ModelSummary,
    RecoveredPart,
    RemovedPart,
    Report,
    SpeedReport,
    page,
    parse_evaluation,
)
from optprune.report.phases import PhaseReport
from optprune.report.reading import HealingReport, HeldOutQuality, read_speed
from tests.helpers.html_pages import Element, ids, loaded, parsed, references
from tests.helpers.reports import evaluated, layer, narrowed, speed, zeroed

MODEL = ModelSummary(False, True, "bfloat16", 123456, 7 * 2**20, linear_weights=90000, linear_before=120000)
LARGEST = 1_500_000
"""the limit of bytes of a page about the largest model"""


@pytest.fixture
def measured() -> EvaluationReport:
    return parse_evaluation(evaluated(), "here")


@pytest.fixture
def fast(tmp_path) -> SpeedReport:
    import json

    file = tmp_path / "speed.json"
    file.write_text(json.dumps(speed()))
    return read_speed(file)


def made(report: Report, **more: Any) -> Element:
    return parsed(page(report, **more))


def headings(root: Element) -> set[str]:
    return {part.attributes["id"] for part in root.all("h2")}


# -- as HTML


@pytest.mark.parametrize("make", [narrowed, zeroed])
def test_it_is_well_formed_and_needs_nothing_else(make: Any, measured: EvaluationReport, fast: SpeedReport) -> None:
    text = page(make(), model=MODEL, evaluation=measured, speed=fast)
    root = parsed(text)
    assert text.startswith("<!DOCTYPE html>") and root.all("html")[0].attributes["lang"] == "en"
    assert loaded(root) == []
    names = ids(root)
    assert len(set(names)) == len(names)
    assert references(root) <= set(names) and len(references(root)) > 10
    assert [part.text for part in root.all("h1")] == [root.all("title")[0].text]
    assert {part.attributes["href"][1:] for part in root.all("nav")[0].all("a")} == headings(root)
    viewport = [part for part in root.all("meta") if part.attributes.get("name") == "viewport"]
    assert "width=device-width" in viewport[0].attributes["content"]


def test_pictures_and_tables_can_be_read_out(measured: EvaluationReport) -> None:
    root = made(zeroed(), evaluation=measured)
    pictures = root.all("svg")
    assert len(pictures) == 4
    for svg in pictures:
        title, said = svg.attributes["aria-labelledby"].split()
        assert svg.attributes["role"] == "img"
        assert len(svg.one(title).text) > 10 and len(svg.one(said).text) > 10
        assert "width" not in svg.attributes and "viewbox" in svg.attributes
    for table in root.all("table"):
        assert table.all("caption")[0].text
        assert all(cell.attributes["scope"] == "col" for cell in table.all("thead")[0].all("th"))
        assert all(row.all("th")[0].attributes["scope"] == "row" for row in table.all("tbody")[0].all("tr"))
    level = 1
    for part in root.all("h1", "h2", "h3", "h4"):
        assert int(part.tag[1]) <= level + 1
        level = int(part.tag[1])


def test_pictures_have_the_colours_of_the_page_only() -> None:
    text = page(zeroed())
    named = set(re.findall(r"--([a-z]+):", (files("optprune.report") / "page.css").read_text()))
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;\" ])", svg)
        assert set(re.findall(r"var\(--([a-z]+)\)", svg)) <= named
        assert "font-family" not in svg and "DejaVu" not in svg


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_light_and_dark_have_enough_contrast() -> None:
    style = (files("optprune.report") / "page.css").read_text()
    light, dark = style.split("prefers-color-scheme: dark")
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", scheme))
        assert len(colours) == 10
        for name in ("ink", "muted", "link", "first", "second", "third", "fourth"):
            for ground in ("page", "raised"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def test_the_same_report_gives_the_same_bytes_whatever_matplotlib_is_set_to(measured: EvaluationReport) -> None:
    first = page(zeroed(), evaluation=measured)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert page(zeroed(), evaluation=measured) == first
        assert matplotlib.rcParams["font.size"] == 20
    assert "20" + "26" not in first


def test_a_page_about_the_largest_model_is_small() -> None:
    assert len(page(zeroed(126)).encode()) < LARGEST
    assert len(page(narrowed(32)).encode()) < 200_000


# -- what it says


def test_the_headline_is_what_was_measured(measured: EvaluationReport, fast: SpeedReport) -> None:
    root = made(narrowed(), model=MODEL, evaluation=measured, speed=fast)
    assert root.all("h1")[0].text == "Small-1B, pruned by fasp"
    key = {part.all("dt")[0].text: part.all("dd")[0].text for part in root.all("dl")[0].all("div")}
    assert key["weights removed"] == "24.68%25.00% requested"
    assert key["perplexity"] == "35.0129.43 before"
    assert key["divergence"] == "0.543nats; first choice the same in 71.2%"
    assert key["decoding speed"] == "1.50 times30.0 tokens a second, 20.0 before"
    assert key["size of the weights"] == "7.0 MiB123,456 parameters"
    assert key["time"] == "16 son 4,096 tokens"
    rows = {row[0]: row[1:] for row in root.tables()["The model before and after"]}
    assert rows["decoder blocks"] == ["3", "3", ""]
    assert rows["MLP units in a block"] == ["1,536", "1,000 to 1,016", ""]
    assert rows["linear weights of the blocks"] == ["120,000", "90,000", "-25.0%"]
    assert rows["parameters in all"] == ["1,000", "123,456", "+12245.6%"]
    assert rows["files as they are stored"] == ["6.0 MiB", "7.0 MiB", ""]
    assert rows["perplexity"] == ["29.4321", "35.0123", "+19.0%"]
    assert rows["bits per byte"] == ["-", "1.2345", ""]
    assert rows["divergence, nats a prediction"] == ["0", "0.5432", ""]
    assert rows["decoding, tokens a second"] == ["20.0", "30.0", "+50.0%"]
    assert rows["prefill, tokens a second"] == ["100.0", "150.0", "+50.0%"]
    assert rows["peak memory"] == ["7.0 MiB", "7.0 MiB", ""]
    assert "heldout.txt, 10 windows of 512 tokens, 5,110 predictions, beside models/Small-1B" in root.text


def test_the_size_before_and_after_is_that_of_one_dtype() -> None:
    """Whatever the dense model's file is, as one in Q4_1 beside a folder in float32."""
    stored = parse_evaluation(evaluated(dense_parameters=2_000_000, dense_bytes=2_000_000 * 5 // 8), "here")
    held = replace(MODEL, dtype="float32", parameters=1_500_000, bytes=6_000_512)
    root = made(narrowed(parameters_before=2_000_000), model=held, evaluation=stored)
    rows = {row[0]: row[1:] for row in root.tables()["The model before and after"]}
    assert rows["parameters in all"] == ["2,000,000", "1,500,000", "-25.0%"]
    assert rows["size of the weights in float32"] == ["7.6 MiB", "5.7 MiB", "-25.0%"]
    assert rows["files as they are stored"] == ["1.2 MiB", "5.7 MiB", ""]


def test_the_size_of_the_dense_model_is_known_without_an_evaluation() -> None:
    root = made(narrowed(parameters_before=200_000), model=MODEL)
    rows = {row[0]: row[1:] for row in root.tables()["The model before and after"]}
    assert rows["parameters in all"] == ["200,000", "123,456", "-38.3%"]
    assert rows["size of the weights in bfloat16"] == ["0.4 MiB", "0.2 MiB", "-38.3%"]


def test_differences_have_standard_errors_where_they_are_known() -> None:
    known = {"surprise": 0.02, "divergence": 0.0123, "agreement": 0.011, "windows": 10}
    found = parse_evaluation(evaluated(standard_errors=known, dense_bits_per_byte=1.1), "here")
    root = made(narrowed(), model=MODEL, evaluation=found)
    rows = {row[0]: row[1:] for row in root.tables()["The model before and after"]}
    assert rows["perplexity"] == ["29.4321", "35.0123", "+19.0% ± 2.4%"]  # 0.02 of a ratio of 1.19
    assert rows["bits per byte"] == ["1.1000", "1.2345", "+12.2%"]
    assert rows["divergence, nats a prediction"] == ["0", "0.5432 ± 0.0123", ""]
    assert rows["first choice the same"] == ["100.0%", "71.2% ± 1.1%", ""]
    assert "± is the standard error over 10 windows, of differences paired." in root.text


@pytest.mark.parametrize(("begin", "said"), [("<s>", ", each begun with <s>"), ("", "")])
def test_it_is_said_what_every_window_begins_with(begin: str, said: str) -> None:
    root = made(narrowed(), evaluation=parse_evaluation(evaluated(begin=begin), "here"))
    assert f"10 windows of 512 tokens{said}, 5,110 predictions" in root.text


def test_healing_is_told_where_there_was_any() -> None:
    states = HeldOutQuality(0.5432, 35.0123), HeldOutQuality(0.4321, 32.1098)
    root = made(
        narrowed(), healing=HealingReport(12, 24576, 8192, 90.0, *states, 29.4321, zeros=1234, stopped_early=True)
    )
    assert "healing" in headings(root) and "healing" not in headings(made(narrowed()))
    rows = {row[0]: row[1:] for row in root.tables()["On 8,192 held-out tokens"]}
    assert rows["divergence, nats a prediction"] == ["0.5432", "0.4321", "0"]
    assert rows["perplexity"] == ["35.01", "32.11", "29.43"]
    assert "12 steps on 24,576 tokens, in 1 min 30 s, until held-out windows got no better" in root.text
    assert "all 1,234 zeros and all widths are unchanged" in root.text


@pytest.mark.parametrize("make", [narrowed, zeroed])
def test_every_layer_is_told_with_its_figures(make: Any) -> None:
    report = make()
    head, *rows = made(report).tables()["Every layer that was solved"]
    assert len(rows) == len(report.layers)
    for row, solved in zip(rows, report.layers, strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["layer"] == solved.name
        assert cells["kept"].replace(",", "") == f"{solved.kept} of {solved.units}"
        assert float(cells["relative error"]) == pytest.approx(solved.relative_error, rel=5e-3)
        assert float(cells["damping"]) == pytest.approx(solved.damping, rel=5e-3)
        assert cells["gap"] == ("no bound" if solved.gap is None else f"{100 * solved.gap:g}%")
        assert (cells["status"], cells["solver"]) == (solved.status, solved.solver)


def test_phases_recipe_and_environment_are_told_whole() -> None:
    report = narrowed()
    tables = made(report, model=MODEL).tables()
    assert tables["Time and largest memory of each phase"][1:] == [
        ["loading", "4.0 s", "25.0%", "3.0 MiB"],
        ["pruning", "12 s", "75.0%", "5.0 MiB"],
        ["all", "16 s", "100.0%", "5.0 MiB"],
    ]
    assert dict(tables["Every field of the recipe"][1:]) == {
        "name": "fasp",
        "summary": "MLP units by a score",
        "units": "mlp",
        "solver": '["fasp_metric", "restore"]',
        "allocation.kind": "uniform",
        "allocation.multiple": "null",
        "strict": "false",
        "sparsity": "0.25",
    }
    assert dict(tables["Inputs and versions of the run"][1:]) == {
        "model": "models/Small-1B",
        "calibration": "news.txt, 8 windows of 512 tokens, seed 3",
        "tokens": "4,096",
        "seed": "3",
        "dtype of the folder": "bfloat16",
        "optprune": "9.8.7",
        "torch": "2.99",
    }


def test_a_device_has_a_column_of_its_own() -> None:
    phases = tuple(replace(phase, device_bytes=2**30) for phase in narrowed().phases)
    head, first, *_ = made(narrowed(phases=phases)).tables()["Time and largest memory of each phase"]
    assert (head[-1], first[-1]) == ("peak on the device", "1,024.0 MiB")


# -- what each block keeps


def drawn(report: Report, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The values that stand in the panels of the pictures, by the panels' titles."""
    found: dict[str, dict[str, Any]] = {}
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        for axes in self.axes:
            steps = [list(patch.get_data().values) for patch in axes.patches]
            crosses = [int(x) for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata()]
            found[axes.get_title(loc="left")] = {"steps": steps, "crosses": crosses}
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    page(report)
    return found


def test_widths_are_drawn_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(narrowed(), monkeypatch)["MLP units"]["steps"] == [[1000, 1008, 1016], [1536] * 3]
    root = made(narrowed())
    assert root.tables()["What each block keeps, of its original count"][1:] == [
        [str(block), f"{1000 + 8 * block:,} of 1,536", "3", "64"] for block in range(3)
    ]
    assert "1,000 to 1,016 MLP units (of 1,536); all KV heads and value dimensions of a head are kept." in root.text


def test_a_uniformly_narrowed_model_shows_its_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    change = BlockChange(BlockShape(1536, 4, 64), BlockShape(1192, 2, 64))
    report = narrowed(blocks=(change,) * 3)
    panels = drawn(report, monkeypatch)
    assert panels["MLP units"]["steps"] == [[1192] * 3, [1536] * 3]
    assert panels["KV heads"]["steps"] == [[2] * 3, [4] * 3]
    assert "value dimensions of a head" not in panels
    assert "1,192 of 1,536 MLP units in every block; 2 of 4 KV heads in every block" in made(report).text


def test_removed_sub_blocks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BlockShape(1536, 3, 64)
    after = (whole, whole.without("mlp"), whole.without("attention").without("mlp"))
    removed = (RemovedPart(2, "attention", 4321, 0.125), RemovedPart(1, "mlp", 9876, 0.5))
    report = narrowed(blocks=tuple(BlockChange(whole, each) for each in after), removed=removed, layers=())
    panels = drawn(report, monkeypatch)
    assert (panels["MLP units"]["crosses"], panels["KV heads"]["crosses"]) == ([1, 2], [2])
    root = made(report)
    assert root.tables()["Sub-blocks removed whole, first to last"][1:] == [
        ["2", "attention", "4,321", "0.125"],
        ["1", "mlp", "9,876", "0.5"],
    ]
    assert "none in 2 blocks" in root.text
    rows = {row[0]: row[1:3] for row in root.tables()["The model before and after"]}
    assert rows["decoder blocks"] == ["3", "2"]


def test_shares_of_zeros_are_drawn_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = drawn(zeroed(), monkeypatch)
    assert panels["mlp.gate_proj"]["steps"][0] == [0.404, 0.414, 0.424]
    root = made(zeroed(), model=MODEL)
    head, *rows = root.tables()["Share of the weights that are not zero"]
    assert [row[head.index("mlp.gate_proj")] for row in rows] == ["40.40%", "41.40%", "42.40%"]
    assert "40.00% to 42.60% of the weights of a layer are not zero, in the pattern 2:4" in root.text
    assert "Zeros alone make a folder neither smaller nor faster" in root.text
    rows = {row[0]: row[1:] for row in root.tables()["The model before and after"]}
    assert rows["of them not zero"] == ["120,000", "90,384", "-24.7%"]
    assert "Zeros alone" not in made(narrowed(), model=MODEL).text


def test_a_model_that_kept_all_says_so() -> None:
    same = tuple(BlockChange(change.before, change.before) for change in narrowed().blocks)
    root = made(narrowed(blocks=same, layers=()))
    assert "No block changed its shape." in root.text and not root.all("svg")


# -- errors, gaps, notes


def test_certified_layers_are_counted_and_their_gaps_drawn() -> None:
    root = made(zeroed())
    assert (
        "21 of 21 layers have a proved bound: their objectives are within 3% of the optimum, half of them" in root.text
    )
    assert "gaps-title" in ids(root) and "errors-title" in ids(root)
    none = made(narrowed())
    assert "No layer has a proved bound" in none.text and "gaps-title" not in ids(none)


def test_the_largest_error_is_named_and_held_out_tokens_where_there_are_some() -> None:
    layers = (layer(0, "mlp.down_proj", relative_error=0.02), layer(1, "mlp.down_proj", relative_error=0.04))
    text = made(narrowed(layers=layers)).text
    assert "The mean relative error of 2 layers is 0.03, the largest 0.04 (model.layers.1.mlp.down_proj)." in text
    assert "held-out tokens the mean" not in text
    apart = made(narrowed(layers=tuple(replace(each, held_out_error=0.5) for each in layers)))
    assert "On held-out tokens the mean is 0.5." in apart.text
    assert "held out" in apart.tables()["Every layer that was solved"][0]


def test_dampings_fallbacks_and_notes_are_told() -> None:
    layers = (
        layer(0, "mlp.down_proj", damping=0.25, notes=("the factorisation failed: damping raised to 0.25",)),
        layer(1, "mlp.down_proj", damping=0.5, dead_inputs=7, status="step_limit"),
    )
    root = made(narrowed(layers=layers, notes=("the budget was missed",)))
    section = next(part for part in root.all("section") if part.attributes["aria-labelledby"] == "notes")
    assert "0.25 to 0.5, by layer. 7 inputs of layers were zero on every calibration token." in section.text
    assert [item.text for item in section.all("li")] == ["the budget was missed", "step limit: 1 of 2 layers"]
    assert section.tables()["Notes by layer"][1:] == [
        ["model.layers.0.mlp.down_proj", "the factorisation failed: damping raised to 0.25"]
    ]
    assert "There are no notes" not in root.text and "There are no notes" in made(narrowed()).text


def test_recovery_is_told() -> None:
    part = RecoveredPart("model.layers.0.mlp", ("mlp.down_proj",), 0.5, 0.25, 0.75, 0.375, 12, 3.0)
    root = made(narrowed(recovered=(part,)))
    (row,) = root.tables()["Relative error of the outputs of sub-modules, before and after recovery"][1:]
    assert row == ["model.layers.0.mlp", "0.5", "0.25", "0.75", "0.375", "12", "3.0 s"]
    assert "layers before recovery is" in root.text


# -- what is not there


def test_sections_are_there_with_their_data_only(measured: EvaluationReport) -> None:
    always = {"figures", "notes", "recipe", "environment", "load"}
    bare = narrowed(layers=(), blocks=(), phases=())
    assert headings(made(bare)) == always
    assert headings(made(replace(bare, layers=narrowed().layers))) == always | {"layers"}
    assert headings(made(replace(bare, phases=narrowed().phases))) == always | {"time"}
    assert headings(made(replace(bare, blocks=narrowed().blocks))) == always | {"kept"}
    assert headings(made(bare, evaluation=measured)) == always | {"predictions", "generations"}
    silent = replace(measured, generations=(), along=())
    assert headings(made(bare, evaluation=silent)) == always | {"predictions"}


def test_what_was_not_measured_is_said(measured: EvaluationReport, fast: SpeedReport) -> None:
    missing = "Perplexity and divergence are not measured during pruning"
    text = made(narrowed()).text
    assert missing in text and "Speed was not measured" in text and "there is nothing to load" in text
    text = made(narrowed(), model=MODEL, evaluation=measured, speed=fast).text
    assert missing not in text and "Speed was not measured" not in text and "nothing to load" not in text
    assert "Speed of pruned beside dense on cpu (1 thread) in float32: batch 1, prompts of 512 tokens, 32 new" in text
    alone = replace(measured, against=None, dense_perplexity=None, divergence=None, agreement=None, along=())
    rows = {row[0]: row[1:] for row in made(narrowed(), evaluation=alone).tables()["The model before and after"]}
    assert rows["perplexity"] == ["-", "35.0123", ""] and "divergence, nats a prediction" not in rows


def test_commands_are_code_with_the_names_of_the_run() -> None:
    codes = [code.text for code in made(narrowed(), folder="my runs/out").all("code")]
    assert codes == [
        "optprune report 'my runs/out' --against models/Small-1B --text heldout.txt",
        "optprune benchmark-model 'my runs/out' --against models/Small-1B --json speed.json\n"
        "optprune report 'my runs/out' --speed speed.json",
    ]
    for words in codes[1].splitlines() + codes[:1]:
        assert shlex.split(words)[2] == "my runs/out"


def test_phases_that_the_recipe_lacks_are_not_shown() -> None:
    phases = tuple(PhaseReport(name, 1.0, 2**20, None) for name in ("metric", "budget", "pruning"))
    plain = {**narrowed().recipe, "metric": "none", "allocation": {"kind": "uniform"}}
    full = {**plain, "metric": {"kind": "full"}, "allocation": {"kind": "global"}}
    found = [
        [
            row[0]
            for row in made(narrowed(recipe=recipe, phases=phases)).tables()["Time and largest memory of each phase"]
        ]
        for recipe in (plain, full)
    ]
    assert found == [["phase", "pruning", "all"], ["phase", "metric", "budget", "pruning", "all"]]


def test_the_symbols_of_an_error_are_explained() -> None:
    text = made(narrowed()).text
    for symbol in ("W is its weight before pruning", "V after", "x its input in the dense model", "E the mean over"):
        assert symbol in text


def test_how_to_load_is_the_code_for_this_folder() -> None:
    for stock in (True, False):
        code = made(narrowed(), model=replace(MODEL, stock=stock)).all("code")[-1]
        compile(code.text, "page", "exec")
        assert ("trust_remote_code=True" in code.text) != stock
        kind = "AutoTokenizer" if stock else "PreTrainedTokenizerFast"
        assert f"tokenizer = {kind}.from_pretrained(folder)" in code.text
    code = made(narrowed(), model=replace(MODEL, tokenizer=False)).all("code")[-1]
    assert "Tokenizer" not in code.text


def test_generations_stand_side_by_side(measured: EvaluationReport) -> None:
    said = [part for part in made(narrowed(), evaluation=measured).all("div") if part.attributes.get("class") == "said"]
    assert len(said) == 10
    for number, each in enumerate(said):
        assert each.all("p")[0].text == f"The minister said {number}"
        pairs = [(part.all("dt")[0].text, part.all("dd")[0].text) for part in each.all("div")]
        assert pairs == [("before", f"before {number}"), ("after", f"after {number}")]
    alone = replace(measured, generations=tuple(replace(row, dense_text=None) for row in measured.generations))
    assert "before 3" not in made(narrowed(), evaluation=alone).text


def test_without_matplotlib_tables_stand_in_place_of_pictures(
    monkeypatch: pytest.MonkeyPatch, measured: EvaluationReport
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    root = made(zeroed(), evaluation=measured)
    assert not root.all("svg", "figure")
    assert "This page was made without matplotlib, so tables replace pictures" in root.text
    hidden = [table.all("caption")[0].text for part in root.all("details") for table in part.all("table")]
    shown = set(root.tables()) - set(hidden)
    assert shown >= {
        "Share of the weights that are not zero",
        "Every layer that was solved",
        "Predictions along the context",
    }


def test_with_matplotlib_nothing_is_said_of_it() -> None:
    root = made(zeroed())
    assert "matplotlib" not in root.text
    hidden = [table.all("caption")[0].text for part in root.all("details") for table in part.all("table")]
    assert "Every layer that was solved" in hidden


# -- text from elsewhere


BAD = "<script>alert(1)</script>&amp;\"'</style></svg>{{ 7 * 7 }}"


def spoiled(value: Any) -> Any:
    """The same data with every text spoiled, and every key of those that are the user's."""
    if isinstance(value, str):
        return value + BAD
    if isinstance(value, dict):
        return {key: spoiled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(spoiled(item) for item in value)
    return value


def test_no_text_of_a_model_or_a_user_becomes_part_of_the_page(fast: SpeedReport) -> None:
    report = zeroed(notes=("a note",), calibration="a text", model="a model")
    layers = tuple(replace(each, name=each.name + BAD, solver=BAD, status=BAD, notes=(BAD,)) for each in report.layers)
    recipe = {**spoiled(report.recipe), f"field{BAD}": BAD}
    report = replace(
        report,
        model=report.model + BAD,
        recipe=recipe,
        layers=layers,
        notes=(BAD,),
        calibration=BAD,
        versions={f"torch{BAD}": BAD},
        phases=tuple(replace(phase, name=BAD) for phase in report.phases),
        removed=(RemovedPart(0, BAD, 1, 1.0),),
        recovered=(RecoveredPart(BAD, (BAD,), 1.0, 1.0, 1.0, 1.0, 1, 1.0),),
    )
    found = parse_evaluation(spoiled(evaluated()), "here")
    quick = replace(fast, device=BAD, dtype=BAD, models=tuple(replace(one, name=BAD) for one in fast.models))
    text = page(report, model=replace(MODEL, dtype=BAD), evaluation=found, speed=quick)
    root = parsed(text)
    assert loaded(root) == []
    assert "<script" not in text.lower() and "49" not in re.sub(r"<svg.*?</svg>", "", root.text[:400])
    clean = parsed(page(narrowed(), model=MODEL, evaluation=parse_evaluation(evaluated(), "here"), speed=fast))
    assert {part.tag for part in root.all()} <= {part.tag for part in clean.all()} | {"h3", "use"}
    assert root.text.count(BAD) > 60


def test_characters_that_a_page_cannot_hold_are_seen_as_such() -> None:
    text = page(narrowed(model="a\x00b\x1b[31m", calibration="half \ud800 a pair", notes=("first\nsecond",)))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", text)
    assert text.encode() and "half � a pair" in text and "first\nsecond" in text


def test_numbers_that_are_none_break_nothing() -> None:
    nan = float("nan")
    layers = (layer(0, "mlp.down_proj", relative_error=nan, damping=nan, seconds=nan, gap=float("inf")),)
    root = made(narrowed(layers=layers, seconds=nan, phases=()))
    assert "nan" not in root.text.lower().replace("finance", "")
    names = dict.fromkeys(asdict(layers[0]))
    assert names.keys() == {each.name for each in LayerReport.__dataclass_fields__.values()}
