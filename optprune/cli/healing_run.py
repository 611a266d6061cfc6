"""A run of `optprune heal`: from a folder, the dense model and a text to a checked folder, by one or more processes."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from optprune.cli.outputs import started
from optprune.cli.run_folder import Output, keep_or_delete
from optprune.cli.tokens import begin_for, check_alike, tokens_for

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from optprune.calibration.peers import Peers
    from optprune.export import SavedModel
    from optprune.healing import HealingSettings, HealReport
    from optprune.measure.teacher import Teacher
    from optprune.models import Decoder, LoadedModel
    from optprune.report import Event, PhaseRecorder
    from optprune.report.progress import Reporter
    from optprune.texts import TrainingText
    from optprune.tokens import SmallerVocabulary


HEALING = "healing"
"""the section of report.json"""


@dataclass(frozen=True)
class HealedOutput:
    """A healed folder with its report."""

    section: dict[str, Any]
    """the healing section of its report"""
    report: "HealReport | None"
    """the report of the training; None, as `saved`, where the output was finished before"""
    saved: "SavedModel | None"


@dataclass(frozen=True)
class HealingRun:
    """The inputs, the output and the settings of a healing run."""

    model: str
    teacher: str
    text: str
    output: Output
    """the folder; its report holds the facts of the run in the section `HEALING`"""
    settings: "HealingSettings"
    device: str

    def run(
        self,
        reporter: "Reporter",
        tokens: int | None,
        most: int,
        seq_length: int,
        batch_size: int,
        held_out: int,
    ) -> "HealedOutput | None":
        """Tokenise, load, train, save and check; return None in all processes but the first."""
        from optprune.calibration.peers import joined
        from optprune.export import check_own_files
        from optprune.healing import HealingFolder
        from optprune.models import device_of, load_config, load_shapes
        from optprune.models.draft import draft_in
        from optprune.program.time import expected_files
        from optprune.report import PhaseRecorder, PhasesExpected
        from optprune.report.phases import TOKENISING
        from optprune.report.reading import read_run_report
        from optprune.texts import check_seq_length, read_documents, split_held_out
        from optprune.tokens import PushForward

        # Checks that take no time come first.
        self.output.check()
        check_own_files(self.model)
        read_run_report(self.model)  # the page of the output is about it
        self.output.check_run(HealingFolder, {"the settings": asdict(self.settings)})
        documents, config = read_documents(self.text), load_config(self.model)
        dense = load_config(self.teacher, draft_in(config))
        for one in (config, dense):
            check_seq_length(one, seq_length)
        shapes = load_shapes(self.model, config), load_shapes(self.teacher, dense)
        characters = sum(len(document) for document in documents if isinstance(document, str))
        expected = expected_files(shapes[0], characters, started())
        with joined(self.device) as peers, reporter.events(expected) as on_event:
            phases = PhaseRecorder(device_of(self.device), self._event_handler(reporter, on_event))
            with phases.step(TOKENISING, f"tokenising {self.text}"):
                sizes = {"seq_length": seq_length, "batch_size": batch_size, "held_out": held_out}
                drawn: dict[str, Any] = {"tokens": tokens, "most": most, "seed": self.settings.seed}
                smaller, few = self._smaller_vocabulary(config, dense), documents[:8]
                worth = None if smaller is None else PushForward(smaller, len(smaller.pieces)).inside
                drawn |= {"worth": worth, "begin": begin_for(self.model)}
                parts = split_held_out(documents, lambda some: tokens_for(self.model, config, some), **sizes, **drawn)
                if smaller is None:
                    check_alike(
                        self.model,
                        config,
                        self.teacher,
                        tokens_for(self.model, config, few),
                        lambda other: tokens_for(self.teacher, other, few),
                    )
            del documents
            phases.on_event(PhasesExpected(self._expected(parts, *shapes)))
            return self._healed(reporter, phases, parts, peers, smaller)

    def _smaller_vocabulary(self, config: "PretrainedConfig", dense: "PretrainedConfig") -> "SmallerVocabulary | None":
        """Return the vocabulary of the model where it is a part of its teacher's, which has more tokens."""
        from optprune.models import load_tokenizer
        from optprune.tokens import SmallerVocabulary

        if config.get_text_config().vocab_size >= dense.get_text_config().vocab_size:
            return None
        before, after = load_tokenizer(self.teacher), load_tokenizer(self.model)
        return None if before is None or after is None else SmallerVocabulary.between(before, after)

    def _expected(self, parts: "TrainingText", own: "Decoder", dense: "Decoder") -> dict[str, float]:
        """Return the expected seconds of the training, once its text is known."""
        from optprune.healing.heal import work
        from optprune.models import device_of
        from optprune.program.time import operations_per_second
        from optprune.report.phases import HEALING as PHASE

        flops = work(own, dense, parts.batches, parts.held_out, self.settings).flops
        return {PHASE: flops / operations_per_second(device_of(self.device))}

    def _healed(
        self,
        reporter: "Reporter",
        phases: "PhaseRecorder",
        parts: "TrainingText",
        peers: "Peers",
        smaller: "SmallerVocabulary | None",
    ) -> "HealedOutput | None":
        from optprune.export import save_model
        from optprune.healing import HealingFolder, heal
        from optprune.healing.heal import healing_facts

        first, may_be_finished = not peers.rank, self.output.may_be_finished
        with ExitStack() as contexts:
            folder: HealingFolder | None = None
            if first:
                folder = contexts.enter_context(keep_or_delete(self.output.run_folder(HealingFolder), reporter.say))
            student, dense = self._loaded(phases)
            teacher = self._teacher(dense, smaller)
            if may_be_finished:
                tokens = parts.batches, parts.held_out
                done = folder is not None and self.output.is_finished(
                    folder, healing_facts(student.model, teacher, *tokens, self.settings, peers)
                )
                if peers.all_gather(done)[0]:
                    return self._finished(reporter) if first else None
            report = heal(
                student.model,
                teacher,
                parts.batches,
                held_out=parts.held_out,
                settings=self.settings,
                folder=folder,
                peers=peers,
                on_event=phases.on_event,
            )
            if not first:
                return None
            self.output.delete_left_behind(reporter.say)
            reporter.say(f"saving to {self.output.folder}, and reloading it in a fresh process to compare logits")
            saved = save_model(
                student,
                self.output.folder,
                healing={**report.to_dict(), "held_out_documents": parts.documents},
                teacher=self.teacher,
                check_tokens=parts.held_out[:1],
                overwrite=self.output.overwrite,
                on_event=phases.on_event,
            )
        return HealedOutput(report.to_dict(), report, saved)

    def _teacher(self, dense: "LoadedModel", smaller: "SmallerVocabulary | None") -> "Teacher":
        from optprune.healing.distillation import Reader
        from optprune.healing.heal import precision_of
        from optprune.tokens import PushedTeacher

        precision = precision_of(self.settings, dense.model.device)
        if smaller is None:
            return Reader(dense.model, precision)
        return PushedTeacher(dense.model, smaller=smaller, precision=precision)

    def _finished(self, reporter: "Reporter") -> "HealedOutput":
        """Return the healed folder, which an earlier call finished, with the healing section of its report."""
        from optprune.report.reading import REPORT
        from optprune.system.files import read_json

        self.output.delete_left_behind(reporter.say)
        file = self.output.folder / REPORT
        return HealedOutput(read_json(file.read_text(encoding="utf-8"), str(file))[HEALING], None, None)

    def _loaded(self, phases: "PhaseRecorder") -> "tuple[LoadedModel, LoadedModel]":
        from optprune.models import load_model
        from optprune.models.draft import draft_in
        from optprune.report.phases import LOADING

        with phases.step(LOADING, f"loading {self.model} and {self.teacher}"):
            student = load_model(self.model, device=self.device)
            by = draft_in(student.model.config)
            return student, load_model(self.teacher, dtype=self.settings.dtype, device=self.device, architecture=by)

    def _event_handler(self, reporter: "Reporter", on_event: "Callable[[Event], None]") -> "Callable[[Event], None]":
        """Return an event handler that also prints a line for each measurement."""
        from optprune.report import DivergenceMeasured

        def handle(event: "Event") -> None:
            on_event(event)
            if isinstance(event, DivergenceMeasured):
                best = ", the least so far" if event.best and event.step else ""
                reporter.say(
                    f"after {event.step} of {event.steps} steps: divergence {event.divergence:.4f}, perplexity "
                    f"{event.perplexity:.2f} on held-out windows{best}"
                )

        return handle
