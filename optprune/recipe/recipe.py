"""Recipes: everything a pruning run decides, as one validated object, readable from and writable to YAML."""

import json
from collections.abc import Mapping
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

from optprune.allocation import Allocation
from optprune.calibration import POLICIES, Propagation
from optprune.errors import InputError
from optprune.models import UNITS, Experts, Units
from optprune.objectives import OBJECTIVES, LayerContext, Objective
from optprune.patterns import InGroups
from optprune.problems import Problem
from optprune.recipe.aliases import NEEDS
from optprune.recipe.groups import (
    DepthSearch,
    FisherMetric,
    GivenBlocks,
    GlobalBudget,
    Group,
    Matching,
    Recovery,
    Refit,
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
from optprune.recipe.settings import Settings
from optprune.solvers import ExpertElimination, ExpertSolver, Solver
from optprune.solvers.ridge import refitting
from optprune.system.display import Displayed, SummaryTable
from optprune.system.interrupts import interrupts_held
from optprune.system.wording import one_line


class Recipe(Displayed, BaseModel):
    """What to solve at each layer, with what, how much to remove, and on which path statistics travel.

    Fields are given by name, a field of a group by its path or by the flat name that it had: `Recipe(units="mlp",
    metric="full", metric_width=64)`, `Recipe({"metric.width": 64})`. Mappings come before names, each over those before
    it. What is wrong is an InputError of one sentence.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    name: str = "custom"
    """what the recipe is called"""
    summary: str = ""
    """what it does, in a line"""
    source: str = ""
    """where it comes from"""
    objective: Annotated[Objective | None, BeforeValidator(read_objective), PlainSerializer(write_objective)] = None
    """a function LayerContext -> Problem; null states the problem that goes with the units: sparse or linked"""
    solver: Annotated[Solver | ExpertSolver | None, BeforeValidator(read_solver), PlainSerializer(write_solver)] = None
    """what solves the problems: a name, {name: {option: value}}, or a list of those; null lets optprune choose by the
    problem"""
    units: Annotated[Units, BeforeValidator(read_units), PlainSerializer(write_units)] = UNITS["mlp"]
    """what is pruned: MLP units, value dimensions (rotated: directions in place of coordinates), KV heads with their
    query heads, MLP units and value dimensions (all-heads: or KV heads in place of a block's value dimensions), single
    weights of every linear layer, in a pattern where it is {weights: 2:4}, whole experts, or whole sub-blocks"""
    propagation: Annotated[
        Propagation | None, BeforeValidator(read_propagation), PlainSerializer(write_propagation)
    ] = POLICIES["pruned"]
    """the path of the statistics from block to block; auto goes by the pattern: intra under N:M, pruned elsewhere"""
    sparsity: float = Field(default=0.2, ge=0, lt=1)
    """the share of the decoder blocks' linear weights to remove; with zero the model stays as it is"""
    damping: float = Field(default=0.01, ge=0)
    """the ridge towards the original weights, as a share of the mean diagonal of the Gram matrix"""
    fit_bias: bool = True
    """whether the bias of a pruned layer, where it has one, is fitted with its weights; else it stays as it was"""
    permuted: bool = False
    """whether MLP units, and value dimensions within a head, change places so that groups of N:M hold together what can
    be spared: the model is what it was, and stock transformers loads it; needs such a pattern"""
    allocation: UniformShares | GlobalBudget | DepthSearch | GivenBlocks = UniformShares()
    """what every block loses: the same share, a part of one budget for the model, whole sub-blocks, or what is said"""
    metric: FisherMetric | None = None
    """what weighs output errors: nothing, or the Fisher information of the outputs"""
    refit: Refit | None = None
    """what held-out calibration tokens are for: nothing, or errors measured, ridges chosen, sub-modules recovered"""
    strict: bool = False
    """fallbacks, dead inputs, too few tokens and a budget that is not met are errors"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """the seed of all that is drawn"""

    def __init__(self, /, *settings: Mapping[Any, Any], **more: Any) -> None:
        given = Settings.of([*settings, more])
        fields = given.fields()
        unknown = [key for key in fields if key not in type(self).model_fields]
        if unknown:
            known = ", ".join(type(self).model_fields)
            raise InputError(f"a recipe has no field {one_line(unknown[0])!r}: it has {known}")
        try:
            super().__init__(**fields)
        except RecursionError as error:
            raise InputError("the recipe is nested too deeply to be read: write it flatter") from error
        except ValidationError as error:
            first = error.errors()[0]
            if first["loc"]:
                raise given.refused(error) from error
            raise InputError(f"the recipe contradicts itself: {first['msg'].removeprefix('Value error, ')}") from error

    @classmethod
    def model_validate(cls, obj: Any, **_: Any) -> "Recipe":
        # pydantic would wrap the sentence of `__init__` in an error of its own.
        return obj if isinstance(obj, cls) else cls(obj)

    @model_validator(mode="after")
    def _fields_that_fit(self) -> "Recipe":
        single = self.units.family is not None
        if self.objective is OBJECTIVES["linked"] and single:
            raise ValueError("the objective 'linked' keeps units, so units must be mlp, vo, kv-groups or all")
        if self.objective is OBJECTIVES["sparse"] and not single:
            raise ValueError("the objective 'sparse' keeps single weights, so units must be weights")
        experts = isinstance(self.units, Experts)
        if self.solver is not None and isinstance(self.solver, ExpertSolver) != experts:
            raise ValueError(
                f"{self.solver.label} does not solve what units {self.units.name} state: experts are chosen by "
                "expert_elimination, reap or expert_frequency, and those choose nothing else"
            )
        if experts and self.objective is not None:
            raise ValueError("whole experts go by their own cost: leave the objective out")
        if self.permuted and not isinstance(self.units.family, InGroups):
            pattern = "no pattern" if self.units.family is None else f"the pattern {self.units.family.name}"
            raise ValueError(
                f"permuted orders inputs for groups of N:M, and units {self.units.name} have {pattern}: give single "
                "weights such a pattern, as 2:4, or leave permuted out"
            )
        refitted, solver = self.refit is not None and len(self.refit.dampings) > 0, self.layer_solver
        if refitted and solver is not None and refitting(solver) is None:
            raise ValueError(
                f"refit_damping needs a solver that ends with restore or conjugate_gradients, not {solver.label}"
            )
        return self

    @model_validator(mode="after")
    def _budget_of_the_units(self) -> "Recipe":
        """What a budget may be hangs on the units and their pattern."""
        budget, share = self.allocation, self.only_share
        divided = isinstance(budget, GlobalBudget)
        if isinstance(budget, GivenBlocks):
            return self
        if isinstance(budget, UniformShares | GlobalBudget) and budget.multiple is not None and not self.units.kinds:
            raise ValueError(NEEDS["allocation.multiple"].format(budget.multiple))
        if divided and budget.currency != "parameters" and not self.units.kinds:
            raise ValueError(NEEDS["allocation.currency"].format(budget.currency))
        if divided and self.units.family is not None and budget.least > budget.most:
            raise ValueError(
                f"no layer keeps at least {budget.least:g} and at most {budget.most:g} of its weights: lower "
                "least_kept, or raise most_kept"
            )
        if share is None or (divided and self.sparsity < 1 - share):  # then some layers stay dense
            return self
        if self.sparsity and abs(self.sparsity - (1 - share)) > 1e-9:
            pattern = "" if self.units.family is None else self.units.family.name
            raise ValueError(f"the pattern {pattern} has a sparsity of {1 - share:g}, not {self.sparsity:g}")
        return self

    @field_serializer("metric", "refit")
    def _none(self, group: Group | None) -> Any:
        return NONE if group is None else group.model_dump(mode="json")

    def summary_table(self) -> SummaryTable:
        """What the recipe sets, field by field, for a terminal or a notebook."""
        fields = self.to_dict()
        title = f"recipe {fields.pop('name')}" + (f": {self.summary}" if self.summary else "")
        told = [
            (name, one_line(value if isinstance(value, str) else json.dumps(value)))
            for name, value in fields.items()
            if name != "summary"
        ]
        return SummaryTable(one_line(title), told)

    @property
    def layer_solver(self) -> Solver | None:
        """What solves the problems of layers, where that is said."""
        return self.solver if isinstance(self.solver, Solver) else None

    @property
    def expert_solver(self) -> ExpertSolver:
        """What chooses experts."""
        return self.solver if isinstance(self.solver, ExpertSolver) else ExpertElimination()

    @property
    def recovery(self) -> Recovery | None:
        """How pruned sub-modules are refitted against their dense outputs, if they are."""
        return None if self.refit is None else self.refit.recovery

    @property
    def matching(self) -> Matching | None:
        """How pruned blocks are matched as a whole to what the dense ones answer, if they are."""
        return None if self.refit is None else self.refit.matching

    @property
    def recovers(self) -> bool:
        """Whether weights are moved again after their layers are solved."""
        return self.recovery is not None or self.matching is not None

    def state(self, context: LayerContext) -> Problem:
        """The problem to solve at a layer."""
        objective = self.objective or OBJECTIVES[self.units.objective]
        return objective(context)

    @property
    def only_share(self) -> float | None:
        """The share that the pattern leaves of a pruned layer; None where that may be any, and of units."""
        return None if self.units.family is None else self.units.family.only_share

    @property
    def policy(self) -> Propagation:
        """The propagation policy of a run."""
        if self.propagation is not None:
            return self.propagation
        return POLICIES["pruned" if self.only_share is None else "intra"]

    def resolved(self) -> "Recipe":
        """Return the recipe with the propagation policy that it leaves to the pattern."""
        return self.model_copy(update={"propagation": self.policy})

    @property
    def given(self) -> Allocation | None:
        """What every block keeps, where the recipe says it."""
        return self.allocation.allocation(self.sparsity) if isinstance(self.allocation, GivenBlocks) else None

    def with_given(self, allocation: Allocation) -> "Recipe":
        """The recipe that says what every block keeps, and the sparsity that this comes to."""
        found = {"allocation": GivenBlocks.of(allocation), "sparsity": allocation.sparsity}
        return self.model_copy(update=found)

    def as_run(self, told: Mapping[str, Any]) -> "Recipe":
        """The settled recipe, with what every block keeps where the recipe that a report has `told` says that."""
        recipe, allocation = self.resolved(), told.get("allocation")
        if not isinstance(allocation, dict) or allocation.get("kind") != "given":
            return recipe
        return recipe.with_given(Allocation.from_dict(allocation | {"sparsity": told["sparsity"]}))

    @property
    def divides(self) -> bool:
        """Whether there is a budget to divide: not where N:M holds in every layer."""
        share = self.only_share
        return isinstance(self.allocation, GlobalBudget) and (share is None or self.sparsity < 1 - share - 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data."""
        # pydantic would make an error of its own of an interrupt.
        with interrupts_held():
            return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as a YAML file, which `load_recipe` reads unless the objective or a solver is one's own.

        Those are told by name only; for such a file `load_recipe` wants the objective or the solver itself.
        """
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)
