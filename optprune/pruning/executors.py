"""Executors of the layers of a stage, one after the other or several at a time.

The layers of a stage are solved from the same statistics and none needs another's answer, so they can be solved
anywhere and in any order; the answers are written in the order of the forward pass.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from optprune.calibration.moments_pass import Collected
from optprune.errors import OptpruneError
from optprune.moments import InputMoments
from optprune.pruning.layer import LayerTask, SolvedLayer, solve_layer

Take = Callable[[LayerTask, SolvedLayer], None]
"""a function that receives a layer and its answer"""


class LayerExecutor(ABC):
    """A way to solve the layers of a stage."""

    @abstractmethod
    def solve(self, tasks: Sequence[LayerTask], collected: Collected, take: Take) -> None:
        """Solve all layers from the collected moments of their inputs, and call `take` with each answer in order."""


@dataclass(frozen=True)
class SerialExecutor(LayerExecutor):
    """One layer after the other, so that only one answer is in memory at a time."""

    def solve(self, tasks: Sequence[LayerTask], collected: Collected, take: Take) -> None:
        for task in tasks:
            tap = task.target.tap
            take(task, solve_layer(task, collected.moments[tap], collected.held_out.get(tap)))


@dataclass(frozen=True)
class DeviceExecutor(LayerExecutor):
    """One thread for each device, which solves layers with the most inputs first, because they take longest.

    A device that is named twice has two threads. Each thread holds the moments that its layers need and solves one
    layer at a time.
    """

    devices: tuple[torch.device, ...]

    def solve(self, tasks: Sequence[LayerTask], collected: Collected, take: Take) -> None:
        for task, answer in zip(tasks, self.answers(tasks, collected), strict=True):
            if isinstance(answer, OptpruneError):
                raise answer
            take(task, answer)

    def answers(self, tasks: Sequence[LayerTask], collected: Collected) -> list[SolvedLayer | OptpruneError]:
        """Return the answer or the error of each layer, on the device of the model."""
        if not tasks:
            return []
        waiting = deque(sorted(range(len(tasks)), key=lambda number: -tasks[number].layer.in_features))
        answers: dict[int, SolvedLayer | OptpruneError] = {}
        home, threads = tasks[0].layer.weight.device, torch.get_num_threads()
        if home.type == "cuda":
            # Torch loads its linear algebra at the first call, which is not thread-safe.
            torch.linalg.eigh(torch.ones(1, 1, device=home))
            torch.cuda.synchronize(home)

        def work(device: torch.device) -> None:
            torch.set_num_threads(threads)
            here: dict[str, tuple[InputMoments, InputMoments | None]] = {}
            with torch.no_grad(), _stream_of(device):
                while (number := _next(waiting)) is not None:
                    tap = tasks[number].target.tap
                    if tap not in here:
                        held_out = collected.held_out.get(tap)
                        moments = collected.moments[tap].to(device)
                        here[tap] = moments, None if held_out is None else held_out.to(device)
                    try:
                        answers[number] = solve_layer(tasks[number], *here[tap]).to(home)
                    except OptpruneError as error:
                        answers[number] = error

        devices = self.devices[: len(tasks)]  # no more threads than layers
        with ThreadPoolExecutor(len(devices)) as pool:
            try:
                for done in [pool.submit(work, device) for device in devices]:
                    done.result()
            except BaseException:
                waiting.clear()  # ends the other threads
                raise
        return [answers[number] for number in range(len(tasks))]


def _next(waiting: deque[int]) -> int | None:
    """Return the next number of a queue that threads share, or None if it is empty."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


@contextmanager
def _stream_of(device: torch.device) -> Iterator[None]:
    """Run the context on a stream of the device, which is synchronised at the end; do nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()
