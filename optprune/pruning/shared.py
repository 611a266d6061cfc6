"""A run that the processes of torchrun share: each passes its share of the batches, and all hold the model.

The layers of a stage are shared among them too: each is solved by one process, and all write the same bytes. Only the
first process has the journal; it sends what it reads there to the others.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from optprune.allocation import Division
from optprune.calibration import DenseStatistics
from optprune.calibration.moments_pass import Collected
from optprune.calibration.peers import Peers, from_first
from optprune.errors import InputError, OptpruneError
from optprune.metric import Metrics, MetricSums
from optprune.models import Decoder
from optprune.problems import Permutation, Rotation
from optprune.pruning.block import BlockRecord, BlockResult
from optprune.pruning.executors import LayerExecutor, Take
from optprune.pruning.journal import Journal, MetricFiles
from optprune.pruning.layer import LayerTask, SolvedLayer, solve_layer
from optprune.system.environment import differences
from optprune.system.wording import shown

Value = TypeVar("Value")


def check_alike(peers: Peers, facts: Mapping[str, Any]) -> None:
    """Raise InputError, in all processes, unless all have the same facts that decide the bytes of a run."""
    found = peers.all_gather(json.loads(json.dumps(facts)))
    for number, other in enumerate(found):
        for what, first, own in differences(found[0], other):
            raise InputError(
                f"the processes of the run differ: {what} is {shown(first)} in the first and {shown(own)} in number "
                f"{number}; use the same command, model and kind of machine for all"
            )


@dataclass(frozen=True)
class ProcessExecutor(LayerExecutor):
    """Processes that each solve a share of the layers, one after the other, and send the answers to the others.

    The layers with the most inputs, which take longest, are assigned first.
    """

    peers: Peers

    def solve(self, tasks: Sequence[LayerTask], collected: Collected, take: Take) -> None:
        peers, own = self.peers, dict[int, SolvedLayer]()
        order = sorted(range(len(tasks)), key=lambda number: -tasks[number].layer.in_features)
        owner = {number: place % peers.size for place, number in enumerate(order)}
        errors: dict[int, OptpruneError] = {}
        for number in (number for number in order if owner[number] == peers.rank):
            tap = tasks[number].target.tap
            try:
                solved = solve_layer(tasks[number], collected.moments[tap], collected.held_out.get(tap))
                own[number] = solved
            except OptpruneError as error:
                errors[number] = error
        failed = {number: error for found in peers.all_gather(errors) for number, error in found.items()}
        headers = peers.all_gather({number: _SolvedHeader.of(solved) for number, solved in own.items()})
        for number, task in enumerate(tasks):
            if number in failed:
                raise failed[number]
            source = owner[number]
            answer = own.pop(number, None) or headers[source][number].empty(task)
            take(task, _spread(peers, answer, source))


@dataclass(frozen=True)
class _SolvedHeader:
    """A solved layer without its large tensors."""

    bias: torch.dtype | None
    """the dtype of the new bias, if any"""
    keep: int
    report: Any
    basis: Rotation | Permutation | None
    """the basis of the inputs, which is small and on the CPU"""

    @classmethod
    def of(cls, solved: SolvedLayer) -> "_SolvedHeader":
        basis = None if solved.basis is None else solved.basis.to(torch.device("cpu"))
        return cls(None if solved.bias is None else solved.bias.dtype, solved.keep, solved.report, basis)

    def empty(self, task: LayerTask) -> SolvedLayer:
        """Return the solved layer with uninitialised tensors."""
        weight = torch.empty(task.layer.weight.shape, dtype=task.layer.weight.dtype, device=task.layer.weight.device)
        units = weight.shape[0 if task.target.by_rows else 1]
        reads = torch.empty(units, dtype=torch.bool, device=weight.device)
        bias = None if self.bias is None else torch.empty(weight.shape[0], dtype=self.bias, device=weight.device)
        basis = None if self.basis is None else self.basis.to(weight.device)
        return SolvedLayer(weight, bias, reads, self.keep, self.report, basis)


def _spread(peers: Peers, solved: SolvedLayer, source: int) -> SolvedLayer:
    """Return a layer with the tensors of the process that solved it."""
    bias = None if solved.bias is None else solved.bias.contiguous()
    whole = replace(solved, weight=solved.weight.contiguous(), bias=bias, reads=solved.reads.contiguous())
    peers.broadcast([part for part in (whole.weight, whole.bias, whole.reads) if part is not None], source)
    return whole


class MetricStore(Protocol):
    """The interface of a run to the place of its output metrics."""

    def read(self, decoder: Decoder, finished: Collection[int]) -> Metrics | None: ...
    def keep(self, decoder: Decoder, metrics: Metrics) -> Metrics: ...


class JournalProtocol(Protocol):
    """The interface of a run to its journal."""

    @property
    def metrics(self) -> MetricStore: ...
    def begin(self, facts: Mapping[str, Any]) -> None: ...
    def keeping_costs(self, statistics: DenseStatistics) -> DenseStatistics: ...
    def repaired(self) -> tuple[str, ...]: ...
    def division(self) -> Division | None: ...
    def divided(self, division: Division) -> None: ...
    def finished(self) -> list[int]: ...
    def record(self, index: int) -> BlockRecord: ...
    def weights(self, decoder: Decoder, index: int) -> dict[str, Tensor]: ...
    def finish(self, decoder: Decoder, result: BlockResult) -> None: ...


@dataclass(frozen=True)
class _SumsHeader:
    """A layer's sums without their tensors."""

    width: int
    tokens: int
    full: bool
    forms: dict[str, tuple[torch.Size, torch.dtype]]
    """the shape and the dtype of each part"""


@dataclass(frozen=True)
class SharedMetrics:
    """The metrics in the first process's run folder, if it has one, for all processes of a run."""

    files: MetricFiles | None
    peers: Peers

    def read(self, decoder: Decoder, finished: Collection[int]) -> Metrics | None:
        """Return the metrics that an earlier run measured, sent by the first process and put aside by the others."""
        own: list[Metrics] = []

        def names() -> list[str] | None:
            found = None if self.files is None else self.files.read(decoder, finished)
            own.extend([] if found is None else [found])
            return None if found is None else list(found)

        measured = from_first(self.peers, names)
        if measured is None:
            return None
        # The files of finished blocks are deleted, and their metrics are not needed.
        deleted = {decoder.name(block, path) for block in finished for path in decoder.paths(block)}
        first = own[0] if own else None
        return Metrics({name: self._sent(decoder, name, first, name not in deleted) for name in measured})

    def keep(self, decoder: Decoder, metrics: Metrics) -> Metrics:
        """Write metrics that all processes have measured to the folder, if there is one."""
        return metrics if self.files is None else self.files.keep(decoder, metrics)

    def _sent(self, decoder: Decoder, name: str, first: Metrics | None, exists: bool) -> MetricSums:
        """Return a layer's sums in every process, with their tensors if they still exist."""
        sums = None if first is None else first.sums(name)
        parts = sums.parts() if sums is not None and exists else {}

        def described() -> _SumsHeader | None:
            forms = {part: (value.shape, value.dtype) for part, value in parts.items()}
            return None if sums is None else _SumsHeader(sums.width, sums.tokens, sums.full, forms)

        header = from_first(self.peers, described)
        assert header is not None, "the first process has the sums"
        if sums is None:
            device = decoder.model.device
            forms = header.forms.items()
            parts = {part: torch.empty(shape, dtype=dtype, device=device) for part, (shape, dtype) in forms}
        self.peers.broadcast(list(parts.values()), 0)
        if sums is not None:
            return sums
        return MetricSums.elsewhere(header.width, header.tokens, decoder.offload.keep_all(parts), full=header.full)


class SharedJournal:
    """The journal of the first process, if it has one, for all processes of a run."""

    def __init__(self, journal: Journal | None, peers: Peers) -> None:
        if journal is not None and peers.rank:
            raise InputError("only the first process of a run has a journal: pass none to the others")
        self._journal, self._peers = journal, peers

    @property
    def metrics(self) -> MetricStore:
        return SharedMetrics(None if self._journal is None else self._journal.metrics, self._peers)

    def begin(self, facts: Mapping[str, Any]) -> None:
        check_alike(self._peers, facts)
        self._from_first(lambda journal: journal.begin(facts), None)

    def keeping_costs(self, statistics: DenseStatistics) -> DenseStatistics:
        return statistics if self._journal is None else self._journal.keeping_costs(statistics)

    def repaired(self) -> tuple[str, ...]:
        return self._from_first(lambda journal: journal.repaired(), ())

    def division(self) -> Division | None:
        return self._from_first(lambda journal: journal.division(), None)

    def divided(self, division: Division) -> None:
        self._from_first(lambda journal: journal.divided(division), None)

    def finished(self) -> list[int]:
        return self._from_first(lambda journal: journal.finished(), [])

    def record(self, index: int) -> BlockRecord:
        found = self._from_first(lambda journal: journal.record(index), None)
        assert found is not None, "the journal holds the block"
        return found

    def weights(self, decoder: Decoder, index: int) -> dict[str, Tensor]:
        read: dict[str, Tensor] = {}

        def forms(journal: Journal) -> dict[str, tuple[torch.Size, torch.dtype]]:
            read.update(journal.weights(decoder, index))
            return {name: (part.shape, part.dtype) for name, part in read.items()}

        sent, device = self._from_first(forms, {}), decoder.model.device
        parts = read or {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in sent.items()}
        self._peers.broadcast(list(parts.values()), 0)
        return parts

    def finish(self, decoder: Decoder, result: BlockResult) -> None:
        if self._journal is not None:
            self._journal.finish(decoder, result)

    def _from_first(self, ask: Callable[[Journal], Value], otherwise: Value) -> Value:
        journal = self._journal
        return from_first(self._peers, lambda: otherwise if journal is None else ask(journal))
