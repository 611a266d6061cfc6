"""Goals in place of a sparsity: the size, the speed or the quality of the pruned model."""

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

from torch import Tensor
from transformers import PreTrainedModel

from optprune.calibration import Statistics
from optprune.errors import InputError
from optprune.measure import SpeedWorkload, measure_speed, perplexity
from optprune.measure.memory import release
from optprune.models import Decoder
from optprune.program import Program, Request, check_batches, resolve
from optprune.pruning.collecting import collect
from optprune.pruning.pipeline import run_program
from optprune.recipe import Recipe
from optprune.recipe.groups import GlobalBudget
from optprune.recipe.recipe import recipe_with
from optprune.report import GoalReached
from optprune.report.records import BYTES
from optprune.system.wording import amount

SIZES = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
MOST_TRIALS = 6
"""the most sparsities that are tried for a speed or a quality"""
FIRST_TRY = 0.1
"""the first sparsity that is tried for a quality"""
DIGITS = 4
"""decimals of a sparsity"""
SPEED_WORKLOAD = SpeedWorkload(prompt_tokens=64, new_tokens=32, repeats=5)


@dataclass(frozen=True, eq=False)
class Search:
    """The model and the data with which goals try sparsities."""

    program_at: Callable[[float], Program]
    """returns the program of a run at a sparsity; InputError where the recipe cannot have it"""
    load: Callable[[], PreTrainedModel]
    """loads the dense model"""
    batches: Sequence[Tensor] = ()
    """calibration batches of token ids [batch, length]"""
    windows: Tensor | None = None
    """token ids [n, length] on which quality is measured"""
    itemsize: int | None = None
    """the bytes of a weight in the folder; None for the dtype of the program"""
    say: Callable[[str], None] = field(default=lambda text: None)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The dense model, loaded once."""
        return self.load()


@dataclass(frozen=True)
class Goal(ABC):
    """A property that the pruned model is to have."""

    asked: str
    """the goal as the user wrote it"""

    @abstractmethod
    def reach(self, search: Search) -> GoalReached:
        """Return the sparsity that reaches the goal; InputError where none does."""

    def check(self, recipe: Recipe) -> None:
        """Raise InputError where no sparsity of a recipe can reach the goal."""
        if recipe.given is not None:
            raise InputError(f"the goal {self.asked} asks for a sparsity, which an allocation file decides: give one")
        if recipe.only_share is not None or not recipe.sparsity:
            raise InputError(
                f"the recipe {recipe.name} has one sparsity only, so the goal {self.asked} cannot choose it: choose a "
                "recipe for units such as fasp"
            )

    def check_shapes(self, recipe: Recipe, what: str) -> None:
        """Raise InputError where a recipe leaves the shapes of the model as they are."""
        if recipe.units.family is not None:
            raise InputError(
                f"zeros do not change the {what} of a folder, so the goal {self.asked} needs units that are removed: "
                "choose a recipe such as fasp"
            )


@final
@dataclass(frozen=True)
class SizeGoal(Goal):
    """A size of the weights in the folder."""

    bytes: int

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        self.check_shapes(recipe, "size")
        budget = recipe.allocation
        if isinstance(budget, GlobalBudget) and budget.currency != "parameters":
            raise InputError(
                f"the goal {self.asked} needs a budget in parameters, and the recipe's is in {budget.currency}: set "
                "allocation.currency to parameters"
            )

    def reach(self, search: Search) -> GoalReached:
        some = search.program_at(FIRST_TRY)
        whole = some.decoder.architecture.part_of
        if whole:
            raise InputError(
                f"the goal {self.asked} would be the size of a {whole} folder, whose vision part is not pruned: give "
                "--sparsity"
            )
        itemsize = search.itemsize or some.itemsize
        removed = some.vocabulary_removed * itemsize
        linear = some.decoder.linear_weights() * itemsize
        dense = some.dense_numbers * itemsize
        if self.bytes >= dense:
            raise InputError(f"the model's weights take {amount(dense)}: give a goal below that, not {self.asked}")
        if self.bytes >= dense - removed:
            raise InputError(f"the smaller vocabulary alone reaches the goal {self.asked}: give --sparsity 0")
        sparsity, tried = _rounded_up((dense - removed - self.bytes) / linear), list[tuple[float, float]]()
        if sparsity >= 1:
            raise InputError(
                f"the goal {self.asked} is out of reach: {amount(dense - removed - linear)} of the model are outside "
                "the linear weights of the blocks, which a recipe for units does not remove; see --vocabulary"
            )
        while True:
            size = search.program_at(sparsity).pruned_numbers * itemsize
            tried.append((sparsity, float(size)))
            if size <= self.bytes:
                break
            # Widths are rounded: ask for the rest too, until the units have no more to give, which is an error.
            sparsity = _rounded_up(sparsity + max((size - self.bytes) / linear, 0.002))
        return GoalReached(self.asked, BYTES, sparsity, tried[-1][1], tuple(tried))


@final
@dataclass(frozen=True)
class SpeedGoal(Goal):
    """A speed of decoding over that of the dense model on this machine.

    Models with the shapes of a uniform share are timed beside the dense one, in turn.
    """

    factor: float
    work: SpeedWorkload = SPEED_WORKLOAD
    tolerance: float = 0.03

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        self.check_shapes(recipe, "speed")
        if not recipe.units.kinds:
            raise InputError(
                f"the goal {self.asked} needs units with a width, and {recipe.units.name} have none: choose a recipe "
                "such as fasp, or give --sparsity"
            )
        _without_vocabulary(self.asked, recipe)

    def reach(self, search: Search) -> GoalReached:
        dense, tried = search.dense, list[tuple[float, float]]()
        self.work.check("the model", dense.config)
        some = search.program_at(FIRST_TRY)
        # The time of a token is about that of reading all weights once, but for separate embeddings.
        inner, outer = dense.get_input_embeddings(), dense.get_output_embeddings()
        tied = outer is None or inner.weight is outer.weight
        separate = 0 if tied else some.vocabulary * some.hidden
        slope, most = some.decoder.linear_weights() / (some.dense_numbers - separate), most_sparsity(search)
        for _ in range(MOST_TRIALS):
            sparsity = round((1 - 1 / self.factor) / slope, DIGITS)
            if sparsity >= most:
                raise InputError(self._too_far(tried))
            factor = self.measured(dense, search.program_at(sparsity))
            tried.append((sparsity, factor))
            search.say(f"sparsity {sparsity:.3f}: decodes {factor:.2f} times as fast as the dense model")
            if abs(factor / self.factor - 1) <= self.tolerance:
                break
            if factor <= 1:
                raise InputError(self._too_far(tried))
            slope = (1 - 1 / factor) / sparsity
        sparsity, factor = min(tried, key=lambda one: abs(math.log(one[1] / self.factor)))
        return GoalReached(self.asked, "times the dense model's speed of decoding", sparsity, factor, tuple(tried))

    def measured(self, dense: PreTrainedModel, program: Program) -> float:
        """Return the speed of decoding, over the dense model's, of a model with the shapes of a program."""
        narrow = copy.deepcopy(dense)
        narrow_to(Decoder(narrow), program)
        whole, smaller = measure_speed({"dense": dense, "pruned": narrow}, self.work)
        del narrow
        release()
        return smaller.decode.over(whole.decode).median

    def _too_far(self, tried: Sequence[tuple[float, float]]) -> str:
        """Return the sentence of an error, with the last sparsity that was tried."""
        found = [f", where a sparsity of {share:.3f} decodes {factor:.2f} times as fast" for share, factor in tried]
        return f"the goal {self.asked} is out of reach on this machine{(found or [''])[-1]}: give a smaller factor"


@final
@dataclass(frozen=True)
class QualityGoal(Goal):
    """Largest loss of the pruned model on a text, over that of the dense model.

    With one tokenizer, bits per byte have the ratio of the losses per token. Each trial prunes a copy of the model in
    memory.
    """

    ratio: float
    tolerance: float = 0.15
    """the share of the loss that is allowed and may be left unused"""

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        _without_vocabulary(self.asked, recipe)

    def reach(self, search: Search) -> GoalReached:
        if search.windows is None:
            raise InputError(f"the goal {self.asked} needs a text to measure the quality on: give its windows")
        dense, allowed = search.dense, self.ratio - 1
        whole = math.log(perplexity(dense, search.windows).perplexity)
        search.say(f"dense: {whole:.4f} nats per token")
        batches = check_batches(dense.config, search.batches)
        recipe = search.program_at(FIRST_TRY).request.recipe
        statistics = collect(dense, batches, recipes=[recipe])
        tried, known = list[tuple[float, float]](), {0.0: 0.0, most_sparsity(search): math.inf}
        sparsity: float | None = FIRST_TRY
        while sparsity is not None and len(tried) < MOST_TRIALS:
            ratio = self._measured(search, sparsity, batches, statistics, whole)
            tried.append((sparsity, ratio))
            known[sparsity] = ratio - 1
            search.say(f"sparsity {sparsity:.3f}: bits per byte {ratio:.4f} times the dense model's")
            sparsity = next_sparsity(known, allowed, self.tolerance)
            sparsity = None if sparsity is None else round(sparsity, DIGITS)
        reaching = [one for one in tried if one[1] <= self.ratio]
        if not reaching:
            least, ratio = min(tried)
            raise InputError(
                f"the goal {self.asked} is out of reach: a sparsity of {least:.3f} already has {ratio:.4f} times the "
                "dense model's bits per byte; give a larger one"
            )
        sparsity, ratio = max(reaching)
        return GoalReached(self.asked, "times the dense model's bits per byte", sparsity, ratio, tuple(tried))

    def _measured(
        self, search: Search, sparsity: float, batches: list[Tensor], statistics: Statistics, whole: float
    ) -> float:
        """Return the loss of the model at a sparsity, over the dense model's."""
        assert search.windows is not None
        model = copy.deepcopy(search.dense)
        decoder = Decoder(model)
        run_program(search.program_at(sparsity), decoder, batches, statistics=statistics)
        found = perplexity(model, search.windows).perplexity
        del model, decoder
        release()
        return math.log(found) / whole


def next_sparsity(known: dict[float, float], allowed: float, tolerance: float) -> float | None:
    """Return the sparsity to try next, from the excess losses of others; None where one is close enough.

    The excess is taken for a power of the sparsity: the one through the two trials around the goal, or else through
    the last two below it, or 1.5. Infinity is the excess of a sparsity that cannot be had. A trial is close enough
    where its excess is allowed, and uses all of it but a share `tolerance`.
    """
    under = max(share for share, excess in known.items() if excess <= allowed)
    over = min(share for share, excess in known.items() if excess > allowed)
    if known[under] >= (1 - tolerance) * allowed or over - under < 0.005:
        return None
    aim = (1 - tolerance / 2) * allowed
    near = [share for share in sorted(known) if 0 < known[share] < math.inf and share <= over][-2:]
    if not near:
        return (under + over) / 2 if under == 0 else min(2 * under, (under + over) / 2)
    power = 1.5
    if len(near) == 2 and known[near[1]] > known[near[0]]:
        power = math.log(known[near[1]] / known[near[0]]) / math.log(near[1] / near[0])
    found = near[-1] * (aim / known[near[-1]]) ** (1 / power)
    if known[over] == math.inf:
        return min(found, 2.5 * under, (under + over) / 2)
    margin = 0.1 * (over - under)
    return min(max(found, under + margin), over - margin)


def most_sparsity(search: Search) -> float:
    """Return a sparsity which a recipe can only just have, or cannot have, within a hundredth."""
    under, over = 0.0, 1.0
    while over - under > 0.01:
        middle = (under + over) / 2
        try:
            search.program_at(middle).expected(0)
            under = middle
        except InputError:
            over = middle
    return over


def narrow_to(decoder: Decoder, program: Program) -> None:
    """Delete units of a model, whichever, until its blocks have the shapes of a program."""
    for index in range(len(decoder.blocks)):
        wanted = program.expected(index).shape
        for kind in program.units.kinds:
            if kind.there(wanted) < kind.there(decoder.shape(index)):
                for layers in kind.layers(decoder, index):
                    decoder.keep_units(index, layers, layers.channels.first(kind.there(wanted)))


def find_sparsity(
    model: PreTrainedModel,
    recipe: str | Recipe,
    goal: str | Goal,
    *,
    batches: Sequence[Tensor] = (),
    windows: Tensor | None = None,
    say: Callable[[str], None] = lambda text: None,
    **fields: Any,
) -> GoalReached:
    """Return the sparsity at which a recipe reaches a goal on a model, which is not changed.

    The goal is a size of the weights such as "200MiB", a speed of decoding over the dense model's such as "1.5x", or a
    `QualityGoal`, for which the model is pruned on `batches` and evaluated on `windows`, both token ids [n, length].
    The recipe is a Recipe, a name or a YAML file, whose `fields` are replaced as in `prune`, which reaches the goal by
    the same recipe and fields with the `sparsity` that was found. `say` is called with a sentence for each sparsity
    that is tried. InputError where the recipe cannot reach the goal.
    """
    recipe = recipe_with(recipe, fields)
    wanted = parse_goal(goal) if isinstance(goal, str) else goal
    wanted.check(recipe)
    decoder = Decoder(model)

    def program_at(sparsity: float) -> Program:
        request = Request(recipe=recipe.with_sparsity(sparsity), dtype=model.dtype, device=model.device.type)
        return resolve(decoder, request)

    return wanted.reach(Search(program_at, lambda: model, batches, windows, say=say))


def parse_goal(text: str | None, quality: float | None = None) -> Goal:
    """Return the goal in a text such as 200MiB or 1.5x, or of a ratio of bits per byte.

    Raises InputError for other texts, and unless one of the two is given.
    """
    if (text is None) == (quality is None):
        raise InputError("--to and --to-quality are two goals: give one of them")
    if quality is not None:
        if not 1 < quality < math.inf:
            raise InputError(f"--to-quality {quality:g} is not above 1: give a ratio such as 1.05")
        return QualityGoal(f"quality {quality:g}", quality)
    asked = (text or "").strip()
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)", asked)
    number, unit = (float(found[1]), found[2].lower()) if found else (0.0, "")
    if unit in SIZES and number * SIZES[unit] >= 1:
        return SizeGoal(asked, int(number * SIZES[unit]))
    if unit == "x" and number > 1:
        return SpeedGoal(asked, number)
    raise InputError(f"--to {text!r} is neither a size such as 200MiB nor a speed such as 1.5x, above 1: give one")


def _rounded_up(sparsity: float) -> float:
    return math.ceil(sparsity * 10**DIGITS) / 10**DIGITS


def _without_vocabulary(asked: str, recipe: Recipe) -> None:
    if recipe.vocabulary is not None:
        raise InputError(
            f"the goal {asked} is measured with the whole vocabulary: prune the vocabulary in a run before"
        )
