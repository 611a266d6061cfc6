"""Healing of a pruned model: a short distillation from the dense one that keeps every zero and every width."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from optprune.calibration.generated import PASSES, generated_windows, kept_or_new, mixed
from optprune.calibration.peers import Peers, SingleProcess, TorchPeers
from optprune.calibration.stream import SLOW, head_weights
from optprune.errors import InputError
from optprune.healing.distillation import Precision, Reader
from optprune.healing.run_folder import HealingFolder, Progress
from optprune.healing.settings import HealingSettings
from optprune.healing.training import Clock, HeldOut, Training, Windows, gradient_checkpointing, trainable, trained
from optprune.healing.zeros import masks
from optprune.measure.evaluate import check_windows, evaluating
from optprune.measure.teacher import Teacher
from optprune.models import Decoder
from optprune.models.surgery import parameters_in
from optprune.numerics.fingerprint import fingerprint
from optprune.report import DivergenceMeasured, Event, PhaseAdvanced, PhaseRecorder
from optprune.report.phases import HEALING
from optprune.system.environment import COUNTS, machine, versions
from optprune.texts import check_seq_length, check_vocabulary
from optprune.work import Work

STEP = 4
"""forward passes that a step costs for each window: one of each model, and a backward pass that counts as two"""
BYTES_PER_WEIGHT, BYTES_FIXED = 20, 4
"""bytes for each weight in float32: 4 each for the weight, its gradient and the best state, 8 for AdamW's moments; and
for each that is not trained"""
NOT_GIVEN = HealingSettings()


@dataclass(frozen=True)
class HealReport:
    """Result of healing; the section `healing` of report.json."""

    steps: int
    """number of steps done"""
    steps_planned: int
    """number of steps that the text is enough for"""
    tokens: int
    """number of tokens trained on, in all epochs"""
    held_out_tokens: int
    seconds: float
    """duration of all steps and measurements, in seconds"""
    before: HeldOut
    after: HeldOut
    """the state that was kept: the best on held-out windows, rounded to the dtype it is stored in"""
    dense_perplexity: float
    """perplexity of the dense model on the same windows"""
    measured: tuple[HeldOut, ...]
    """all measurements, the first before any step"""
    zeros: int
    """number of weights that were zero and still are"""
    settings: dict[str, Any]
    run_facts: dict[str, Any] = field(default_factory=dict)
    """the inputs that decide the weights, of a run with a folder: `--resume` compares them with a command's own"""

    @property
    def generated_windows(self) -> int:
        """The number of windows that the dense model generated."""
        return self.settings["generated"]

    @property
    def stopped_early(self) -> bool:
        """Whether the training ended before the text did, since the divergence no longer fell."""
        return self.steps < self.steps_planned

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        more = {"generated_windows": self.generated_windows, "stopped_early": self.stopped_early}
        return {**asdict(self), **more}


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    batches: Sequence[Tensor],
    *,
    held_out: Tensor,
    settings: HealingSettings = NOT_GIVEN,
    folder: HealingFolder | None = None,
    peers: Peers | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    **deprecated: Any,
) -> HealReport:
    """Train a pruned model in place to predict what the dense `teacher` predicts; its zeros stay zeros.

    Each of the `batches`, token ids [windows, length], is one step of AdamW on the mean of KL(teacher || model) over
    its predictions (Hinton, Vinyals and Dean, 2015, at temperature 1 and without labels), with clipped gradients and a
    learning rate that warms up and falls along a cosine. The `held_out` windows [n, length], of other documents than
    the batches, are measured every few steps. The model gets the state with the smallest divergence (or the measure
    that `teacher.decides` names), and in the second half of the steps the training ends after `patience` measurements
    without a smaller one. Further epochs visit the batches in seeded orders. Windows that the teacher generates from
    pieces of the batches are mixed in (after LLM-QAT, arXiv 2305.17888). For a model with a smaller vocabulary, the
    teacher is an `optprune.tokens.PushedTeacher` of the dense model.

    Weights are float32 during the training, and each in its own dtype afterwards. All parameters are trained, except
    exact zeros in the linear weights of the blocks and, if the settings say so, embeddings and the head; widths and
    ties stay. A `folder` stores a checkpoint after each measurement, from which a run resumes to the same bytes. Where
    torch.distributed is set up (torchrun, accelerate), every process gets the same arguments, but only the first gets
    the folder, and each has a part of each batch. It takes 20 bytes for each weight that is trained, 4 for each other
    one, one for each in a mask, and the teacher. Raises InputError where the two models or the texts do not go
    together, NumericalError where training gives NaN.
    """
    settings = _with_deprecated(settings, deprecated)
    peers = peers or (TorchPeers() if distributed.is_available() and distributed.is_initialized() else SingleProcess())
    precision = precision_of(settings, model.device)
    student, dense = Reader(model, precision), teacher if isinstance(teacher, Teacher) else Reader(teacher, precision)
    _check(model, dense, batches, held_out, settings)
    facts: dict[str, Any] = {}
    if folder is not None:
        facts = healing_facts(model, dense, batches, held_out, settings, peers)
        folder.begin(facts)
    phases = PhaseRecorder(model.device, on_event)
    # A buffer that is trained is a parameter meanwhile.
    stored = {name: value.dtype for name, value in chain(model.named_parameters(), model.named_buffers())}
    devices = [model.device] if model.device.type == "cuda" else []
    with phases.phase(HEALING), ExitStack() as contexts:
        for context in (
            trainable(model),
            evaluating(dense.model),
            parameters_in(torch.float32, model),
            gradient_checkpointing(model, settings.gradient_checkpointing),
            torch.random.fork_rng(devices),
        ):
            contexts.enter_context(context)
        for reader in (student, dense):
            reader.check(held_out)
        generation = PASSES * settings.generated
        generation /= generation + STEP * settings.epochs * (sum(map(len, batches)) + settings.generated)

        def on_part(done: int, total: int) -> None:
            on_event(PhaseAdvanced(HEALING, "generating text", "part", done, total, 0.0, generation))

        text = _with_generated(dense.model, batches, settings, peers, folder, on_part)
        text = in_epochs(text, settings.epochs, settings.seed)
        training = Training(student, dense, masks(model), settings, peers)
        run = _Run(training, text, Windows.of(dense, held_out, peers), folder, on_event, generation)
        run.run()
        return replace(run.end(held_out.numel(), stored), run_facts=facts)


def work(
    model: Decoder, teacher: Decoder, batches: Sequence[Tensor], held_out: Tensor, settings: HealingSettings
) -> Work:
    """Return the work of `heal`; the models may be on the meta device. Tokens pass two models, so all is in `flops`."""
    heads = [head_weights(each) for each in (model, teacher)]
    own, dense = (each.linear_weights() + head for each, head in zip((model, teacher), heads, strict=True))
    length, size = batches[0].shape[1], len(batches[0])
    steps = settings.epochs * (len(batches) + -(-settings.generated // size))
    tokens = settings.epochs * length * (sum(map(len, batches)) + settings.generated)
    measurements = 1 + len(settings.measured_after(steps))
    # Forward once (twice with checkpointing), backward for the inputs and for the weights.
    passes = tokens * (3 + settings.gradient_checkpointing) + measurements * held_out.numel()
    flops = passes * own + (tokens + held_out.numel() + PASSES * settings.generated * length) * dense
    flops -= 0 if settings.embeddings else tokens * heads[0]
    weights = sum(weight.numel() for weight in model.model.parameters())
    changed = sum(weight.numel() for weight in trained(model.model, embeddings=settings.embeddings).values())
    size = BYTES_PER_WEIGHT * changed + BYTES_FIXED * (weights - changed)
    return Work(flops=2 * SLOW * flops, bytes=size + model.linear_weights())


def _with_deprecated(settings: HealingSettings, flat: dict[str, Any]) -> HealingSettings:
    """Return the settings with the keywords that `heal` took directly up to version 0.1."""
    unknown = sorted(flat.keys() - asdict(settings).keys())
    if unknown:
        raise TypeError(f"heal() got an unexpected keyword argument {unknown[0]!r}")
    if flat:
        named = ", ".join(f"{name}={value!r}" for name, value in flat.items())
        sentence = f"these arguments of heal() are deprecated: pass settings=HealingSettings({named})"
        warnings.warn(sentence, DeprecationWarning, stacklevel=3)
    return replace(settings, **flat)


def _with_generated(
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    settings: HealingSettings,
    peers: Peers,
    folder: HealingFolder | None,
    on_part: Callable[[int, int], None],
) -> Sequence[Tensor]:
    """Return the batches with the windows that the teacher generates, which a folder keeps for a run that resumes."""
    if not settings.generated:
        return batches
    count, seed = settings.generated, settings.seed

    def generate() -> Tensor:
        return generated_windows(teacher, batches, count, seed=seed, peers=peers, on_part=on_part)

    return mixed(batches, kept_or_new(folder, generate, peers), seed)


def in_epochs(batches: Sequence[Tensor], epochs: int, seed: int) -> list[Tensor]:
    """Return the batches, followed by as many seeded permutations of them as there are further epochs."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(batches), generator=generator).tolist() for _ in range(epochs - 1)]
    return [*batches, *(batches[number] for order in orders for number in order)]


@dataclass
class _Run:
    """Loop over the batches, from the start or from a checkpoint."""

    training: Training
    batches: Sequence[Tensor]
    held_out: Windows
    folder: HealingFolder | None
    on_event: Callable[[Event], None]
    generation: float = 0.0
    """share of the whole time that generating windows took"""
    measured: list[HeldOut] = field(default_factory=list)
    dense_perplexity: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    """the best weights, in the first process"""

    def run(self) -> None:
        """Train until the steps or the patience are used up, and load the best weights into the model."""
        progress = self._resumed()
        self.clock, self.done = Clock(progress.seconds if progress else 0.0), progress.step if progress else 0
        steps, measured = len(self.batches), set(self.training.settings.measured_after(len(self.batches)))
        cost = STEP * sum(map(len, self.batches)) / steps
        self.begins = min(0.5, sum(map(len, self.held_out.ids)) * self.training.peers.size / (cost * steps))
        if progress is None:
            self._advance("measuring the divergence before", 0, 1, 0.0, self.begins)
            self._measure()
            self._advance("measuring the divergence before", 1, 1, 0.0, self.begins)
        over = progress is not None and progress.done
        while not over:
            self._advance("healing", self.done, steps, self.begins, 1.0)
            self.training.step(self.done, steps, self.batches[self.done])
            self.done += 1
            if self.done in measured:
                self._measure()
                over = self.done == steps or self._without_gain() >= self.training.settings.patience
                self._save(over)
        self._advance("healing", steps, steps, self.begins, 1.0)
        self.training.put(self.best)

    def end(self, held_out_tokens: int, stored: Mapping[str, torch.dtype]) -> HealReport:
        """Return the report, measured after each weight is rounded to its dtype in `stored`."""
        training, after = self.training, self.least
        if any(stored[name] != torch.float32 for name in training.parameters):
            training.put({name: weight.to(stored[name]).float() for name, weight in training.weights().items()})
            after = training.measure(self.held_out, after.step)[0]
        training.masks.check(training.student.model)
        return HealReport(
            steps=self.done,
            steps_planned=len(self.batches),
            tokens=sum(batch.numel() for batch in self.batches[: self.done]),
            held_out_tokens=held_out_tokens,
            seconds=self.clock.seconds,
            before=self.measured[0],
            after=after,
            dense_perplexity=self.dense_perplexity,
            measured=tuple(self.measured),
            zeros=training.masks.zeros,
            settings=asdict(training.settings),
        )

    @property
    def least(self) -> HeldOut:
        """The first measurement with the smallest divergence, or whatever measure the teacher decides by."""
        decides = self.training.teacher.decides
        return min(self.measured, key=lambda found: float(getattr(found, decides)))

    def _without_gain(self) -> int:
        """Return how many measurements after the best one were made in the second half of the steps."""
        since = self.measured[self.measured.index(self.least) + 1 :]
        return sum(found.step > len(self.batches) / 2 for found in since)

    def _measure(self) -> None:
        found, self.dense_perplexity = self.training.measure(self.held_out, self.done)
        self.measured.append(found)
        best = self.least is found
        if best and not self.training.peers.rank:
            self.best = self.training.weights()
        numbers = found.step, len(self.batches), found.divergence, found.perplexity
        self.on_event(DivergenceMeasured(*numbers, best))

    def _save(self, over: bool) -> None:
        if self.folder is not None:
            numbers = self.done, len(self.batches), self.clock.seconds, tuple(self.measured), self.dense_perplexity
            self.folder.save(Progress(*numbers, self.least.step, over), self.training.state(), self.best)

    def _resumed(self) -> Progress | None:
        """Load the checkpoint of an earlier run and return its progress; None where there is none."""
        progress = None if self.folder is None else self.folder.progress()
        progress = self.training.peers.all_gather(progress)[0]
        if progress is None:
            return None
        self.measured, self.dense_perplexity = list(progress.measured), progress.dense_perplexity
        state: dict[str, Tensor] = {}
        if self.folder is not None:
            state, self.best = (self.folder.tensors(progress, which) for which in ("state", "best"))
        self.training.restore(state, progress.step)
        return progress

    def _advance(self, step: str, done: int, total: int, begins: float, ends: float) -> None:
        bounds = (self.generation + (1 - self.generation) * at for at in (begins, ends))
        self.on_event(PhaseAdvanced(HEALING, step, "step", done, total, *bounds))


def precision_of(settings: HealingSettings, device: torch.device) -> Precision:
    """Return a function that returns the context in which models are run on a device."""
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")


def _check(
    model: PreTrainedModel, teacher: Teacher, batches: Sequence[Tensor], held_out: Tensor, settings: HealingSettings
) -> None:
    """Raise InputError where the models or the texts do not go together."""
    if model is teacher.model:
        raise InputError("the model is its own teacher: load the dense model and pass that")
    own, other = model.config.get_text_config().vocab_size, teacher.vocabulary
    if settings.generated and other != teacher.model.config.get_text_config().vocab_size:
        raise InputError(
            "the teacher generates text in its own tokens, which are more than the model's: leave out generated text"
        )
    if own != other:
        raise InputError(
            f"the model has a vocabulary of {own} tokens and its teacher one of {other}: give the model before pruning "
            "as the teacher"
        )
    if not len(batches):
        raise InputError("there are no batches to train on: give token ids [windows, length]")
    trained = set[tuple[int, ...]]()
    for windows in (held_out, *batches):
        check_windows(windows)
        check_vocabulary(model.config, windows.flatten())
        check_seq_length(model.config, windows.shape[1])
    for batch in batches:
        trained |= set(map(tuple, batch.tolist()))
    if any(tuple(window) in trained for window in held_out.tolist()):
        raise InputError("a held-out window is also a training window: hold out windows of other documents")


def healing_facts(
    model: PreTrainedModel,
    teacher: Teacher,
    batches: Sequence[Tensor],
    held_out: Tensor,
    settings: HealingSettings,
    peers: Peers,
) -> dict[str, Any]:
    """Return the facts that decide the bytes of the healed weights."""
    return {
        "the model": fingerprint(list(model.state_dict().items())),
        "the dense model": teacher.digest(),
        **dict(zip(COUNTS, (sum(batch.numel() for batch in batches), held_out.numel()), strict=True)),
        "the text": fingerprint([*batches, held_out]),
        "the settings": asdict(settings),
        "the processes": peers.size,
        "the machine": machine(model.device),
        "the versions": versions(),
    }
