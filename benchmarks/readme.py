"""Generated parts of README.md and docs/: tables of results from the rows in results/, and the reference.

The texts that `optprune recipes` prints are stored beside, which tests/cli/test_recipes_command.py checks.

    .venv/bin/python -m benchmarks.readme    # write them into the pages; tests/house/test_docs.py checks them

A cell is the mean perplexity on held-out news, with the standard deviation of its seeds; the lowest of a column, among
the cells with the most seeds, is in bold type, except the dense model. A table replaces the one of its page that has
the same first line.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

from benchmarks.common import RESULTS, markdown
from benchmarks.families import Families
from benchmarks.models import read
from benchmarks.published import Published
from benchmarks.reference_pages import KINDS, command_page, field_table, recipe_table, unit_table
from benchmarks.studies import (
    BEFORE,
    BELIEVED,
    CHOSEN_RIDGE,
    COORDINATES,
    DENSE,
    DIAGONAL,
    DIRECTIONS,
    GIVEN_RIDGE,
    HALF,
    INTRA,
    NOT_RESTORED,
    PAIRS,
    PARTIAL,
    PRUNED,
    UNCLIPPED,
    Case,
    Settings,
    half,
    paired,
    rows_of,
    steps,
    structured,
    under_intra,
)
from optprune.cli.printed_recipes import store_texts

ROOT = Path(__file__).parents[1]
SHARES = (0.1, 0.2, 0.3)
Cells = tuple[Case | None, ...]
"""the cases of a row; None is a cell that is not asked for"""
UNIFORM: Settings = {"allocation": "uniform"}


@dataclass(frozen=True)
class Table:
    """Cases by row and column, on one model; `seconds` are the columns whose times are told at the end."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, Cells], ...]
    model: str
    tokens: int
    deviations: bool = True
    count: int | None = None
    """the number of seeds that a cell need not tell"""
    seconds: tuple[int, ...] = ()

    def markdown(self) -> str:
        """The table, with rows that were made elsewhere in their place."""
        found = [[self._values(case) for case in cases] for _, cases in self.rows]
        pruned = [cells for (_, cases), cells in zip(self.rows, found, strict=True) if DENSE not in cases]
        best = [
            _least([cells[column] for cells in pruned]) for column in range(len(self.columns) - 1 - bool(self.seconds))
        ]
        lines = [
            [label, *(self._cell(values, low) for values, low in zip(cells, best, strict=True))]
            + ([self._seconds(cases)] if self.seconds else [])
            for (label, cases), cells in zip(self.rows, found, strict=True)
        ]
        return markdown([dict(zip(self.columns, line, strict=True)) for line in lines]).rstrip("\n")

    @cached_property
    def _known(self) -> list[dict]:
        return read()

    def _rows(self, case: Case | None) -> list[dict]:
        return [] if case is None else rows_of(self._known, self.model, case, self.tokens)

    def _values(self, case: Case | None) -> list[float]:
        if case is not None and case[0] == "optipfair":
            record = json.loads((RESULTS / "external_units.json").read_text(encoding="utf-8"))
            return [r["news"] for r in record["rows"] if _is(r, case[1])]
        return [row["news"] for row in self._rows(case)]

    def _cell(self, values: Sequence[float], best: float) -> str:
        if not values:
            return ""
        middle = mean(values)
        text = f"{middle:.1e}".replace("e+0", "e") if middle >= 1e5 else f"{middle:.{0 if middle >= 1000 else 1}f}"
        if len(values) > 1 and self.deviations:
            text += f" ± {stdev(values):.1f}"
        text = f"**{text}**" if middle == best else text
        return text if len(values) in (1, self.count) else f"{text} ({len(values)})"

    def _seconds(self, cases: Sequence[Case | None]) -> str:
        times = ([row["seconds"] for row in self._rows(cases[i]) if row["seconds"]] for i in self.seconds)
        return ", ".join(f"{round(mean(known), -1):.0f}" for known in times if known)


def _least(cells: Sequence[Sequence[float]]) -> float:
    """Return the smallest mean among the cells with the most seeds; fewer seeds are no comparison."""
    most = max(map(len, cells), default=0)
    return min((mean(values) for values in cells if values and len(values) == most), default=0.0)


def _is(row: dict, settings: Settings) -> bool:
    return row["optipfair"] == "weights and activations" and abs(row["removed"] - settings["sparsity"]) < 0.005


def _units(label: str, recipe: str, more: Settings | None = None) -> tuple[str, Cells]:
    """A recipe for units at every share."""
    cases = (structured(recipe, share) for share in SHARES)
    return label, tuple((name, {**settings, **(more or {})}) for name, settings in cases)


def _sparse(label: str, recipe: str, weights: Settings, pairs: Settings | None = None) -> tuple[str, Cells]:
    """A recipe for single weights at 50 percent and 2:4, under three policies."""
    first, second = HALF | weights, PAIRS | (weights if pairs is None else pairs)
    policies: tuple[Settings, ...] = ({}, INTRA, PARTIAL)
    return label, tuple((recipe, case | policy) for case in (first, second) for policy in policies)


def _own(label: str, recipe: str) -> tuple[str, Cells]:
    """A recipe for single weights at 50 percent and 2:4, under its own policy."""
    return label, (half(recipe), (recipe, PAIRS))


def _unclipped(label: str, metric: Settings) -> tuple[str, Cells]:
    """`sparse_best` as it was; at 2:4 as the ablation, which has more seeds, has it: without a budget to divide."""
    cells = list(_sparse(label, "sparse_best", UNCLIPPED | metric)[1])
    cells[3] = "sparse_best", PAIRS | UNIFORM | UNCLIPPED | metric
    return label, tuple(cells)


ON_MLPS = {"units": "mlp"} | BELIEVED | UNCLIPPED
SMOLLM2, SMALL, OPT = "SmolLM2-135M-Instruct", "small-qwen2", "small-opt-2"
HALF_STEPS, SIXTY_STEPS = steps("sparse_best", HALF), steps("sparse_best", {"sparsity": 0.6})
PAIR_STEPS = paired("sparse_best")
RECOVERED = 7
STEPS = (
    ("exact elimination, or ADMM, and a refit", 0),
    ("and rows weighed by the diagonal of S", 1),
    ("and outputs weighed by the whole of S", 2),
    ("rows weighed, one budget", 3),
    ("the whole of S, one budget", 4),
    ("and recovery", RECOVERED),
)


def _weights(label: str, step: int) -> tuple[str, Cells]:
    """A step of the ablation of single weights: at 50 and 60 percent and, where it is another, at 2:4."""
    return label, (HALF_STEPS[step], SIXTY_STEPS[step], PAIR_STEPS[step] if step in (0, 1, 2, RECOVERED) else None)


def _step(label: str, step: int) -> tuple[str, Cells]:
    """A step of the ablation: units at every share, then single weights."""
    units = tuple(steps("structured_best", {"sparsity": share, "units": "mlp"})[step] for share in SHARES)
    return label, (*units, *_weights(label, step)[1])


def _both(label: str, units: str, weights: Case | None = None, pairs: Case | None = None) -> tuple[str, Cells]:
    """A recipe for units at 20 percent beside one for single weights at 50 percent and at 2:4."""
    return label, (structured(units, 0.2), weights, pairs)


def _other(label: str, units: str, weights: str, policy: Settings) -> tuple[str, Cells]:
    """Recipes that are not ours; for single weights under a policy that is better for them than `pruned`."""
    return _both(label, units, *((name, settings | policy) for name, settings in (half(weights), (weights, PAIRS))))


SHORT = Table(
    ("perplexity on held-out news", "whole units, 20%", "single weights, 50%", "2:4"),
    (
        ("the dense model", (DENSE, DENSE, DENSE)),
        _both(
            *("`structured_best`, `sparse_best` (ours)", "structured_best"),
            *(("sparse_best", HALF), ("sparse_best", PAIRS)),
        ),
        _both("`structured_uniform_best` (ours)", "structured_uniform_best"),
        _other("OSSCAR, ALPS", "osscar", "alps", PARTIAL),
        _other("FASP (MLP units), SparseGPT", "fasp", "sparsegpt", PARTIAL),
        _other("FLAP, Wanda", "flap", "wanda", INTRA),
        _both("optipfair 0.4.2", "optipfair"),
    ),
    SMOLLM2,
    8192,
    count=3,
)
STRUCTURED_BEST = (
    _units("`structured_best`", "structured_best"),
    _units("`structured_best`, under `pruned`", "structured_best", PRUNED),
    _units("`structured_best`, rotary pairs stay", "structured_best", DIRECTIONS),
    _units("`structured_best`, rotary pairs stay, not clipped", "structured_best", DIRECTIONS | UNCLIPPED),
    _units("`structured_best`, value dimensions as coordinates, not clipped", "structured_best", BEFORE),
    _units("`structured_best`, MLP units only, without probes, not clipped", "structured_best", ON_MLPS),
)
"""the recipe as it is, and without its later parts"""
TABLES = (
    Table(
        ("recipe", "10%", "20%", "30%"),
        (
            *STRUCTURED_BEST,
            _units("`structured_uniform_best`", "structured_uniform_best"),
            _units("`spap_plus`", "spap_plus"),
            _units("`fasp`, MLP units only, with the chosen ridge", "fasp", CHOSEN_RIDGE),
            _units("`spap_plus`, with one ridge", "spap_plus", GIVEN_RIDGE),
            _units("`osscar`", "osscar"),
            _units("`spap`", "spap"),
            _units("`fasp`, MLP units only", "fasp"),
            _units("`fasp`, value dimensions too, as published", "fasp", COORDINATES),
            _units("`fasp`, MLP units only, not restored", "fasp", NOT_RESTORED),
            _units("`flap`", "flap"),
            _units("optipfair 0.4.2, with activations", "optipfair"),
            _units("`magnitude`, not restored", "magnitude"),
            _units("`random`, not restored", "random"),
        ),
        SMOLLM2,
        8192,
        count=3,
    ),
    Table(
        ("recipe", "50%", "50%, `intra`", "50%, `partial`", "2:4", "2:4, `intra`", "2:4, `partial`"),
        (
            ("`sparse_best`", (None, None, ("sparse_best", HALF), None, None, ("sparse_best", PAIRS))),
            _unclipped("`sparse_best`, not clipped", {}),
            (
                "and recovery",
                (
                    *(HALF_STEPS[RECOVERED], None, None),
                    *(PAIR_STEPS[RECOVERED], under_intra(PAIR_STEPS[RECOVERED]), None),
                ),
            ),
            _unclipped("`sparse_best`, not clipped, rows weighed by the diagonal", DIAGONAL),
            *(
                _sparse(f"`{name}`", name, PRUNED)
                for name in ("alps_plus", "alps", "fistapruner_plus", "fistapruner", "sparsegpt")
            ),
            _sparse("`wanda` (at 50 percent the same count in every row)", "wanda", {"units.weights": "rows"}, {}),
            ("`wanda` over the matrix", (("wanda", HALF), *(None,) * 5)),
            _sparse("`magnitude`", "magnitude", {}),
        ),
        SMOLLM2,
        8192,
    ),
    Table(
        ("step", "units 10%", "20%", "30%", "weights 50%", "60%", "2:4", "seconds"),
        (
            *(_step(label, step) for label, step in STEPS),
            (
                "value dimensions and probes, without recovery",
                (*_units("", "structured_best", BEFORE)[1], None, None, None),
            ),
            (
                "and recovery",
                (*_units("", "structured_best", BEFORE | {"refit.recovery": 1})[1], None, None, None),
            ),
            (
                "value dimensions as directions, without recovery",
                (*_units("", "structured_best", DIRECTIONS | UNCLIPPED)[1], None, None, None),
            ),
            (
                "and gradients of tokens clipped",
                (*_units("", "structured_best", DIRECTIONS)[1], None, None, None),
            ),
            (
                "and rotary pairs",
                (*_units("", "structured_best", PRUNED)[1], None, None, None),
            ),
            (
                "and half of the drift corrected for (`structured_best`, `sparse_best` with clipped gradients)",
                (*_units("", "structured_best")[1], ("sparse_best", HALF), None, ("sparse_best", PAIRS)),
            ),
        ),
        SMOLLM2,
        8192,
        seconds=(1, 3),
    ),
    Table(
        ("units removed, Qwen2", *(f"{share:.0%}" for share in SHARES)),
        (
            *STRUCTURED_BEST,
            *(_units(f"`{name}`", name) for name in ("structured_uniform_best", "spap_plus", "osscar", "spap")),
            _units("`fasp`, MLP units only", "fasp"),
            _units("`fasp`, value dimensions too, as published", "fasp", COORDINATES),
            _units("`flap`", "flap"),
        ),
        SMALL,
        8192,
        deviations=False,
        count=3,
    ),
    Table(
        ("sparse weights", "50%", "60%", "2:4"),
        (
            _weights("ADMM and a refit", 0),
            *(_weights(label, step) for label, step in STEPS[1:4]),
            _weights("the whole of S, one budget", 4),
            _weights("and recovery", RECOVERED),
            (
                "half of the drift corrected for, clipped (`sparse_best`)",
                (("sparse_best", HALF), None, ("sparse_best", PAIRS)),
            ),
        ),
        SMALL,
        8192,
        deviations=False,
        count=3,
    ),
    Table(
        ("units removed, OPT", *(f"{share:.0%}" for share in SHARES)),
        (
            _units("`structured_best`", "structured_best"),
            _units("`fasp`, value dimensions too, as published", "fasp", COORDINATES),
            *(_units(f"`{name}`", name) for name in ("spap_plus", "osscar", "structured_uniform_best", "spap")),
            _units("`fasp`, MLP units only", "fasp"),
            _units("`flap`", "flap"),
        ),
        OPT,
        8192,
        deviations=False,
        count=3,
    ),
    Table(
        ("sparse weights, OPT", "50%", "2:4"),
        (
            _own("`sparse_best`", "sparse_best"),
            (
                "`sparse_best`, diagonal metric, not clipped, under `pruned` and `intra`",
                (
                    ("sparse_best", HALF | DIAGONAL | UNCLIPPED),
                    under_intra(("sparse_best", PAIRS | DIAGONAL | UNCLIPPED)),
                ),
            ),
            *(
                _own(f"`{name}`", name)
                for name in ("alps_plus", "alps", "fistapruner_plus", "fistapruner", "sparsegpt")
            ),
            _own("`wanda`, over rows", "wanda"),
            ("`wanda`, over the matrix", (("wanda", HALF), None)),
        ),
        OPT,
        8192,
        deviations=False,
        count=3,
    ),
)


@dataclass(frozen=True)
class Written:
    """The table that a benchmark wrote."""

    name: str

    def markdown(self) -> str:
        """Return the rows as Markdown."""
        return markdown(json.loads((RESULTS / f"{self.name}.json").read_text(encoding="utf-8"))["rows"]).rstrip()


PAGES: dict[str, tuple[Table | Published | Families | Written, ...]] = {
    "README.md": (SHORT,),
    "docs/results/solvers.md": (Written("which_solver"),),
    "docs/results/vllm.md": (Written("vllm_loads"),),
    "docs/results/quality.md": (*TABLES, Published(), Families()),
}
REFERENCE: dict[str, Callable[[], list[str]]] = {
    "docs/reference/recipes.md": lambda: [recipe_table(kind) for kind in KINDS],
    "docs/reference/fields.md": lambda: [field_table()],
    "docs/reference/units.md": lambda: [unit_table()],
}
"""the tables of the pages of the reference"""
COMMANDS = "docs/reference/cli.md"
"""the page that is generated as a whole"""


def tables(page: str) -> list[str]:
    """Return the generated tables of a page."""
    return [table.markdown() for table in PAGES.get(page, ())] + REFERENCE.get(page, list)()


def put(text: str, made: Sequence[str]) -> str:
    """Return a text in which each table replaces the one with the same first line."""
    for table in made:
        first = table.split("\n", 1)[0]
        lines = text.split("\n")
        if lines.count(first) != 1:
            raise SystemExit(f"the page has {lines.count(first)} tables that begin with {first}: it needs one")
        begin = end = lines.index(first)
        while lines[end].startswith("|"):
            end += 1
        text = "\n".join([*lines[:begin], table, *lines[end:]])
    return text


def main() -> None:
    for page in (*PAGES, *REFERENCE):
        path = ROOT / page
        path.write_text(put(path.read_text(encoding="utf-8"), tables(page)), encoding="utf-8")
    (ROOT / COMMANDS).write_text(command_page(), encoding="utf-8")
    store_texts()


if __name__ == "__main__":
    main()
