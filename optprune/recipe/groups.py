"""The groups of a recipe's fields: how its budget is divided, what weighs output errors, refits on held-out tokens.

A field is there only where it does something: there are no probes without a global budget, and no recovery without
held-out tokens.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_serializer, model_validator

from optprune.allocation import Allocation
from optprune.recipe.names import NONE, read_dampings
from optprune.solvers import Adam, Descent, Lbfgs


class Group(BaseModel):
    """Fields of a recipe that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class UniformShares(Group):
    """The same share from every block."""

    kind: Literal["uniform"] = "uniform"
    """uniform: the same share from every block"""
    multiple: int | None = Field(default=None, ge=1)
    """the MLP width is a multiple of this; the value dimensions too where all of them are, but for small heads that are
    all to keep the same number; null takes 64 for MLPs of 4096 units or more, and 8 elsewhere"""


class GlobalBudget(Group):
    """One budget for the model, divided by what the layers would lose."""

    kind: Literal["global"] = "global"
    """global: one budget for the model, divided by what the layers would lose"""
    currency: Literal["parameters", "flops", "time"] = "parameters"
    """what the budget is a share of: the blocks' linear weights, their operations, or their measured time"""
    tokens: int = Field(default=512, ge=1)
    """the tokens of the forward pass that operations and time are of; a single one stands for decoding"""
    probe_tokens: int = Field(default=0, ge=0)
    """about how many calibration tokens the budget is put right on: what is pruned alone, of units a layer and of
    single weights a block, has its costs scaled to what that really costs the model; with none, costs are believed"""
    least: float = Field(default=0.2, ge=0, lt=1)
    """the least share of its weights or units that a layer keeps; with zero whole sub-blocks may go"""
    most: float = Field(default=0.8, gt=0, le=1)
    """the most of its weights that a layer keeps, where single weights go"""
    multiple: int | None = Field(default=None, ge=1)
    """the MLP width is a multiple of this, and the value dimensions too where all of them are; null as under uniform"""


class DepthSearch(Group):
    """Whole sub-blocks, chosen by a score: what units 'blocks' are allocated by, and nothing else."""

    kind: Literal["depth"] = "depth"
    """depth: whole sub-blocks, chosen by a score, of units blocks"""
    parts: Literal["attention", "mlp", "both", "layers"] = "both"
    """which sub-blocks may go: attention, MLPs, either, or the two of a layer together"""
    score: Literal["perplexity", "influence"] = "perplexity"
    """what sub-blocks are chosen by: the perplexity without them, or 1 - cos of the hidden states around them"""
    score_tokens: int = Field(default=1024, ge=2)
    """about how many calibration tokens the perplexity is measured on, again after every removal"""


class GivenBlocks(Group):
    """What every block keeps, said for each, as in an allocation file or the report of a run."""

    kind: Literal["given"] = "given"
    """given: what every block keeps is said, as `--allocation FILE.json` does"""
    blocks: tuple[dict[str, Any], ...]
    """what each block keeps: mlp_width, kv_heads, value_dim, perhaps experts, and perhaps shares of single weights by
    layer, as report.json has them"""
    saves: str = ""
    """what that saves of the budget that it was made for, in words"""

    @model_validator(mode="after")
    def _an_allocation(self) -> "GivenBlocks":
        Allocation.from_dict(self.model_dump() | {"sparsity": 0.0})
        return self

    @classmethod
    def of(cls, allocation: Allocation) -> "GivenBlocks":
        """The group that says what an allocation does."""
        data = allocation.to_dict()
        return cls(blocks=tuple(data["blocks"]), saves=data.get("saves", ""))

    def allocation(self, sparsity: float) -> Allocation:
        """What every block keeps, which is said to come to a sparsity."""
        return Allocation.from_dict(self.model_dump() | {"sparsity": sparsity})


class FisherMetric(Group):
    """The Fisher information of a layer's outputs, which weighs their errors."""

    kind: Literal["diagonal", "full"]
    """what weighs output errors: the diagonal of the Fisher information of the outputs, or all of it"""
    tokens: int = Field(default=16384, ge=1)
    """about how many calibration tokens the metric is the average of: whole sequences, from the first"""
    width: int | None = Field(default=None, ge=1)
    """the most outputs of a layer that gets its whole metric; wider ones get its diagonal"""
    damping: float = Field(default=0.01, ge=0)
    """what is added to the metric's diagonal, as a share of its mean"""


class Recovery(Group):
    """The kept weights of a pruned sub-module refitted against its dense output; held-out tokens say where to stop."""

    rounds: int = Field(ge=1)
    """rounds in which the kept weights of a pruned sub-module are refitted against its dense output"""
    steps: int = Field(default=8, ge=1)
    """conjugate gradient steps a layer and round, at most: the held-out tokens decide where to stop"""
    tokens: int | None = Field(default=None, ge=1)
    """about how many of the calibration tokens recovery fits: whole batches, from the first; null takes all"""
    damping: float = Field(default=0.1, ge=0)
    """the ridge of recovery towards the weights it begins with, as a share of the mean diagonal of its Hessian"""


class Matching(Group):
    """All kept weights of a pruned block moved by gradients until it answers what the dense block does."""

    epochs: int = Field(ge=1)
    """how often the calibration tokens are gone through to match a pruned block's output to the dense block's, at most:
    the held-out tokens decide where to stop"""
    solver: Literal["adam", "lbfgs"] = "adam"
    """what moves the weights: Adam a few sequences at a time, or L-BFGS all of them at every step"""
    rate: float = Field(default=0.003, gt=0, le=1)
    """the largest share of its layer's root mean square by which a step of Adam moves a weight"""
    sequences: int = Field(default=1, ge=1)
    """the sequences of a step of Adam"""
    pull: float = Field(default=0.0, ge=0)
    """the weight of the mean squared move of the weights, in such shares, beside the block's relative error"""
    tokens: int | None = Field(default=None, ge=1)
    """about how many of the calibration tokens matching fits: whole batches, from the first; null takes all"""

    @property
    def descent(self) -> Descent[Any]:
        """The solver that moves the weights."""
        return Lbfgs(self.epochs) if self.solver == "lbfgs" else Adam(self.epochs, self.rate)


class Refit(Group):
    """What is done with calibration sequences that are kept apart."""

    held_out: float = Field(gt=0, lt=1)
    """the share of the calibration sequences, the last ones, kept apart to measure each layer's error on"""
    dampings: Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(read_dampings)] = ()
    """dampings (or one) of the last refit for each layer to choose from by its error on the held-out tokens, which are
    then fitted too (not where recovery needs them); needs a solver that ends with a refit"""
    recovery: Recovery | None = None
    """whether and how the kept weights of pruned sub-modules are refitted: none, or rounds of it"""
    matching: Matching | None = None
    """whether and how pruned blocks are then matched as a whole: none, or how often the tokens are gone through"""

    @field_serializer("recovery", "matching")
    def _none(self, group: Group | None) -> Any:
        return NONE if group is None else group.model_dump(mode="json")


@dataclass(frozen=True)
class Choice:
    """A group of fields, or one of several: which, and whether there is one at all, says its switch."""

    switch: str
    """the field that one value stands for where a group is given as that, as in `metric: full` or `refit: 0.125`"""
    models: tuple[type[Group], ...]
    default: str | None = None
    """the value of the switch where none is given; None where there may be no such group"""

    @property
    def kinds(self) -> dict[str, type[Group]]:
        """The group for each value of the switch, where those are names."""
        options = [(model, get_args(model.model_fields[self.switch].annotation)) for model in self.models]
        return {kind: model for model, kinds in options for kind in kinds}

    def of(self, value: Any) -> type[Group] | None:
        """The group for a value of the switch, None for no group; ValueError where the value is not known."""
        if self.default is None and (value is None or value == NONE or (isinstance(value, int | float) and not value)):
            return None
        kinds = self.kinds
        if not kinds:
            return self.models[0]
        if not isinstance(value, str) or value not in kinds:
            raise ValueError(f"use one of {', '.join(kinds if self.default else (NONE, *kinds))}")
        return kinds[value]

    @property
    def names(self) -> list[str]:
        """The fields of all groups."""
        return list(dict.fromkeys(name for model in self.models for name in model.model_fields))

    def owners(self, name: str) -> list[type[Group]]:
        """The groups that have a field."""
        return [model for model in self.models if name in model.model_fields]


GROUPS = {
    "allocation": Choice("kind", (UniformShares, GlobalBudget, DepthSearch, GivenBlocks), "uniform"),
    "metric": Choice("kind", (FisherMetric,)),
    "refit": Choice("held_out", (Refit,)),
    "refit.recovery": Choice("rounds", (Recovery,)),
    "refit.matching": Choice("epochs", (Matching,)),
}
