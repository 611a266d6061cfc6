"""Recipe: all settings of a pruning run, as one validated object that is read from and written to YAML."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_serializer,
    model_validator,
)

from optprune.allocation import Allocation, Allocator, ByCost, Dense, Depth, ExpertBudget, Given, Uniform
from optprune.allocation.weight_costs import WeightBudget
from optprune.allocation.width_costs import WidthBudget
from optprune.calibration import POLICIES, Propagation
from optprune.errors import InputError, check_kind
from optprune.models import UNITS, Decoder, Units
from optprune.numerics.fingerprint import code_fingerprint
from optprune.objectives import OBJECTIVES, LayerContext, Objective, stated
from optprune.patterns import InGroups
from optprune.problems import Problem
from optprune.recipe.groups import (
    DepthSearch,
    FisherMetric,
    GivenBlocks,
    GlobalBudget,
    Group,
    LowBits,
    Refit,
    SmallerVocabulary,
    UniformShares,
)
from optprune.recipe.names import (
    NONE,
    read_objective,
    read_propagation,
    read_solver,
    read_units,
    write_objective,
    write_propagation,
    write_solver,
    write_units,
)
from optprune.recipe.settings import Settings, unknown_field
from optprune.solvers import Chain, ExpertElimination, ExpertSolver, Solver
from optprune.solvers.ridge import last_refit
from optprune.system.display import Displayed, SummaryTable
from optprune.system.files import read_yaml
from optprune.system.interrupts import interrupts_held
from optprune.system.wording import either, one_line, shown, suggestion


class Recipe(Displayed, BaseModel):
    """Settings of a pruning run: units, sparsity and allocation, objective and solver, propagation and refits.

    Fields are given as keywords or in mappings; a group by its switch or as a mapping, and its fields by their paths:
    `Recipe(units="mlp", metric="full")`, `Recipe(metric={"kind": "full", "width": 64})`, `Recipe({"metric.width": 64},
    metric="full")`. Later mappings override earlier ones, and keywords override mappings. A wrong setting raises an
    InputError of one sentence.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    name: str = "custom"
    """name of the recipe"""
    summary: str = ""
    """description in a line"""
    source: str = ""
    """paper or code that the recipe follows"""
    objective: Annotated[Objective | None, BeforeValidator(read_objective), PlainSerializer(write_objective)] = None
    """function LayerContext -> Problem; null takes the objective of the units: sparse or linked"""
    solver: Annotated[Solver | ExpertSolver | None, BeforeValidator(read_solver), PlainSerializer(write_solver)] = None
    """solver of the problems: a name, {name: {option: value}}, or a list of those; null lets optprune choose by the
    problem"""
    units: Annotated[Units, BeforeValidator(read_units), PlainSerializer(write_units)] = UNITS["mlp"]
    """units to remove: MLP units, value dimensions (rotated: directions in place of coordinates), rotary pairs of
    queries and keys (qk), KV heads with their query heads, heads of recurrent mixers, MLP units and value dimensions
    (all-heads: or KV heads in place of a block's value dimensions; all-recurrent: and heads of recurrent mixers),
    single weights of every linear layer, with a pattern as in {weights: 2:4}, whole experts, or whole sub-blocks"""
    propagation: Annotated[Propagation, BeforeValidator(read_propagation), PlainSerializer(write_propagation)] = (
        POLICIES["pruned"]
    )
    """propagation policy of the hidden states"""
    sparsity: float = Field(default=0.2, ge=0, lt=1)
    """share of the decoder blocks' linear weights to remove; 0 leaves the model as it is. An N:M pattern has its own,
    which is then the default"""
    damping: float = Field(default=0.01, ge=0)
    """ridge towards the original weights, as a share of the mean diagonal of the Gram matrix"""
    fit_bias: bool = True
    """whether the bias of a pruned layer is fitted with its weights; otherwise it keeps its value"""
    permuted: bool = False
    """whether MLP units, and value dimensions within a head, are reordered so that groups of N:M lose less: the outputs
    of the dense model stay the same, and stock transformers loads it; requires an N:M pattern"""
    allocation: UniformShares | GlobalBudget | DepthSearch | GivenBlocks = UniformShares()
    """share that every block loses: the same, a part of one budget for the model, whole sub-blocks, or as listed"""
    bits: LowBits | None = None
    """low-bit format of the weights that stay: none, or a grid on which all linear layers of the blocks are put, with
    errors compensated; requires units weights, and takes a sparsity of 0 too"""
    vocabulary: SmallerVocabulary | None = None
    """tokens that stay in the vocabulary: all, or so many, in any recipe, before the blocks are pruned"""
    metric: FisherMetric | None = None
    """output metric: none, or the Fisher information of the outputs"""
    refit: Refit | None = None
    """use of held-out calibration tokens: none, or measured errors, chosen dampings and recovery"""
    strict: bool = False
    """whether fallbacks, dead inputs, calibration tokens that are too few or too alike, and a missed budget are
    errors"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of all random numbers"""

    def __init__(self, /, *settings: Mapping[Any, Any], **more: Any) -> None:
        given = Settings.of([*settings, more])
        fields = given.fields()
        for key in fields:
            if key not in type(self).model_fields:
                raise unknown_field(key, type(self).model_fields)
        try:
            super().__init__(**fields)
        except RecursionError as error:
            raise InputError("the recipe is nested too deeply: use fewer levels") from error
        except ValidationError as error:
            first = error.errors()[0]
            if first["loc"]:
                raise given.refused(error) from error
            raise InputError(f"the recipe contradicts itself: {first['msg'].removeprefix('Value error, ')}") from error

    @classmethod
    def model_validate(cls, obj: Any, **_: Any) -> "Recipe":
        # pydantic would wrap the InputError of `__init__` in a ValidationError.
        return obj if isinstance(obj, cls) else cls(obj)

    @model_validator(mode="after")
    def _fields_that_fit(self) -> "Recipe":
        single = self.units.family is not None
        if self.objective is OBJECTIVES["linked"] and single:
            raise ValueError("the objective 'linked' removes whole units, so units cannot be weights")
        if self.objective is OBJECTIVES["sparse"] and not single:
            raise ValueError("the objective 'sparse' removes single weights, so units must be weights")
        experts = self.units.experts
        if self.solver is not None and isinstance(self.solver, ExpertSolver) != experts:
            raise ValueError(
                f"{self.solver.label} does not solve the problems of units {self.units.name}: use expert_elimination, "
                "reap, expert_frequency or given_scores for experts, and other solvers for other units"
            )
        if experts and self.objective is not None:
            raise ValueError("units experts have a fixed objective: leave the objective out")
        if self.permuted and not isinstance(self.units.family, InGroups):
            pattern = "no pattern" if self.units.family is None else f"the pattern {self.units.family.name}"
            raise ValueError(
                f"permuted needs an N:M pattern, but units {self.units.name} have {pattern}: set "
                "units.weights to an N:M pattern such as 2:4, or leave permuted out"
            )
        refitted, solver = self.refit is not None and len(self.refit.dampings) > 0, self.layer_solver
        if refitted and solver is not None and last_refit(solver) is None:
            raise ValueError(
                f"refit.dampings needs a solver that ends with restore or conjugate_gradients, not {solver.label}"
            )
        return self

    @model_validator(mode="after")
    def _bits_that_fit(self) -> "Recipe":
        if self.bits is None:
            return self
        if self.units.family is None:
            raise ValueError(
                f"bits need units weights, not {self.units.name}: prune first, and then run a recipe with bits and a "
                "sparsity of 0 on the result"
            )
        if self.refit is not None:
            raise ValueError("refit moves weights off the grid of bits: leave one of them out")
        if self.objective not in (None, OBJECTIVES["sparse"]):
            raise ValueError("bits have the objective 'sparse': leave the objective out")
        return self

    @model_validator(mode="after")
    def _budget_of_the_units(self) -> "Recipe":
        """Raise ValueError where the units or their pattern do not allow the allocation."""
        budget, share = self.allocation, self.only_share
        divided = isinstance(budget, GlobalBudget)
        if isinstance(budget, GivenBlocks):
            return self
        if isinstance(budget, UniformShares | GlobalBudget) and budget.multiple is not None and not self.units.kinds:
            raise ValueError(
                f"allocation.multiple is {budget.multiple}, but units {self.units.name} have no widths: leave it out"
            )
        if divided and budget.currency != "parameters" and not self.units.kinds:
            raise ValueError(
                f"allocation.currency is {budget.currency}, but units {self.units.name} have no widths to divide it "
                "over: set units to mlp, vo, kv-groups or all"
            )
        if divided and self.units.family is not None and budget.least > budget.most:
            raise ValueError(
                f"no layer keeps at least {budget.least:g} and at most {budget.most:g} of its weights: lower "
                "allocation.least, or raise allocation.most"
            )
        if share is None or (divided and self.sparsity < 1 - share):  # then some layers stay dense
            return self
        if "sparsity" not in self.model_fields_set:
            object.__setattr__(self, "sparsity", 1 - share)  # the model is frozen
        if self.sparsity and abs(self.sparsity - (1 - share)) > 1e-9:
            pattern = "" if self.units.family is None else self.units.family.name
            raise ValueError(
                f"the pattern {pattern} has a sparsity of {1 - share:g}, not {self.sparsity:g}: set sparsity to "
                f"{1 - share:g}, or choose unstructured, rows or an N:M pattern with N / M = {1 - self.sparsity:g}"
            )
        return self

    @field_serializer("bits", "metric", "refit", "vocabulary")
    def _none(self, group: Group | None) -> Any:
        return NONE if group is None else group.model_dump(mode="json")

    def summary_table(self) -> SummaryTable:
        """Return the settings, field by field, for a terminal or a notebook."""
        fields = self.to_dict()
        title = f"recipe {fields.pop('name')}" + (f": {self.summary}" if self.summary else "")
        lines = [
            (name, one_line(value if isinstance(value, str) else json.dumps(value)))
            for name, value in fields.items()
            if name != "summary"
        ]
        return SummaryTable(one_line(title), lines)

    @property
    def layer_solver(self) -> Solver | None:
        """The solver of the layers' problems; None where the problem chooses it, or experts are removed."""
        return self.solver if isinstance(self.solver, Solver) else None

    @property
    def expert_solver(self) -> ExpertSolver:
        """The solver that chooses experts."""
        return self.solver if isinstance(self.solver, ExpertSolver) else ExpertElimination()

    def own_code(self) -> dict[str, str]:
        """Return a digest of the code of the user's own solvers, objective and policy, by their places.

        Runs keep it beside the recipe, which has their names and options only, so that a run with other code is not
        taken for the same.
        """
        stages = self.solver.stages if isinstance(self.solver, Chain) else (self.solver,)
        digests = {}
        # The options of a solver are in the recipe.
        for part in (self.objective, *map(type, stages), self.propagation):
            module = str(part.__module__ if hasattr(part, "__qualname__") else type(part).__module__)
            if module.partition(".")[0] not in ("optprune", "builtins"):
                name = getattr(part, "__qualname__", type(part).__qualname__)
                digests[f"{module}:{name}"] = code_fingerprint(part)
        return digests

    def state(self, context: LayerContext) -> Problem:
        """Return the problem of a layer."""
        return stated(self.objective or OBJECTIVES[self.units.objective], context)

    @property
    def only_share(self) -> float | None:
        """The share of a layer that the pattern keeps; None where it may be any, and for whole units."""
        return None if self.units.family is None else self.units.family.only_share

    def within(self, decoder: Decoder) -> "Recipe":
        """Return the recipe with the units that a model and the metric allow."""
        coupled = self.metric is not None and self.metric.kind == "full"
        return self.model_copy(update={"units": self.units.within(decoder, coupled=coupled)})

    @property
    def given(self) -> Allocation | None:
        """The allocation that the recipe lists; None where it lists none."""
        return self.allocation.allocation(self.sparsity) if isinstance(self.allocation, GivenBlocks) else None

    def with_given(self, allocation: Allocation) -> "Recipe":
        """Return the recipe with an allocation that lists what every block keeps, and its sparsity."""
        found = {"allocation": GivenBlocks.of(allocation), "sparsity": allocation.sparsity}
        return self.model_copy(update=found)

    def with_sparsity(self, sparsity: float) -> "Recipe":
        """Return the recipe with another sparsity."""
        return self.model_copy(update={"sparsity": sparsity})

    def as_run(self, reported: Mapping[str, Any]) -> "Recipe":
        """Return the recipe, with the listed allocation of the recipe in a report where that has one."""
        allocation = reported.get("allocation")
        if not isinstance(allocation, dict) or allocation.get("kind") != "given":
            return self
        return self.with_given(Allocation.from_dict(allocation | {"sparsity": reported["sparsity"]}))

    @property
    def divides(self) -> bool:
        """Whether a budget is divided over the layers; not where all layers have the sparsity of N:M."""
        share = self.only_share
        return isinstance(self.allocation, GlobalBudget) and (share is None or self.sparsity < 1 - share - 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        # pydantic would turn an interrupt into an error of its own.
        with interrupts_held():
            return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML, which `load_recipe` reads.

        An objective or a solver from outside optprune is written by name only; to read such a file, pass it to
        `load_recipe` as an override.
        """
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)


SHIPPED = resources.files("optprune.recipe") / "shipped"
"""the folder of the recipes that come with optprune"""
STANDARD = "standard"
EFFORTS = ("quick", STANDARD, "best")
"""the efforts with which a recipe can run; standard is the recipe as it is written"""
DESCRIBED = ("objective", "solver", "units", "propagation", "allocation", "metric", "refit")
"""fields whose values a summary may describe"""


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with optprune."""
    return sorted(file.name.removesuffix(".yaml") for file in SHIPPED.iterdir() if file.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None, *, effort: str = STANDARD) -> Recipe:
    """Return a recipe by its name or from a YAML file, with some fields replaced.

    `effort` is "quick", "standard" or "best". A file lists under `efforts` which fields quick and best change; the
    overrides come after these. InputError where the recipe does not have the effort.
    """
    fields = _fields_of(name_or_path)
    efforts = fields.pop("efforts", {})
    recipe = Recipe(fields, _of_effort(efforts, effort, name_or_path), overrides or {})
    return recipe if "summary" in (overrides or {}) else _with_changes_in_summary(recipe, fields)


def recipe_with(recipe: str | Recipe, fields: Mapping[str, Any], *, effort: str = STANDARD) -> Recipe:
    """Return a Recipe, or the recipe of a name or file, with some fields replaced."""
    if isinstance(recipe, str):
        return load_recipe(recipe, fields, effort=effort)
    check_kind("the recipe", recipe, Recipe, "give a name, a YAML file, or what load_recipe returns")
    if effort != STANDARD:
        raise InputError(f"a Recipe has no effort {shown(effort)}: leave the effort out, or give it to load_recipe")
    return Recipe(dict(recipe), fields) if fields else recipe


def efforts_of(name_or_path: str) -> dict[str, Any]:
    """Return the fields that the efforts of a recipe change, by effort."""
    return _fields_of(name_or_path).get("efforts", {})


def _fields_of(name_or_path: str) -> dict[Any, Any]:
    """Return what the file of a recipe holds."""
    names = recipe_names()
    if name_or_path not in names and Path(name_or_path).suffix.lower() not in (".yaml", ".yml"):
        raise InputError(
            f"the recipe {shown(name_or_path)} is not known{suggestion(name_or_path, names)}: use one of "
            f"{', '.join(names)}, or a .yaml file"
        )
    file = SHIPPED / f"{name_or_path}.yaml" if name_or_path in names else Path(name_or_path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe file {name_or_path} cannot be read: {error}") from error
    fields = read_yaml(text, f"the recipe file {name_or_path}")
    if not isinstance(fields, dict):
        raise InputError(f"the recipe file {name_or_path} must hold fields and values, such as 'sparsity: 0.2'")
    return fields


def _of_effort(efforts: Any, effort: str, name_or_path: str) -> Mapping[Any, Any]:
    """Return the fields that an effort changes; InputError where the recipe does not have it."""
    changeable = [name for name in EFFORTS if name != STANDARD]
    if not isinstance(efforts, dict) or any(
        name not in changeable or not isinstance(changed, dict) for name, changed in efforts.items()
    ):
        raise InputError(
            f"the efforts of the recipe {name_or_path} are not fields of {either(changeable)}: write efforts such as "
            "'{quick: {metric: none}}'"
        )
    if effort not in EFFORTS:
        raise InputError(f"the effort {shown(effort)} is not known{suggestion(effort, EFFORTS)}: use {either(EFFORTS)}")
    if effort != STANDARD and effort not in efforts:
        raise InputError(
            f"the recipe {name_or_path} has no effort {effort}: leave the effort out, or choose structured_best or "
            "sparse_best"
        )
    return efforts.get(effort, {})


def _with_changes_in_summary(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
    """Return the recipe, whose summary lists the changes of the fields that it describes."""
    if not recipe.summary:
        return recipe
    try:
        before = Recipe(fields).to_dict()
    except InputError:  # the file needs the overrides to be complete
        return recipe
    now = recipe.to_dict()
    changed = [f"{name} {_in_short(now[name])}" for name in DESCRIBED if now[name] != before[name]]
    if not changed:
        return recipe
    return recipe.model_copy(update={"summary": f"{recipe.summary} (changed here: {', '.join(changed)})"})


def _in_short(value: Any) -> str:
    """Return a field's value, or the kind of its group, in a line."""
    kind = value.get("kind", value) if isinstance(value, dict) else value
    return kind if isinstance(kind, str) else one_line(json.dumps(kind), 60)


def allocator_of(recipe: Recipe, allocation: Allocation | None = None) -> Allocator:
    """Return the allocator of a run; an allocation that is given overrides the recipe's."""
    allocation = allocation or recipe.given
    if allocation is not None:
        return Given(recipe.units, allocation)
    if not recipe.sparsity and recipe.bits is None:
        return Dense()
    match recipe.allocation:
        case DepthSearch() as depth:
            return Depth(recipe.sparsity, depth.parts, depth.score, depth.score_tokens)
        case GlobalBudget() as group if recipe.units.experts:
            return ExpertBudget(recipe.units, recipe.sparsity, group.least, group.probe_tokens)
        case GlobalBudget() if recipe.divides:
            return by_cost(recipe)
        case UniformShares() | GlobalBudget() as shares:
            return Uniform(recipe.units, recipe.sparsity, shares.multiple)
    raise AssertionError("a listed allocation is handled above")


def by_cost(recipe: Recipe) -> ByCost:
    """Return the allocator that divides one budget over the whole model."""
    group = recipe.allocation
    if not isinstance(group, GlobalBudget):
        raise InputError(
            f"the recipe has no global budget: its allocation is {group.kind}, so set allocation to global"
        )
    if recipe.units.family is not None:
        budget = WeightBudget(recipe.units.family, recipe.sparsity, group.least, group.most)
    else:
        budget = WidthBudget(recipe.units, recipe.sparsity, group.least, group.multiple, group.currency, group.tokens)
    weighed = recipe.metric is not None
    return ByCost(recipe.units, budget, recipe.damping, recipe.fit_bias, weighed, group.probe_tokens)
