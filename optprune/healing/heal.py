"""Healing a pruned model: a short distillation from the dense one, in which every zero and every width stays."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from optprune.calibration.lanes import Alone, Peers
from optprune.calibration.peers import Group
from optprune.errors import InputError
from optprune.healing.distillation import Reader
from optprune.healing.folder import HealingFolder, Progress
from optprune.healing.generated import generated_windows, mixed
from optprune.healing.records import HealReport, HeldOut
from optprune.healing.settings import LEARNING_RATE, Settings
from optprune.healing.training import Clock, Training, Windows, checkpointing, trainable
from optprune.healing.zeros import masks
from optprune.measure.evaluate import check_windows, evaluating
from optprune.models.digits import parameters_in
from optprune.numerics.fingerprint import fingerprint
from optprune.report import DivergenceMeasured, Event, PhaseAdvanced, PhaseRecorder
from optprune.report.phases import HEALING
from optprune.system.environment import machine, versions
from optprune.texts import check_seq_length, check_vocabulary

WRITING = 2
"""what a window costs that the dense model writes, in passes, about: on a processor, where a few are written at once"""
BACKWARD = 4
"""what a step costs for each window, in forward passes of one model: one of each, and a backward pass of two"""


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    held_out: Tensor,
    learning_rate: float = LEARNING_RATE,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    every: int | None = None,
    patience: int = 3,
    seed: int = 0,
    epochs: int = 1,
    generated: int = 0,
    folder: HealingFolder | None = None,
    peers: Peers | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> HealReport:
    """Train a pruned model in place to predict what the dense one, the `teacher`, does; its zeros stay zeros.

    Each of the `batches`, token ids [windows, length], is one step of AdamW on the mean of KL(teacher || model) over
    its predictions (Hinton, Vinyals and Dean, 2015, at temperature 1 and without labels), with gradients clipped and a
    learning rate that warms up and falls along a cosine. `held_out` windows [n, length], of other documents than the
    batches, are measured after every so many steps: the state of the least divergence is what the model has in the end,
    and the training stops after `patience` measurements that found none less. With several `epochs` a short text is
    gone through as often, from the second time on in an order that the seed draws. The teacher writes so many windows
    `generated`, each going on from a piece of the batches (after LLM-QAT, arXiv 2305.17888): they are mixed in.

    Weights are float32 meanwhile and of the model's own dtype afterwards; see `Settings` for the other arguments. All
    parameters are trained, but what was exactly zero in a linear weight of the blocks, and widths and ties stay as they
    are. A `folder` keeps the state after each measurement, for a run that goes on with the bytes of one that was never
    stopped. Where torch.distributed is set up (torchrun, accelerate), every process is given the same arguments, but
    the folder only the first, and has a part of each batch. It takes 20 bytes for each weight of the model, one for
    each in a mask, and the teacher. InputError where the two models or the texts do not go together; NumericalError
    where training gives NaN.
    """
    precise = learning_rate, warmup, weight_decay, clip
    settings = Settings(*precise, dtype, gradient_checkpointing, every, patience, seed, epochs, generated)
    peers = peers or (Group() if distributed.is_available() and distributed.is_initialized() else Alone())
    _check(model, teacher, batches, held_out)
    decided: dict[str, Any] = {}
    if folder is not None:
        decided = healing_facts(model, teacher, batches, held_out, settings, peers)
        folder.begin(decided)
    phases, stored = PhaseRecorder(model.device, on_event), model.dtype
    devices = [model.device] if model.device.type == "cuda" else []
    precision = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    student, dense = Reader(model, precision), Reader(teacher, precision)
    with phases.phase(HEALING), ExitStack() as contexts:
        for context in (
            trainable(model),
            evaluating(teacher),
            parameters_in(torch.float32, model),
            checkpointing(model, gradient_checkpointing),
            torch.random.fork_rng(devices),
        ):
            contexts.enter_context(context)
        for reader in (student, dense):
            reader.check(held_out[:1, :8])
        writing = WRITING * generated
        writing /= writing + BACKWARD * epochs * (sum(map(len, batches)) + generated)

        def tell(done: int, total: int) -> None:
            on_event(PhaseAdvanced(HEALING, "generating text", "part", done, total, 0.0, writing))

        text = in_epochs(_with_generated(teacher, batches, settings, peers, folder, tell), epochs, seed)
        training = Training(student, dense, masks(model), settings, peers)
        run = _Run(training, text, Windows.of(dense, held_out, peers), folder, on_event, writing)
        run.go()
        return replace(run.end(held_out.numel(), stored), run_facts=decided)


def _with_generated(
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    settings: Settings,
    peers: Peers,
    folder: HealingFolder | None,
    tell: Callable[[int, int], None],
) -> Sequence[Tensor]:
    """The batches, with what the teacher writes: once, where a folder keeps it for a run that goes on."""
    if not settings.generated:
        return batches
    windows = peers.exchange(None if folder is None else folder.generated())[0]
    if windows is None:
        windows = generated_windows(teacher, batches, settings.generated, seed=settings.seed, peers=peers, tell=tell)
        if folder is not None:
            folder.keep_generated(windows)
    return mixed(batches, windows, settings.seed)


def in_epochs(batches: Sequence[Tensor], epochs: int, seed: int) -> list[Tensor]:
    """The batches as they are, and for each further epoch again, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(batches), generator=generator).tolist() for _ in range(epochs - 1)]
    return [*batches, *(batches[number] for order in orders for number in order)]


@dataclass
class _Run:
    """The way through the batches, from wherever it begins."""

    training: Training
    batches: Sequence[Tensor]
    held_out: Windows
    folder: HealingFolder | None
    on_event: Callable[[Event], None]
    writing: float = 0.0
    """the share of the whole time that was spent before"""
    measured: list[HeldOut] = field(default_factory=list)
    dense_perplexity: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    """the weights of the least divergence, in the first process"""

    def go(self) -> None:
        """Take the steps that are worth taking, and have the best of all states in the model."""
        progress = self._resumed()
        self.clock, self.done = Clock(progress.seconds if progress else 0.0), progress.step if progress else 0
        steps, every = len(self.batches), self.training.settings.interval(len(self.batches))
        work = BACKWARD * sum(map(len, self.batches)) / steps
        self.begins = min(0.5, sum(map(len, self.held_out.ids)) * self.training.peers.size / (work * steps))
        if progress is None:
            self._tell("measuring the divergence before", 0, 1, 0.0, self.begins)
            self._measure()
            self._tell("measuring the divergence before", 1, 1, 0.0, self.begins)
        over = progress is not None and progress.done
        while not over:
            self._tell("healing", self.done, steps, self.begins, 1.0)
            self.training.step(self.done, steps, self.batches[self.done])
            self.done += 1
            if self.done % every == 0 or self.done == steps:
                self._measure()
                over = self.done == steps or self._in_vain() >= self.training.settings.patience
                self._save(over)
        self._tell("healing", steps, steps, self.begins, 1.0)
        self.training.put(self.best)

    def end(self, held_out_tokens: int, stored: torch.dtype) -> HealReport:
        """What it came to, with the weights as rounded to the dtype that they are stored in."""
        training, after = self.training, self.least
        if stored != torch.float32:
            training.put({name: weight.to(stored).float() for name, weight in training.weights().items()})
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
        """The measurement that found the least divergence, the first where several did."""
        return min(self.measured, key=lambda found: found.divergence)

    def _in_vain(self) -> int:
        """How many measurements there were since the best."""
        return len(self.measured) - 1 - self.measured.index(self.least)

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
        """How far an earlier run was, with its state in the model and the optimizer; None where there was none."""
        progress = None if self.folder is None else self.folder.progress()
        progress = self.training.peers.exchange(progress)[0]
        if progress is None:
            return None
        self.measured, self.dense_perplexity = list(progress.measured), progress.dense_perplexity
        state: dict[str, Tensor] = {}
        if self.folder is not None:
            state, self.best = (self.folder.tensors(progress, which) for which in ("state", "best"))
        self.training.restore(state, progress.step)
        return progress

    def _tell(self, what: str, done: int, total: int, begins: float, ends: float) -> None:
        bounds = (self.writing + (1 - self.writing) * at for at in (begins, ends))
        self.on_event(PhaseAdvanced(HEALING, what, "step", done, total, *bounds))


def _check(model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor], held_out: Tensor) -> None:
    if model is teacher:
        raise InputError("the model is its own teacher: load the dense model beside it")
    own, other = model.config.get_text_config().vocab_size, teacher.config.get_text_config().vocab_size
    if own != other:
        raise InputError(
            f"the model has a vocabulary of {own} tokens and its teacher one of {other}: give the model that this one "
            "was made from"
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
        raise InputError("a held-out window is among those that are trained on: hold out windows of other documents")


def healing_facts(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    held_out: Tensor,
    settings: Settings,
    peers: Peers,
) -> dict[str, Any]:
    """Return what decides the bytes of the weights."""
    return {
        "the model": fingerprint(list(model.state_dict().items())),
        "the dense model": fingerprint(list(teacher.state_dict().items())),
        "the text": fingerprint([*batches, held_out]),
        "the settings": asdict(settings),
        "the processes": peers.size,
        "the machine": machine(model.device),
        "the versions": versions(),
    }
