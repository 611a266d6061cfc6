"""Training of a model that is healed: steps, measurements, and the state to resume from."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from optprune.calibration.generated import LARGEST_SEED
from optprune.calibration.peers import Peers
from optprune.errors import NumericalError
from optprune.healing.distillation import Reader, add_gradient, surprise_and_divergence
from optprune.healing.settings import HealingSettings
from optprune.healing.zeros import Masks, keep_zeros
from optprune.measure.evaluate import TOKENS_AT_ONCE, evaluating, perplexity_from_nll
from optprune.measure.teacher import Teacher

BETAS = (0.9, 0.95)
"""decay rates of AdamW's moments; the usual 0.999 would average over more steps than the training has"""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""the tensors in AdamW's state of a parameter, beside the number of steps"""


@dataclass(frozen=True)
class HeldOut:
    """Measurement on the held-out windows."""

    step: int
    """number of steps done by then"""
    divergence: float
    """KL(dense || model), in nats a prediction"""
    perplexity: float


@dataclass(frozen=True, eq=False)
class Windows:
    """Held-out windows of one process, with the dense model's hidden states for them."""

    ids: Sequence[Tensor]
    hidden: Sequence[Tensor]
    predictions: int
    """number of predictions in the windows of all processes"""

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Teacher, windows: Tensor, peers: Peers) -> "Windows":
        """Return this process's part of the windows [n, length]."""
        own = _at_once(windows[peers.rank :: peers.size])
        return cls(own, [teacher.hidden(ids) for ids in own], windows.shape[0] * (windows.shape[1] - 1))


class Training:
    """Student in float32, its teacher and the optimizer. Each of several processes has a part of every batch."""

    def __init__(
        self, student: Reader, teacher: Teacher, masks: Masks, settings: HealingSettings, peers: Peers
    ) -> None:
        self.student, self.teacher, self.masks, self.settings, self.peers = student, teacher, masks, settings, peers
        self.parameters = trained(student.model, embeddings=settings.embeddings)
        for parameter in student.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        matrices, others = (
            [weight for weight in self.parameters.values() if (weight.ndim > 1) == wanted] for wanted in (True, False)
        )
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS)
        keep_zeros(self.optimizer, masks)
        peers.broadcast([weight.detach() for weight in student.model.parameters()], 0)

    def step(self, number: int, steps: int, windows: Tensor) -> None:
        """Take one step, on windows of token ids [n, length]."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(number, steps)
        self.optimizer.zero_grad(set_to_none=True)
        # The seed depends on the step alone, so that a run can resume at any.
        seed = (self.settings.seed * steps + number) * self.peers.size + self.peers.rank
        torch.manual_seed(seed % LARGEST_SEED)
        predictions = windows.shape[0] * (windows.shape[1] - 1)
        found = 0.0
        self.student.model.train()
        own = self.teacher.training_windows(windows[self.peers.rank :: self.peers.size], seed % LARGEST_SEED)
        for part in _at_once(own):
            found += add_gradient(self.student, self.teacher, part, predictions)
        self.student.model.eval()
        gradients = {name: self._gradient(weight) for name, weight in self.parameters.items()}
        self.peers.all_reduce(list(gradients.values()))
        for name in self.masks.kept:  # gradients of pruned weights must not count in the norm
            self.masks.clear(name, gradients[name])
        norm = clip_grad_norm_(self.parameters.values(), self.settings.clip)
        if not bool(torch.isfinite(norm)):
            raise NumericalError(
                f"the gradient of step {number + 1} is NaN or infinite (the divergence was {found:.3g}): lower the "
                "learning rate, or compute in float32"
            )
        self.optimizer.step()

    def measure(self, held_out: Windows, step: int) -> tuple[HeldOut, float]:
        """Return the measurement on held-out windows, and the dense model's perplexity."""
        sums = torch.zeros(3, dtype=torch.float64)
        with evaluating(self.student.model):
            for ids, hidden in zip(held_out.ids, held_out.hidden, strict=True):
                sums += surprise_and_divergence(self.student, self.teacher, ids, hidden)
        total = [sum(numbers) for numbers in zip(*self.peers.all_gather(sums.tolist()), strict=True)]
        if not all(number < float("inf") for number in total):
            raise NumericalError(f"the model gives NaN on held-out windows after {step} steps: lower the learning rate")
        own, dense, divergence = total
        count = held_out.predictions
        return HeldOut(step, max(divergence / count, 0.0), perplexity_from_nll(own, count)), perplexity_from_nll(
            dense, count
        )

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights."""
        return {name: weight.detach().clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights; every process gets those of the first."""
        for name, weight in weights.items():
            self.parameters[name].copy_(weight)
        self.peers.broadcast(list(self._data()), 0)

    def state(self) -> dict[str, Tensor]:
        """Return the weights and the optimizer's moments, not copied."""
        found = {f"weight {name}": weight.detach() for name, weight in self.parameters.items()}
        for name, weight in self.parameters.items():
            own = self.optimizer.state.get(weight, {})
            found |= {f"{moment} {name}": own[moment] for moment in MOMENTS if moment in own}
        return found

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Load a state. Only the first process needs to have it."""
        self.put({name: state[f"weight {name}"] for name in self.parameters} if state else {})
        if not step:
            return
        for name, weight in self.parameters.items():
            moments = {
                moment: state[f"{moment} {name}"].to(weight) if state else torch.zeros_like(weight)
                for moment in MOMENTS
            }
            self.peers.broadcast(list(moments.values()), 0)
            self.optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}

    def _gradient(self, weight: nn.Parameter) -> Tensor:
        if weight.grad is None:  # this process had no window
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def _data(self) -> Iterator[Tensor]:
        return (weight.detach() for weight in self.parameters.values())


def trained(model: PreTrainedModel, *, embeddings: bool) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name: all, or all but those of embeddings and the head."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    left = tables if head is None else [*tables, head]
    fixed = set[int]() if embeddings else {id(weight) for module in left for weight in module.parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) not in fixed}


@contextmanager
def gradient_checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Enable gradient checkpointing for the context."""
    if not wanted:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]  # transformers' models
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Restore the training mode and `requires_grad` of a model's parameters, and clear their gradients, at the end."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    training = model.training
    try:
        yield
    finally:
        model.train(training)
        for weight, required in before:
            weight.grad = None
            weight.requires_grad_(required)


@dataclass
class Clock:
    """Clock of a run, which includes the seconds before it was interrupted."""

    before: float = 0.0

    def __post_init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """The seconds of the whole run."""
        return self.before + time.perf_counter() - self._began


def _at_once(windows: Tensor) -> list[Tensor]:
    """Return the windows [n, length] in parts that go through a model together."""
    return list(windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))) if len(windows) else []
