"""Groups of a recipe's fields: the allocation of its budget, the output metric, and refits on held-out tokens.

A group has only the fields that take effect: there are no probes without a global budget, and no recovery without
held-out tokens.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_serializer,
    model_validator,
)

from optprune.allocation import Allocation
from optprune.grids import GRIDS, Grid
from optprune.recipe.names import NONE, read_dampings, read_solver, write_solver
from optprune.solvers import Chain, Gptq, GridDescent, Solver
from optprune.system.wording import either, suggestion


class Group(BaseModel):
    """Base of the groups of fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class UniformShares(Group):
    """Allocation that removes the same share from every block."""

    kind: Literal["uniform"] = "uniform"
    """uniform: the same share from every block"""
    multiple: int | None = Field(default=None, ge=1)
    """number of which the MLP width is a multiple; so are value dimensions where the dense model's are, except those of
    small heads that all keep the same number; null takes 64 for MLPs of 4096 units or more, 32 for those of 512 or more
    and for heads of 160 or more, 16 for heads of 80 or more, and 8 elsewhere"""


class GlobalBudget(Group):
    """Allocation of one budget for the model by the cost curves of the layers."""

    kind: Literal["global"] = "global"
    """global: one budget for the model, divided by the losses that removal causes in the layers"""
    currency: Literal["parameters", "flops", "time"] = "parameters"
    """unit of the budget: the blocks' linear weights, their operations, or their measured time"""
    tokens: int = Field(default=512, ge=1)
    """tokens of the forward pass whose operations or time are counted; 1 stands for decoding"""
    probe_tokens: int = Field(default=0, ge=0)
    """about how many calibration tokens the cost curves are corrected on: each layer (of units) or block (of single
    weights) is pruned alone, and its curve is scaled to the loss that this costs the model; 0 corrects nothing"""
    least: float = Field(default=0.2, ge=0, lt=1)
    """least share of its weights or units that a layer keeps; with zero whole sub-blocks may be removed"""
    most: float = Field(default=0.8, gt=0, le=1)
    """largest share of its weights that a layer keeps, where single weights are removed"""
    multiple: int | None = Field(default=None, ge=1)
    """number of which the MLP width is a multiple, and value dimensions where the dense model's are; null as under
    uniform"""


class DepthSearch(Group):
    """Allocation of units 'blocks', and of no others: whole sub-blocks are removed by a score."""

    kind: Literal["depth"] = "depth"
    """depth: whole sub-blocks chosen by a score, for units blocks"""
    parts: Literal["attention", "mlp", "both", "layers"] = "both"
    """sub-blocks that may be removed: attention, MLPs, either, or the two of a layer together"""
    score: Literal["perplexity", "influence"] = "perplexity"
    """score of a sub-block: the perplexity without it, or 1 - cos of the hidden states before and after it"""
    score_tokens: int = Field(default=1024, ge=2)
    """about how many calibration tokens the perplexity is measured on, again after every removal"""


class GivenBlocks(Group):
    """Allocation that lists what every block keeps, as an allocation file or the report of a run does."""

    kind: Literal["given"] = "given"
    """given: a list of what every block keeps, as in `--allocation FILE.json`"""
    blocks: tuple[dict[str, Any], ...]
    """for each block mlp_width, kv_heads, value_dim, optionally experts, pairs (of queries and keys; 0 for all), and
    shares of single weights by layer, as in report.json"""
    saves: str = ""
    """saving in the budget that the allocation was made for, in words"""

    @model_validator(mode="after")
    def _an_allocation(self) -> "GivenBlocks":
        Allocation.from_dict(self.model_dump() | {"sparsity": 0.0})
        return self

    @classmethod
    def of(cls, allocation: Allocation) -> "GivenBlocks":
        """Return the group that lists an allocation."""
        data = allocation.to_dict()
        return cls(blocks=tuple(data["blocks"]), saves=data.get("saves", ""))

    def allocation(self, sparsity: float) -> Allocation:
        """Return the allocation, with the sparsity that it is said to reach."""
        return Allocation.from_dict(self.model_dump() | {"sparsity": sparsity})


class FisherMetric(Group):
    """Output metric: the Fisher information of a layer's outputs, which weighs their errors."""

    kind: Literal["diagonal", "full"]
    """weights of output errors: the diagonal of the Fisher information of the outputs, or all of it"""
    tokens: int = Field(default=16384, ge=1)
    """about how many calibration tokens the metric is averaged over: whole sequences, from the first"""
    width: int | None = Field(default=None, ge=1)
    """most outputs of a layer with a full metric; wider layers have its diagonal"""
    damping: float = Field(default=0.01, ge=0)
    """damping added to the metric's diagonal, as a share of its mean"""
    clip: float | None = Field(default=None, gt=0)
    """largest norm of a token's gradient, as a multiple of the median norm in its sequence; larger gradients are scaled
    down. For an expert, all its tokens in a group of sequences count as one sequence"""


class Recovery(Group):
    """Recovery: the kept weights of a pruned sub-module are refitted to its dense output until held-out errors rise."""

    rounds: int = Field(ge=1)
    """rounds in which the kept weights of a pruned sub-module are refitted to its dense output"""
    steps: int = Field(default=8, ge=1)
    """most conjugate gradient steps per layer and round; the held-out tokens decide where to stop"""
    tokens: int | None = Field(default=None, ge=1)
    """about how many calibration tokens recovery fits: whole batches, from the first; null takes all"""
    damping: float = Field(default=0.1, ge=0)
    """ridge of recovery towards its starting weights, as a share of the mean diagonal of its Hessian"""


class Refit(Group):
    """Refits that use held-out calibration sequences."""

    held_out: float = Field(gt=0, lt=1)
    """share of the calibration sequences, the last ones, that are held out to measure each layer's error"""
    dampings: Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(read_dampings)] = ()
    """dampings of the last refit (or one) from which each layer takes the one with the least held-out error; held-out
    tokens are then fitted too, unless recovery needs them; requires a solver that ends with a refit"""
    recovery: Recovery | None = None
    """refit of the kept weights of pruned sub-modules: none, or a number of rounds"""

    @field_serializer("recovery")
    def _none(self, group: Group | None) -> Any:
        return NONE if group is None else group.model_dump(mode="json")


class LowBits(Group):
    """Grid of a low-bit format, on which all weights of the blocks' linear layers are put after they are pruned."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: Literal["q4_0", "q5_0", "q8_0", "w4a16", "w4a16_shifted"]
    """format: ggml's q4_0, q5_0 or q8_0 (blocks of 32 weights), or 4 bits in groups of 128 with a scale (w4a16), or
    with a scale and a minimum (w4a16_shifted)"""
    group: int = Field(default=128, ge=1)
    """weights that share a scale, for w4a16 and w4a16_shifted"""
    solver: Annotated[Solver, BeforeValidator(read_solver), PlainSerializer(write_solver)] = Field(
        default_factory=lambda: Chain((Gptq(), GridDescent()))
    )
    """solver of the problem on the grid: round_to_nearest, gptq, grid_descent, or a list of those"""

    @property
    def grid(self) -> Grid:
        """The grid."""
        grid = GRIDS[self.kind]
        return replace(grid, block=self.group) if self.kind.startswith("w4a16") else grid


class SmallerVocabulary(Group):
    """Smaller vocabulary: the tokens that the text needs least are removed, with their rows of embedding and head."""

    keep: float = Field(gt=0)
    """tokens that stay: a number of them, or a share below 1; bytes and special tokens are always among them"""
    tokens: int = Field(default=32768, ge=0)
    """about how many tokens of the calibration text the rows that stay are refitted on, so that they take over the
    probability of the removed tokens; 0 refits nothing"""
    predictions: int = Field(default=65536, ge=0)
    """about how many tokens of the calibration text the model predicts the next token after; the predicted
    probabilities count in the choice as the text does; with 0 the text alone counts"""


@dataclass(frozen=True)
class Choice:
    """A group of fields, or one of several groups, selected by the value of a switch."""

    switch: str
    """field whose value may stand for the group, as in `metric: full` or `refit: 0.125`"""
    models: tuple[type[Group], ...]
    default: str | None = None
    """value of the switch where none is given; None where the group is then off"""

    @property
    def kinds(self) -> dict[str, type[Group]]:
        """The group for each value of the switch, where the values are names."""
        options = [(model, get_args(model.model_fields[self.switch].annotation)) for model in self.models]
        return {kind: model for model, kinds in options for kind in kinds}

    def of(self, value: Any) -> type[Group] | None:
        """Return the group for a value of the switch, None for no group; ValueError where the value is not known."""
        if self.default is None and (value is None or value == NONE or (isinstance(value, int | float) and not value)):
            return None
        kinds = self.kinds
        if not kinds:
            return self.models[0]
        if not isinstance(value, str) or value not in kinds:
            known = tuple(kinds) if self.default else (NONE, *kinds)
            raise ValueError(f"use one of {', '.join(known)}{suggestion(value, known)}")
        return kinds[value]

    @property
    def values(self) -> str:
        """The values that may stand for the group, in words."""
        return either([*([] if self.default else [NONE]), *(self.kinds or [f"{{{self.switch}: ...}}"])])

    @property
    def names(self) -> list[str]:
        """The fields of all groups."""
        return list(dict.fromkeys(name for model in self.models for name in model.model_fields))

    def owners(self, name: str) -> list[type[Group]]:
        """Return the groups that have a field."""
        return [model for model in self.models if name in model.model_fields]


GROUPS = {
    "allocation": Choice("kind", (UniformShares, GlobalBudget, DepthSearch, GivenBlocks), "uniform"),
    "metric": Choice("kind", (FisherMetric,)),
    "bits": Choice("kind", (LowBits,)),
    "vocabulary": Choice("keep", (SmallerVocabulary,)),
    "refit": Choice("held_out", (Refit,)),
    "refit.recovery": Choice("rounds", (Recovery,)),
}
"""groups of fields by their path in a recipe"""
