"""Inference speed and memory of models, compared on the same work in turn."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.errors import InputError, check_at_least
from optprune.measure.memory import clock, memory_increase

PEAK_MEMORY = (
    "the weights, and the peak of a prefill with its decoding on top: of torch's allocations on CUDA, of the "
    "process's resident size on a CPU (known under Linux only)"
)


@dataclass(frozen=True)
class SpeedWorkload:
    """Work of a model in each repeat: a prefill of a prompt, then greedy decoding of single tokens."""

    prompt_tokens: int = 512
    new_tokens: int = 32
    batch: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_at_least(f"--{name.replace('_', '-')}", value, 1)

    def check(self, name: str, config: Any) -> None:
        """Raise InputError when a model has too few positions."""
        limit = getattr(config, "max_position_embeddings", None)
        needed = self.prompt_tokens + self.new_tokens
        if limit is not None and needed > limit:
            raise InputError(
                f"a prompt of {self.prompt_tokens} and {self.new_tokens} new tokens need {needed} positions, "
                f"but {name} has {limit}: lower --prompt-tokens or --new-tokens"
            )


@dataclass(frozen=True)
class Repeats:
    """Measurements of the repeats, in order."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def over(self, other: "Repeats") -> "Repeats":
        """Return the ratio of each repeat; a temporary load of the machine slows both models and cancels."""
        return Repeats(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Return the median, the quartiles and the values as plain data."""
        return {"median": self.median, "quartiles": list(self.quartiles), "values": list(self.values)}


@dataclass(frozen=True)
class ModelSpeed:
    """Speed and memory of a model."""

    name: str
    prefill: Repeats
    """prompt tokens a second, over all prompts of a batch"""
    decode: Repeats
    """new tokens a second, over all sequences of a batch"""
    parameters: int
    weight_bytes: int
    """the size of parameters and buffers in memory"""
    peak_bytes: int | None
    """the peak as in PEAK_MEMORY; None if unknown"""

    def over(self, other: "ModelSpeed") -> "Ratios":
        """Return the ratios of this model's figures to those of another model in the same measurement."""
        return Ratios(
            prefill=self.prefill.over(other.prefill),
            decode=self.decode.over(other.decode),
            peak_memory=None
            if self.peak_bytes is None or other.peak_bytes is None
            else self.peak_bytes / other.peak_bytes,
            weights=self.weight_bytes / other.weight_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**asdict(self), "prefill": self.prefill.to_dict(), "decode": self.decode.to_dict()}


@dataclass(frozen=True)
class Ratios:
    """Ratios of one model's figures to another's; above one means faster or larger."""

    prefill: Repeats
    decode: Repeats
    peak_memory: float | None
    weights: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**asdict(self), "prefill": self.prefill.to_dict(), "decode": self.decode.to_dict()}


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, PreTrainedModel], work: SpeedWorkload, *, on_run: Callable[[int, int], None] | None = None
) -> list[ModelSpeed]:
    """Return the speed and the memory of models by name, measured in turn on one device and in one dtype.

    Every model runs twice before it is timed: to warm up, and for its memory. Prompts are random tokens. Prefill
    computes the logits of the last position only, as generation does; decoding is greedy and does not stop at an
    end token. `on_run(done, n)` is called after each run.
    """
    _check_alike(models)
    for name, model in models.items():
        work.check(name, model.config)
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (work.batch, work.prompt_tokens), generator=torch.Generator().manual_seed(0))
    total, done = len(models) * (2 + work.repeats), 0

    def after_run() -> None:
        nonlocal done
        done += 1
        if on_run is not None:
            on_run(done, total)

    training = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
            _run(model, ids, work.new_tokens)
            after_run()
        increase = {}
        for name, model in models.items():
            increase[name] = memory_increase(model.device, lambda model=model: _run(model, ids, work.new_tokens))
            after_run()
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(work.repeats):
            for name, model in models.items():
                seconds[name].append(_run(model, ids, work.new_tokens))
                after_run()
    finally:
        for name, model in models.items():
            model.train(training[name])
    return [
        ModelSpeed(
            name=name,
            prefill=Repeats(tuple(ids.numel() / prefill for prefill, _ in seconds[name])),
            decode=Repeats(tuple(work.batch * work.new_tokens / decode for _, decode in seconds[name])),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            weight_bytes=weight_bytes(model),
            peak_bytes=None if increase[name] is None else weight_bytes(model) + increase[name],
        )
        for name, model in models.items()
    ]


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters and buffers; tied ones count once."""
    return sum(part.numel() * part.element_size() for part in (*model.parameters(), *model.buffers()))


def device_name(device: torch.device) -> str:
    """Return the name of a device, with the number of threads of a CPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' * (threads > 1)})"


def _check_alike(models: Mapping[str, PreTrainedModel]) -> None:
    """Raise InputError when models differ in dtype or device, so that speeds do not compare."""
    for what, found in (
        ("dtypes", {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()}),
        ("devices", {name: str(model.device) for name, model in models.items()}),
    ):
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{value} of {name}" for name, value in found.items())
            raise InputError(
                f"the models have different {what} ({listed}), so their speeds cannot be compared: choose one"
            )


def _run(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of prefill and of decoding."""
    ids = ids.to(model.device)
    began = clock(model.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    read = clock(model.device)
    for _ in range(new_tokens):
        output = model(input_ids=token, cache=output.cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return read - began, clock(model.device) - read
