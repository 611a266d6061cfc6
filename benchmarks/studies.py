"""What is run on whole models: studies, each a list of recipes and settings; and the digest that names a run."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from optprune import Recipe, load_recipe
from optprune.recipe.names import NONE
from optprune.recipe.recipe import efforts_of

Settings = dict[str, Any]
Case = tuple[str, Settings]
DENSE: Case = ("dense", {})
"""no pruning"""
SPARSE = ("magnitude", "wanda", "sparsegpt", "fistapruner", "fistapruner_plus", "alps", "alps_plus", "sparse_best")
STRUCTURED = ("random", "magnitude", "flap", "fasp", "spap", "osscar", "spap_plus", "structured_uniform_best")
"""here all of MLP units"""
MLP: Settings = {"units": "mlp"}
COORDINATES: Settings = {"units": "all"}
PRUNED: Settings = {"propagation": "pruned"}
"""targets that correct for nothing"""
UNCLIPPED: Settings = {"metric.clip": None} | PRUNED
"""gradients of single tokens as they are, and targets that correct for nothing"""
DIRECTIONS: Settings = {"units": "rotated-all"} | PRUNED
"""queries and keys as they are, and targets that correct for nothing"""
BEFORE: Settings = COORDINATES | UNCLIPPED
"""`structured_best` as it was before directions, clipped gradients, rotary pairs and the policy `partial`"""
OF_FAMILIES = ("wanda", "sparsegpt", "alps", "sparse_best")
OTHER_UNITS = ("random", "magnitude", "fasp")
"""recipes that prune something else by themselves"""
HALF: Settings = {"units.weights": "unstructured", "sparsity": 0.5}
PAIRS: Settings = {"units.weights": "2:4", "sparsity": 0.5}
DIAGONAL: Settings = {"metric": "diagonal", "metric.damping": 0.01}
NOT_RESTORED: Settings = {"solver": "fasp_metric"}
GLOBAL: Settings = {"allocation": "global"}
CHOSEN_RIDGE: Settings = {"refit.held_out": 0.125, "refit.dampings": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]}
"""that of spap_plus"""
GIVEN_RIDGE: Settings = {"refit": "none"}
BELIEVED: Settings = {"allocation.probe_tokens": 0}
PROBED: Settings = {"allocation.probe_tokens": 1024}
MANY_RIDGES: Settings = {"refit.held_out": 0.125, "refit.dampings": [0.01, 0.03, 0.1, 0.3, 1.0]}
RECOVERY: Settings = {"refit.recovery": 1, "refit.held_out": 0.0625}
CROSS: Settings = {"propagation": "cross"}
INTRA: Settings = {"propagation": "intra"}
PARTIAL: Settings = {"propagation": "partial"}
POLICIES = ("dense", "pruned", "intra", "cross", "partial", "local")
ALL, VALUES = ("all", "rotated-all"), ("vo", "rotated-vo")
"""the units of the same shapes, by coordinates and by directions"""
LATER: Settings = {"allocation.currency": "parameters", "allocation.tokens": 512, "fit_bias": True}
"""the values that say what recipes did before they had these fields"""
MULTIPLE = 8
"""of widths in all studies: the rows of the tables were made with it"""
WIDEST = 4096
"""no layer of the models here has as many outputs"""


def structured(recipe: str, sparsity: float) -> tuple[str, Settings]:
    return recipe, {"sparsity": sparsity, **(MLP if recipe in OTHER_UNITS else {})}


def half(recipe: str, policy: str | None = None) -> tuple[str, Settings]:
    """A recipe at 50 percent; Wanda, as its paper has it, with the same count in every row."""
    settings = HALF | ({"units.weights": "rows"} if recipe == "wanda" else {})
    return recipe, settings | ({} if policy is None else {"propagation": policy})


def steps(recipe: str, settings: Settings) -> list[tuple[str, Settings]]:
    """A loss-aware recipe without its parts, one after another; costs are believed, and units are those of MLPs."""
    settings = settings | BELIEVED | UNCLIPPED
    plain = {"metric": "none", "allocation": "uniform", "metric.damping": 0.01}
    full = {"metric": "full", "metric.damping": 0.1}
    parts = (plain, plain | DIAGONAL, plain | full, plain | DIAGONAL | GLOBAL, plain | full | GLOBAL)
    both = full | GLOBAL
    return [(recipe, settings | part) for part in (*parts, both | GIVEN_RIDGE, plain | RECOVERY, both | RECOVERY)]


def paired(recipe: str) -> list[tuple[str, Settings]]:
    """The steps at 2:4, where there is no budget to divide, under one policy as all other steps."""
    same = {"allocation": "uniform", "propagation": "pruned"}
    return [(name, {**settings, **same}) for name, settings in steps(recipe, PAIRS)]


def under_intra(case: tuple[str, Settings]) -> tuple[str, Settings]:
    """The same under the policy `intra`."""
    return case[0], case[1] | INTRA


def under_policies(settings: Settings) -> list[tuple[str, Settings]]:
    """`sparse_best` without clipped gradients and with either metric, under every policy."""
    return [
        ("sparse_best", {**settings, **metric, **UNCLIPPED, "propagation": policy})
        for policy in POLICIES
        for metric in ({}, DIAGONAL)
    ]


STUDIES: dict[str, list[tuple[str, Settings]]] = {
    "sparse": [
        *(half(recipe) for recipe in SPARSE),
        ("wanda", HALF),
        ("sparse_best", HALF | DIAGONAL | UNCLIPPED),
        *((recipe, PAIRS) for recipe in SPARSE),
        ("sparse_best", PAIRS | DIAGONAL | UNCLIPPED | INTRA),
        ("fistapruner_wanda", HALF),
        ("fistapruner_wanda", PAIRS),
    ],
    "policies": [half(name, policy) for policy in POLICIES for name in SPARSE[1:]] + under_policies(HALF),
    "policies-2:4": [(name, {**PAIRS, "propagation": policy}) for policy in POLICIES for name in SPARSE[1:]]
    + under_policies(PAIRS),
    "policies-units": [
        (name, settings | PARTIAL)
        for name, settings in (structured(recipe, 0.2) for recipe in ("osscar", "fasp", "structured_uniform_best"))
    ],
    "damping": [("sparse_best", PAIRS | {"metric.damping": damping}) for damping in (0.1, 1.0)],
    "structured": [structured(recipe, sparsity) for sparsity in (0.2, 0.1, 0.3) for recipe in STRUCTURED]
    + [(recipe, {"sparsity": sparsity}) for recipe in ("structured_best", "fasp") for sparsity in (0.2, 0.1, 0.3)]
    + [
        ("fasp", {"sparsity": sparsity, **MLP, **more})
        for sparsity in (0.2, 0.1, 0.3)
        for more in (NOT_RESTORED, CHOSEN_RIDGE)
    ]
    + [("spap_plus", {"sparsity": sparsity, **GIVEN_RIDGE}) for sparsity in (0.2, 0.1, 0.3)],
    "qk": [
        ("structured_best", {"sparsity": sparsity, **more})
        for sparsity in (0.2, 0.1, 0.3)
        for more in ({}, PRUNED, DIRECTIONS)
    ],
    "rotated": [
        ("structured_best", {"sparsity": sparsity, "units": units, **UNCLIPPED})
        for sparsity, pair in ((0.3, ALL), (0.2, ALL), (0.1, ALL), (0.03125, VALUES))
        for units in pair
    ],
    "heads": [
        ("structured_best", {"sparsity": sparsity, "units": units, "allocation.least": least, **UNCLIPPED})
        for sparsity, least in ((0.3, 0.45), (0.2, 0.45), (0.3, 0.0))
        for units in ("all", "all-heads")
    ],
    "efforts": [
        (recipe, settings | changed)
        for recipe, settings in (
            *(structured("structured_best", share) for share in (0.2, 0.3)),
            ("sparse_best", HALF),
            ("sparse_best", PAIRS),
        )
        for changed in ({}, *efforts_of(recipe).values())
    ],
    "families": [
        *(structured(recipe, 0.2) for recipe in ("fasp", "spap")),
        *(("structured_best", {"sparsity": 0.2, **more}) for more in ({}, PRUNED, DIRECTIONS, BEFORE)),
        *(half(recipe) for recipe in OF_FAMILIES),
        *(under_intra((recipe, PAIRS)) for recipe in OF_FAMILIES[:-1]),
        ("sparse_best", PAIRS),
        *(("sparse_best", pattern | UNCLIPPED | policy) for pattern, policy in ((HALF, PRUNED), (PAIRS, INTRA))),
    ],
    "recovery": [
        ("spap_plus", {"sparsity": sparsity, **more}) for sparsity in (0.2, 0.1, 0.3) for more in ({}, RECOVERY)
    ],
    "ablation": [
        case
        for sparsity in (0.2, 0.1, 0.3)
        for case in (
            *steps("structured_best", {"sparsity": sparsity, "units": "mlp"}),
            *(
                ("structured_best", {"sparsity": sparsity, **more})
                for more in (
                    *(
                        {},
                        PRUNED,
                        DIRECTIONS,
                        DIRECTIONS | UNCLIPPED,
                        BEFORE,
                        MLP | UNCLIPPED,
                        BEFORE | BELIEVED,
                        BEFORE | {"refit.recovery": 1},
                    ),
                    *(MLP | UNCLIPPED | PROBED, BEFORE | PROBED),
                )
            ),
        )
    ],
    "ablation-sparse": [
        *steps("sparse_best", HALF),
        *steps("sparse_best", {"sparsity": 0.6}),
        *paired("sparse_best"),
        under_intra(paired("sparse_best")[-1]),
        *(
            ("sparse_best", settings | more)
            for settings in (HALF, {"sparsity": 0.6})
            for more in (BELIEVED | DIAGONAL | RECOVERY | UNCLIPPED, DIAGONAL | PROBED | UNCLIPPED)
        ),
        ("sparse_best", {**steps("sparse_best", {"sparsity": 0.6})[1][1], "metric.damping": 0.1}),
        ("sparse_best", HALF | BELIEVED | DIAGONAL | MANY_RIDGES | UNCLIPPED),
    ],
}
NAMES = {
    "sparse": "Sparse weights",
    "policies": "Sparse weights at 50 percent under every propagation policy",
    "policies-2:4": "2:4 under every propagation policy",
    "policies-units": "Whole units under the policy `partial`",
    "damping": "2:4 by the damping of the output metric",
    "structured": "Whole units",
    "rotated": "Value dimensions that are removed as coordinates, and as directions",
    "qk": "Rotary pairs of queries and keys in the budget of values and MLP units",
    "heads": "KV heads beside value dimensions in one budget, and sub-blocks that may go whole",
    "efforts": "Recipes with less and with more effort",
    "families": "Models of several families side by side",
    "recovery": "Recovery of the pruned sub-modules",
    "ablation": "What the output metric, the global budget and probes do for whole units",
    "ablation-sparse": "What the output metric, the global budget and probes do for sparse weights",
}


def rows_of(rows: Sequence[dict[str, Any]], model: str, case: Case, tokens: int) -> list[dict[str, Any]]:
    """Those of a case on a model with so many calibration tokens, of all seeds."""
    mine = (row for row in rows if row["model"] == model)
    if case == DENSE:
        return [row for row in mine if row["recipe"] == DENSE[0]]
    wanted = digest(*case, tokens), tokens
    return [row for row in mine if (row["digest"], row["tokens"]) == wanted]


def as_run(recipe: str, settings: Settings, seed: int) -> Recipe:
    """The recipe of a case: widths are multiples of 8 where the case says nothing else."""
    chosen = load_recipe(recipe, {**settings, "seed": seed})
    if not chosen.units.kinds or getattr(chosen.allocation, "multiple", MULTIPLE) is not None:
        return chosen
    return load_recipe(recipe, {**settings, "seed": seed, "allocation.multiple": MULTIPLE})


def digest(recipe: str, settings: Settings, tokens: int) -> str:
    """Of what a recipe does with so many calibration tokens, whatever it is called."""
    return _digest(recipe, json.dumps(settings), tokens)


@cache
def _digest(recipe: str, settings: str, tokens: int) -> str:
    fields = dict(_leaves(load_recipe(recipe, json.loads(settings)).to_dict()))
    if "allocation.multiple" in fields and fields["allocation.multiple"] is None:
        fields["allocation.multiple"] = MULTIPLE
    told = {key: value for key, value in fields.items() if key not in ("name", "summary", "source", "seed")}
    # What is off, or as it was before there was such a field, is left out: so a field that is added changes no digest.
    told = {
        key: value for key, value in told.items() if (value or key in LATER) and value not in (NONE, LATER.get(key))
    }
    # Neither do limits that nothing here comes up to.
    limits = {"metric.width": WIDEST, "metric.tokens": tokens}
    told = {key: value for key, value in told.items() if key not in limits or value < limits[key]}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _leaves(fields: Settings, group: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a recipe, those of groups by their paths."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{group}{key}.")
        else:
            yield f"{group}{key}", value
