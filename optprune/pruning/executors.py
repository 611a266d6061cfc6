"""LayerExecutor: who solves the layers of a stage, one after the other or several at a time.

The layers of a stage are solved from the same statistics and none needs another's answer, so that it makes no
difference to any of them where and when it is solved; the answers are written in the order of the forward pass.
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
"""what is done with an answer"""


class LayerExecutor(ABC):
    """Who solves the layers of a stage."""

    @abstractmethod
    def solve(self, tasks: Sequence[LayerTask], collected: Collected, take: Take) -> None:
        """Have all layers solved from what was collected of their inputs; `take` gets the answers in their order."""


@dataclass(frozen=True)
class SerialExecutor(LayerExecutor):
    """Each layer is solved when the answer before it was taken, so that one answer is there at a time."""

    def solve(self, tasks: Sequence[LayerTask], collected: Collected, take: Take) -> None:
        for task in tasks:
            tap = task.target.tap
            take(task, solve_layer(task, collected.moments[tap], collected.held_out.get(tap)))


@dataclass(frozen=True)
class DeviceExecutor(LayerExecutor):
    """A thread for each device solves layers, those with most inputs first, which take longest.

    A device named twice has two threads. On each device there are the moments that its layers need, and one layer's
    solve at a time.
    """

    devices: tuple[torch.device, ...]

    def solve(self, tasks: Sequence[LayerTask], collected: Collected, take: Take) -> None:
        for task, answer in zip(tasks, self.answers(tasks, collected), strict=True):
            if isinstance(answer, OptpruneError):
                raise answer
            take(task, answer)

    def answers(self, tasks: Sequence[LayerTask], collected: Collected) -> list[SolvedLayer | OptpruneError]:
        """What came of each layer, on the device of the model."""
        if not tasks:
            return []
        waiting = deque(sorted(range(len(tasks)), key=lambda number: -tasks[number].layer.in_features))
        answers: dict[int, SolvedLayer | OptpruneError] = {}
        home, threads = tasks[0].layer.weight.device, torch.get_num_threads()
        if home.type == "cuda":
            # Torch loads its linear algebra at the first call, which two threads must not make together.
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

        devices = self.devices[: len(tasks)]  # more threads than layers would have nothing to do
        with ThreadPoolExecutor(len(devices)) as pool:
            try:
                for done in [pool.submit(work, device) for device in devices]:
                    done.result()
            except BaseException:
                waiting.clear()  # so that the other threads come to an end
                raise
        return [answers[number] for number in range(len(tasks))]


def _next(waiting: deque[int]) -> int | None:
    """The next number of a queue that threads share, None where it is empty."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


@contextmanager
def _stream_of(device: torch.device) -> Iterator[None]:
    """A device's own queue of work, which is done when the context ends; a CPU has none."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()
