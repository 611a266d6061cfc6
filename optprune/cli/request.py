"""The options of `prune` and `plan`, checked and resolved before anything takes time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optprune.cli.choices import check_choices
from optprune.cli.outputs import Input, files_in
from optprune.errors import InputError, check_at_least
from optprune.system.files import read_yaml
from optprune.system.wording import one_line, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from optprune.allocation import Allocation
    from optprune.models import Decoder
    from optprune.program import Program, Runtime
    from optprune.recipe import Recipe
    from optprune.recipe.groups import GivenBlocks
    from optprune.texts import DrawnRecords


FIELDS = {
    **{name: name for name in ("sparsity", "seed", "propagation", "units", "bits", "vocabulary")},
    "pattern": "units.weights",
    "width_multiple": "allocation.multiple",
}
"""the recipe fields that have their own option, apart from --strict, by argument of the command"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a command, unresolved."""

    model: str
    recipe: "str | Recipe"
    fields: Mapping[str, Any]
    """recipe fields that are given by their own option, or by name in Python"""
    settings: Sequence[str]
    """recipe fields as KEY=VALUE"""
    allocation: str | None
    samples: int
    seq_length: int
    generated: int
    device: str
    dtype: str
    save_dtype: str
    workers: int | None
    ray: str | None
    max_shard_size: str
    states: str
    target: str | None = None
    """the runtime that the model is for"""
    architecture: Path | None = None
    """the draft of the model's architecture"""
    effort: str = "standard"
    """how much time the recipe takes"""
    experts: int | None = None
    """the experts that each block keeps; an average where one budget is divided over the blocks"""
    expert_scores: str | None = None
    """the file of scores by which experts are chosen"""
    records: "DrawnRecords | None" = None
    """the records with images that the calibration is, where it is no text"""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Options":
        """Return the options among a command's arguments; InputError, without heavy imports, for an unknown name."""
        names = ("units", "bits", "propagation", "target", "states", "dtype", "save_dtype", "effort")
        named = {name: arguments[name] for name in names}
        recipe = arguments["recipe"]
        check_choices(recipe if isinstance(recipe, str) else None, sequences=arguments["sequences"], **named)
        if arguments["bits"] not in (None, "none") and arguments["save_dtype"] != "auto":
            raise InputError("--save-dtype would round weights off the grid of --bits: give --dtype in its place")
        check_at_least("--samples", arguments["samples"], 1)
        check_at_least("--seq-length", arguments["seq_length"], 2)
        check_at_least("--generated", arguments.get("generated", 0), 0)
        if arguments.get("experts") is not None and arguments["sparsity"] is not None:
            raise InputError("--experts decides the sparsity: leave out --sparsity")
        own = {one.name: arguments[one.name] for one in fields(cls) if one.name in arguments}
        chosen = {field: arguments[name] for name, field in FIELDS.items()} | {"strict": arguments["strict"] or None}
        given = {field: value for field, value in chosen.items() if value is not None}
        return cls(**own | {"fields": given, "settings": arguments["settings"] or ()})

    def with_fields(self, fields: Mapping[str, Any]) -> "Options":
        """Return the options with more recipe fields; InputError where an option gives one of them already."""
        for name in fields:
            if name in self.fields:
                raise InputError(
                    f"the recipe field {shown(name)} is given twice, the second time as {one_line(str(fields[name]))} "
                    "in `fields`: give one"
                )
        return replace(self, fields={**self.fields, **fields})

    @property
    def allocation_file(self) -> str | None:
        """The file of the allocation, if the option names one."""
        return self.allocation if self.allocation is not None and self.allocation.endswith(".json") else None

    @property
    def input_files(self) -> list[Input]:
        """Input files that the options name."""
        return [
            *files_in([self.recipe] if isinstance(self.recipe, str) else []),
            self.allocation_file,
            self.expert_scores,
            self.architecture,
        ]

    def chosen(self) -> "Recipe":
        """Return the recipe with the user's settings."""
        from optprune.recipe.recipe import recipe_with
        from optprune.solvers import GivenScores

        self.runtime()
        fields = dict(self.fields)
        if self.allocation is not None:
            fields["allocation"] = self.allocation if self.allocation_file is None else self._given()
        if self.expert_scores is not None:
            fields["solver"] = GivenScores.read(self.expert_scores)
        given = overrides(fields, self.settings)
        recipe = recipe_with(self.recipe, given, effort=self.effort)
        if self.generated and recipe.vocabulary is not None:
            raise InputError("--generated gives text in tokens that --vocabulary removes: leave out one of them")
        if self.allocation_file is not None and "sparsity" in given and recipe.only_share is None:
            raise InputError(
                f"the allocation file {self.allocation_file} already decides the sparsity: leave out --sparsity"
            )
        return recipe

    def _with_experts(self, recipe: "Recipe", shapes: "Decoder") -> "Recipe":
        """Return the recipe with the sparsity at which every block keeps the number of experts of --experts."""
        if self.experts is None:
            return recipe
        from optprune.allocation.uniform import removed_by_experts

        if not recipe.units.experts or recipe.given is not None:
            raise InputError("--experts is for recipes whose units are experts: choose --recipe experts_best")
        removed = removed_by_experts(shapes, recipe.units.least_experts(shapes))
        counts = sorted(removed)[:-1]
        if self.experts not in counts:
            raise InputError(
                f"--experts {self.experts} is out of range: give {counts[0]} to {counts[-1]} of the {counts[-1] + 1} "
                "experts of a block"
            )
        return recipe.with_sparsity(removed[self.experts])

    def with_calibration(self, calibration: str | None, recipe: "Recipe") -> "Options":
        """Return the options with the records of a calibration that is no text, counted by the model's processor."""
        from optprune.system.environment import started_by_torchrun
        from optprune.texts import draw_records, read_records
        from optprune.texts.documents import IMAGES

        if calibration is None or not calibration.startswith(IMAGES) or Path(calibration).exists():
            return self
        if self.generated:
            raise InputError("--generated continues a text, and the calibration is one of records: leave it out")
        if started_by_torchrun():
            raise InputError("records with images are read by one process: start the command without torchrun")
        records = read_records(calibration.removeprefix(IMAGES))
        drawn = draw_records(self.model, records, self.samples, recipe.seed)
        return replace(self, records=replace(drawn, description=f"{calibration}, {drawn.description}"))

    def _given(self) -> "GivenBlocks":
        """Return the allocation in the file as a recipe group."""
        from optprune.recipe.groups import GivenBlocks

        return GivenBlocks.of(_read_allocation(str(self.allocation_file)))

    def runtime(self) -> "Runtime | None":
        """Return the runtime of --target; InputError where it is unknown."""
        from optprune.program.runtimes import runtime_called

        return None if self.target is None else runtime_called(self.target)

    def resolve(self, recipe: "Recipe") -> "Resolved":
        """Return the program of the run for the model's shapes; InputError where they do not match."""
        from optprune.allocation import Given
        from optprune.export.shards import size_of
        from optprune.models import load_shapes
        from optprune.models.load import read_config
        from optprune.program import Request, resolve
        from optprune.program.check import check_parts
        from optprune.program.resolve import places_of
        from optprune.program.runtimes import runtime_called
        from optprune.texts import check_seq_length

        config, quantised = read_config(self.model, self.architecture)
        if self.records is None:
            check_seq_length(config, self.seq_length)
        shapes = load_shapes(self.model, config)
        recipe = self._with_experts(recipe, shapes)
        divided = recipe.given
        if divided is not None and self.allocation_file is not None:
            with _named_file(self.allocation_file, "does not fit"):
                Given(recipe.units, divided).check(shapes)
        runtime, notes = self.runtime(), tuple[str, ...]()
        if runtime is None and shapes.architecture.alike:
            check_parts(shapes, recipe, divided)
            runtime = runtime_called("transformers")
        if runtime is not None:
            recipe, notes = runtime.fitted(recipe, shapes, divided)
            if runtime.own_vocabulary:
                _check_exportable(self.model, config, shapes)
        request = Request(
            recipe=recipe,
            allocation=divided,
            samples=self.samples,
            seq_length=self.seq_length,
            lengths=() if self.records is None else self.records.lengths,
            generated=self.generated,
            workers=self.workers or 1,
            ray=self.ray is not None,
            states=self.states,
            max_shard=size_of(self.max_shard_size),
            **places_of(self.model, shapes, self.device, self.dtype),
        )
        program = resolve(shapes, request)
        if self.generated:
            from optprune.calibration.generated import check_count, check_held_out

            check_count(self.generated)
            check_held_out(self.samples, self.generated, program.held_out)
        method = None if quantised is None else quantised.method
        return Resolved(self.model, program, config, runtime, notes, method, self.records, self.device)


@dataclass(frozen=True, eq=False)
class Resolved:
    """A program with the config, the runtime and the notes of its resolution."""

    model: str
    program: "Program"
    config: "PretrainedConfig"
    runtime: "Runtime | None" = None
    notes: tuple[str, ...] = ()
    """changes of the recipe for the runtime"""
    few_bits: str | None = None
    """the method by which the stored weights are quantised; None for floats"""
    records: "DrawnRecords | None" = None
    """the records of the calibration, where it is no text"""
    device: str = "auto"
    """the device, as the option names it"""

    def report_notes(self, say: Callable[[str], None]) -> None:
        """Report the recipe's changes for the runtime, what becomes of weights in few bits, and spare workers."""
        if self.few_bits is not None:
            say(f"its weights are stored in {self.few_bits}: they are read and saved as floats")
        for sentence in self.notes:
            say(f"for the target {self.runtime.name if self.runtime else ''}: {sentence}")
        if self.program.spare_workers:
            say(self.program.spare_workers)

    def check(self, folder: Path) -> None:
        """Raise OptpruneError unless the runtime takes the folder that was written."""
        if self.runtime is not None:
            self.runtime.check_folder(self.program.decoder, folder)


def _check_exportable(model: str, config: "PretrainedConfig", shapes: "Decoder") -> None:
    """Raise InputError unless llama.cpp supports the model and its tokenizer."""
    from optprune.export.gguf_families import family_of
    from optprune.export.gguf_vocabulary import Vocabulary
    from optprune.models import load_tokenizer, need_tokenizer

    family_of(shapes)
    Vocabulary.of(need_tokenizer(load_tokenizer(model), model), config.vocab_size)


def overrides(options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return the recipe fields that the user gave, by option or as --set key=value."""
    fields = dict(options)
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"--set {shown(setting)} is not of the form KEY=VALUE, such as damping=0.05")
        if key in fields:
            raise InputError(
                f"the recipe field {shown(key)} is given twice, the second time by --set {one_line(setting)}: give one"
            )
        fields[key] = read_yaml(text, f"the value in --set {one_line(setting)}")
    return fields


def _read_allocation(file: str) -> "Allocation":
    """Return the allocation in a file, which is an allocation or the report of an earlier run."""
    from optprune.allocation import Allocation

    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the allocation file {file} cannot be read: {error}") from error
    with _named_file(file, "cannot be used"):
        return Allocation.from_json(text)


@contextmanager
def _named_file(file: str | None, problem: str) -> Iterator[None]:
    """Add the name of the file to an InputError about its allocation."""
    try:
        yield
    except InputError as error:
        raise InputError(f"the allocation file {file} {problem}: {error}") from error
