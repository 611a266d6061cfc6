"""Recipes: everything a pruning run decides, as one validated object, readable from and writable to YAML."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from optprune.calibration import POLICIES, Propagation
from optprune.models import UNITS, Units
from optprune.objectives import OBJECTIVES, LayerContext, Objective
from optprune.patterns import ANYWHERE, PatternFamily
from optprune.problems import Problem
from optprune.recipe.names import (
    read_dampings,
    read_objective,
    read_pattern,
    read_propagation,
    read_solver,
    read_units,
    write_objective,
    write_pattern,
    write_propagation,
    write_solver,
    write_units,
)
from optprune.recipe.sentences import OneSentence
from optprune.solvers import Solver
from optprune.solvers.ridge import refitting
from optprune.system.interrupts import interrupts_held


class Recipe(OneSentence):
    """What to solve at each layer, with what, how much to remove, and on which path statistics travel."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    name: str = "custom"
    summary: str = ""
    source: str = ""
    objective: Annotated[Objective | None, BeforeValidator(read_objective), PlainSerializer(write_objective)] = None
    """a function LayerContext -> Problem; None states the problem that goes with the units: sparse or linked"""
    solver: Annotated[Solver | None, BeforeValidator(read_solver), PlainSerializer(write_solver)] = None
    """None lets optprune choose by the problem"""
    pattern: Annotated[PatternFamily, BeforeValidator(read_pattern), PlainSerializer(write_pattern)] = ANYWHERE
    """of single weights: unstructured over each matrix, rows (the same count in every row), or N:M such as 2:4"""
    units: Annotated[Units, BeforeValidator(read_units), PlainSerializer(write_units)] = UNITS["mlp"]
    """what is pruned: MLP units, value dimensions, KV heads with their query heads, MLP units and value dimensions,
    single weights of every linear layer, or whole sub-blocks"""
    propagation: Annotated[
        Propagation | None, BeforeValidator(read_propagation), PlainSerializer(write_propagation)
    ] = POLICIES["pruned"]
    """None, in a file "auto", goes by the pattern: intra under N:M, pruned elsewhere"""
    sparsity: float = Field(default=0.2, gt=0, lt=1)
    """the share of the decoder blocks' linear weights to remove"""
    damping: float = Field(default=0.01, ge=0)
    """the ridge towards the original weights, as a share of the mean diagonal of the Gram matrix"""
    fit_bias: bool = True
    """whether the bias of a pruned layer, where it has one, is fitted with its weights; else it stays as it was"""
    output_metric: Literal["none", "diagonal", "full"] = "none"
    """what weighs output errors: nothing, or the Fisher information of the outputs, its diagonal or all of it"""
    metric_tokens: int = Field(default=16384, ge=1)
    """about how many calibration tokens the metric is the average of: whole sequences, from the first"""
    metric_width: int | None = Field(default=None, ge=1)
    """the most outputs of a layer that gets its whole metric; wider ones get its diagonal"""
    metric_damping: float = Field(default=0.01, ge=0)
    """what is added to the metric's diagonal, as a share of its mean"""
    allocation: Literal["uniform", "global"] = "uniform"
    """the same share from every block, or one budget for the model, divided by what the layers would lose"""
    budget: Literal["parameters", "flops", "time"] = "parameters"
    """what a global budget is a share of: the blocks' linear weights, their operations, or their measured time"""
    budget_tokens: int = Field(default=512, ge=1)
    """the tokens of the forward pass that operations and time are of; a single one stands for decoding"""
    probe_tokens: int = Field(default=0, ge=0)
    """about how many calibration tokens a global budget is put right on: what is pruned alone, of units a layer and of
    single weights a block, has its costs scaled to what that really costs the model; with none, costs are believed"""
    least_kept: float = Field(default=0.2, ge=0, lt=1)
    """of each layer's weights or units, where the budget is global; with zero whole sub-blocks may go"""
    most_kept: float = Field(default=0.8, gt=0, le=1)
    """of each layer's weights, where the budget is global"""
    width_multiple: int = Field(default=8, ge=1)
    """the MLP width is a multiple of this; the value dimensions too where all of them are, but for small heads that are
    all to keep the same number"""
    depth_parts: Literal["attention", "mlp", "both", "layers"] = "both"
    """which sub-blocks units 'blocks' may remove: attention, MLPs, either, or the two of a layer together"""
    depth_score: Literal["perplexity", "influence"] = "perplexity"
    """by which sub-blocks are chosen: the perplexity without them, or 1 - cos of the hidden states around them"""
    depth_tokens: int = Field(default=1024, ge=2)
    """about how many calibration tokens the perplexity is measured on, again after every removal"""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """the share of the calibration sequences, the last ones, kept apart to measure each layer's error on"""
    refit_damping: Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(read_dampings)] = ()
    """dampings (or one) of the last refit for each layer to choose from by its error on the held-out tokens, which are
    then fitted too (not where recovery needs them); needs held_out, and a solver that ends with a refit"""
    recovery: int = Field(default=0, ge=0)
    """rounds in which the kept weights of a pruned sub-module are refitted against its dense output; needs held_out"""
    recovery_steps: int = Field(default=8, ge=1)
    """conjugate gradient steps a layer and round, at most: the held-out tokens decide where to stop"""
    recovery_tokens: int | None = Field(default=None, ge=1)
    """about how many of the calibration tokens recovery fits: whole batches, from the first; None takes all"""
    recovery_damping: float = Field(default=0.1, ge=0)
    """the ridge of recovery towards the weights it begins with, as a share of the mean diagonal of its Hessian"""
    strict: bool = False
    """fallbacks, dead inputs, too few tokens and a budget that is not met are errors"""
    seed: int = Field(default=0, ge=0, lt=2**63)

    def state(self, context: LayerContext) -> Problem:
        """The problem to solve at a layer."""
        objective = self.objective or OBJECTIVES[self.units.objective]
        return objective(context)

    @model_validator(mode="after")
    def _units_for_linked(self) -> "Recipe":
        single = self.units.family is not None
        if self.objective is OBJECTIVES["linked"] and single:
            raise ValueError("the objective 'linked' keeps units, so units must be mlp, vo, kv-groups or all")
        if self.objective is OBJECTIVES["sparse"] and not single:
            raise ValueError("the objective 'sparse' keeps single weights, so units must be weights")
        if self.recovery and not self.held_out:
            raise ValueError("recovery needs held-out tokens to decide where to stop: set held_out, such as 0.125")
        if self.refit_damping and not self.held_out:
            raise ValueError("refit_damping is chosen on held-out tokens: set held_out, such as 0.125")
        if self.refit_damping and self.solver is not None and refitting(self.solver) is None:
            raise ValueError(
                f"refit_damping needs a solver that ends with restore or conjugate_gradients, not {self.solver.label}"
            )
        if self.budget != "parameters" and (self.allocation != "global" or not self.units.kinds):
            raise ValueError(
                f"a budget in {self.budget} is divided over widths: set allocation to global, and units to mlp, vo, "
                "kv-groups or all"
            )
        if self.pattern != ANYWHERE and not single:
            raise ValueError(
                f"the pattern {self.pattern.name} is one of single weights, but units are {self.units.name}: choose a "
                "recipe with units weights, such as sparsegpt"
            )
        if single and self.allocation == "global" and self.least_kept > self.most_kept:
            raise ValueError(
                f"no layer keeps at least {self.least_kept:g} and at most {self.most_kept:g} of its weights: lower "
                "least_kept, or raise most_kept"
            )
        if self.units.family not in (None, self.pattern):
            raise ValueError("the pattern of the units is not the recipe's: give it as the recipe's pattern alone")
        return self

    @model_validator(mode="after")
    def _sparsity_of_the_pattern(self) -> "Recipe":
        share = self.pattern.only_share
        if share is None or (self.allocation == "global" and self.sparsity < 1 - share):
            return self  # under a global budget some layers stay dense
        if abs(self.sparsity - (1 - share)) > 1e-9:
            raise ValueError(f"the pattern {self.pattern.name} has a sparsity of {1 - share:g}, not {self.sparsity:g}")
        return self

    @property
    def policy(self) -> Propagation:
        """The propagation policy of a run."""
        if self.propagation is not None:
            return self.propagation
        return POLICIES["pruned" if self.pattern.only_share is None else "intra"]

    def settled(self) -> "Recipe":
        """The recipe as it is run: with the policy that it leaves to the pattern."""
        return self.model_copy(update={"propagation": self.policy})

    @property
    def divides(self) -> bool:
        """Whether there is a budget to divide: not where N:M holds in every layer."""
        share = self.pattern.only_share
        return self.allocation == "global" and (share is None or self.sparsity < 1 - share - 1e-9)

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
