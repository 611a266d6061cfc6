"""The options --to and --to-quality of `prune`: a sparsity found by a goal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optprune.cli.tokens import calibration_of, tokenizer_of
from optprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from optprune.cli.prune_run import WholeRun
    from optprune.cli.request import Options, Resolved
    from optprune.program import Program
    from optprune.pruning.goal import Goal
    from optprune.recipe import Recipe
    from optprune.report import GoalReached


@dataclass(frozen=True)
class GoalOptions:
    """A goal with the data that it is measured on."""

    goal: "Goal"
    calibration: str
    text: str | None
    """the text of a quality"""
    windows: int | None
    sequences: str

    @classmethod
    def of(
        cls,
        to: str | None,
        quality: float | None,
        text: str | None,
        windows: int | None,
        calibration: str,
        sequences: str,
    ) -> "GoalOptions":
        """Return the options of a goal; InputError where they do not go together."""
        if quality is None and (text is not None or windows is not None):
            raise InputError("--text and --windows are for --to-quality: leave them out, or give a quality")
        if quality is not None and text is None:
            raise InputError("--to-quality needs a text to measure the quality on: give --text")
        from optprune.pruning.goal import parse_goal
        from optprune.texts.documents import IMAGES

        if quality is not None and calibration.startswith(IMAGES):
            raise InputError("--to-quality prunes the model on a text, not on records with images: give a text")
        return cls(parse_goal(to, quality), calibration, text, windows, sequences)

    def reached(self, resolved: "Resolved", whole: "WholeRun", say: Callable[[str], None]) -> "GoalReached":
        """Return the sparsity for the goal: that of the run that is continued, or else one that is searched for."""
        from optprune.calibration.peers import SingleProcess
        from optprune.models import DTYPES, load_model
        from optprune.pruning import Journal
        from optprune.pruning.goal import QualityGoal, Search

        earlier = whole.output.earlier_facts(Journal)
        if earlier is not None:
            # A second search may end elsewhere, since times differ.
            return self._of_earlier(earlier, whole)
        batches, windows = list["Tensor"](), None
        if isinstance(self.goal, QualityGoal):
            batches, windows = self._data(resolved)
            # The run calibrates on the same generated windows.
            batches = list(whole.with_generated(resolved.program, batches, SingleProcess()))

        def load() -> "PreTrainedModel":
            say(f"loading {whole.model}")
            places = {"dtype": whole.dtype, "device": whole.device, "architecture": whole.architecture}
            return load_model(whole.model, **places).model  # type: ignore[arg-type]

        saved = None if whole.save_dtype == "auto" else DTYPES[whole.save_dtype].itemsize
        return self.goal.reach(
            Search(
                program_at=lambda sparsity: _program(resolved, sparsity),
                load=load,
                batches=batches,
                windows=windows,
                itemsize=saved,
                say=say,
            )
        )

    def _of_earlier(self, facts: Mapping[str, Any], whole: "WholeRun") -> "GoalReached":
        """Return the sparsity of the run that is continued; InputError where that has another goal."""
        from optprune.report import GoalReached

        earlier = facts.get("the goal")
        if earlier is None or earlier["asked"] != self.goal.asked:
            before = "no goal" if earlier is None else f"the goal {earlier['asked']}"
            raise InputError(
                f"the run of {whole.output.folder} was begun with {before} and cannot continue with the goal "
                f"{self.goal.asked}; nothing was changed: give the command that began it, or --restart"
            )
        return GoalReached(**{**earlier, "tried": tuple((share, figure) for share, figure in earlier["tried"])})

    def _data(self, resolved: "Resolved") -> "tuple[list[Tensor], Tensor]":
        """Return the calibration batches, and the windows to measure the quality on."""
        from optprune.comparison.run import texts_apart, windows_to_evaluate

        assert self.text is not None
        texts, documents = texts_apart(self.calibration, self.text)
        length = resolved.program.request.seq_length
        with tokenizer_of(resolved.model) as tokenizer:
            windows = windows_to_evaluate(tokenizer, resolved.config, documents, length, self.windows, self.sequences)
        return list(calibration_of(resolved, texts, self.sequences).batches), windows


def resolve_for(
    goal: GoalOptions, options: "Options", recipe: "Recipe", *, whole: "WholeRun", say: Callable[[str], None]
) -> "Resolved":
    """Return the program of the options, with the sparsity that reaches the goal.

    InputError, before anything is loaded, where the recipe or --sparsity leave no sparsity to choose.
    """
    if "sparsity" in options.fields:
        raise InputError(f"the goal {goal.goal.asked} decides the sparsity: leave out --sparsity, or the goal")
    if options.experts is not None:
        raise InputError(f"the goal {goal.goal.asked} decides the sparsity: leave out --experts, or the goal")
    goal.goal.check(recipe)
    resolved = options.resolve(recipe)
    found = goal.reached(resolved, whole, say)
    say(found.in_words())
    return replace(resolved, program=_program(resolved, found.sparsity, found))


def _program(resolved: "Resolved", sparsity: float, goal: "GoalReached | None" = None) -> "Program":
    """Return the program of a run with another sparsity, chosen for a goal."""
    from optprune.program import resolve

    before = resolved.program.request
    request = replace(before, recipe=before.recipe.with_sparsity(sparsity), goal=goal)
    return resolve(resolved.program.decoder, request)
