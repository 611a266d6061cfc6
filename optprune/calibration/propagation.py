"""Propagation policies: the path that statistics take through the model, one block at a time.

A policy starts a `Path`, which holds the hidden states between two blocks. The path opens a `Visit` of the current
block, which gives the stages, their moments and calls, and then the inputs of the next block.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from torch import nn

from optprune.calibration.calls import EVERY, Calls, Wanted, calls_of, catching, with_mixed_targets
from optprune.calibration.dense_statistics import BlockMoments
from optprune.calibration.moments_pass import Collected, collect
from optprune.calibration.stream import Stream, advance
from optprune.measure.memory import clock

Item = TypeVar("Item")


class Propagation(ABC):
    """Policy that decides which inputs a block's statistics are taken from, and which output is the target.

    Any recipe can use any policy with any solver. A new policy is a class that states these four facts, starts a path
    on one stream (as `OnePath` does) or two (as `TwoPaths`), and overrides `reference` where the dense block of the
    target gets other inputs; `Recipe(propagation=MyPolicy())` uses it. For example, targets half way between those of
    the policies `local` and `cross`, where the dense block gets the inputs of the pruned model or of the dense model:

        class Halfway(Propagation):
            name, independent, sequential, dense_target = "halfway", False, True, True

            def start(self, stream):
                return Path(self, stream, stream.copy())

            def reference(self, path):
                pairs = zip(path.actual.hidden, path.dense.hidden, strict=True)
                return path.actual.with_hidden((actual + dense) / 2 for actual, dense in pairs)
    """

    name: str
    """the name of the policy in recipe files and reports"""
    independent: bool
    """whether every block gets its inputs from the dense model, so that blocks can be pruned in any order; otherwise it
    gets them from the pruned blocks before it"""
    sequential: bool
    """whether, inside a block, a layer's inputs are collected after the layers before it were pruned"""
    dense_target: bool
    """whether the target is the output of the dense block, not of the original weight for the pruned block's inputs;
    then layers that keep all their units are corrected too"""
    correction: float = 1.0
    """share of the drift of the inputs that a dense target corrects for: 1 for the output of the dense block, 0 for
    that of the original weight on the inputs that arrive, and between them a mix of both"""

    @abstractmethod
    def start(self, stream: Stream) -> "Path":
        """Return the path that begins with the inputs of the first block."""

    def reference(self, path: "Path") -> Stream:
        """Return the inputs of the current block's dense original, where its outputs are the target."""
        return path.dense


@dataclass(frozen=True)
class OnePath(Propagation):
    """Policy with one stream: a dense block gets the same inputs as the pruned one."""

    name: str
    independent: bool
    sequential: bool
    dense_target: bool

    def start(self, stream: Stream) -> "Path":
        return Path(self, stream, stream)


@dataclass(frozen=True)
class TwoPaths(Propagation):
    """Policy with two streams: the hidden states of the dense model travel beside those of the pruned one."""

    name: str
    independent: bool
    sequential: bool
    dense_target: bool
    correction: float = 1.0

    def start(self, stream: Stream) -> "Path":
        return Path(self, stream, stream.copy())


POLICIES: dict[str, Propagation] = {
    policy.name: policy
    for policy in (
        OnePath("dense", independent=True, sequential=False, dense_target=False),
        OnePath("pruned", independent=False, sequential=False, dense_target=False),
        OnePath("intra", independent=True, sequential=True, dense_target=True),
        TwoPaths("cross", independent=False, sequential=True, dense_target=True),
        TwoPaths("partial", independent=False, sequential=True, dense_target=True, correction=0.5),
        OnePath("local", independent=False, sequential=True, dense_target=True),
    )
}


@dataclass(frozen=True, eq=False)
class Path:
    """Hidden states between blocks. A path can be resumed at any block with the same streams."""

    policy: Propagation
    actual: Stream
    """the inputs that the current block will really get"""
    dense: Stream
    """the inputs of the current block in the dense model; the same stream where the policy has only one"""

    def visit(
        self,
        block: nn.Module,
        *,
        held_out: int = 0,
        cut: bool = False,
        original: nn.Module | None = None,
        detached: bool = False,
        calls: Wanted = EVERY,
        known: BlockMoments | None = None,
    ) -> "Visit":
        """Open a visit of the current block, which is that of the dense model.

        The last `held_out` batches are held out. `cut` says that sub-blocks will be removed first. A block that was
        changed before comes with its `original`. A `detached` visit does not move the path on: another pass through
        the dense model does. `calls` selects the batches for the calls of sub-modules. `known` are cached moments of
        the block in the dense model, valid where its inputs on this path are the same.
        """
        return Visit(self, block, held_out, cut, original, detached, calls, known)

    def pass_by(self, block: nn.Module, finish: Callable[[], None]) -> None:
        """Move on past a block as a visit of it does; `finish` loads the pruned weights into the dense block."""
        if self.dense is not self.actual:
            advance(block, self.dense)
        if self.policy.independent:
            advance(block, self.actual)
        finish()
        if not self.policy.independent:
            advance(block, self.actual)


class Visit:
    """Visit of one block, from its first calibration pass to the next block's inputs.

    Sub-blocks are removed first. Then, for each stage: `collect` its moments, prune its layers, and refit sub-modules
    on their `calls`. Closing the visit moves the path on to the next block, through the block as it is then, unless
    the visit is detached. A `with` statement closes it unless an error is raised.
    """

    def __init__(
        self,
        path: Path,
        block: nn.Module,
        held_out: int,
        cut: bool,
        original: nn.Module | None,
        detached: bool,
        calls: Wanted,
        known: BlockMoments | None,
    ) -> None:
        self.path, self.block, self.held_out, self._detached, self._wanted = path, block, held_out, detached, calls
        self._known = known
        self.floor_seconds = 0.0
        """the seconds that every run of such a policy needs: two passes of the block, and the Gram products of its
        inputs x*"""
        policy = path.policy
        if original is None:
            copied = policy.dense_target or path.dense is not path.actual
            original = copy.deepcopy(block) if copied else block
            self._untouched = not cut
        else:
            self._untouched = not cut and original is block
        self._original = original
        self._reference = policy.reference(path) if policy.dense_target else None
        self._caught: dict[str, Calls] = {}
        self._onwards: Stream | None = None
        """the inputs of the next block, where the dense block has computed them"""
        if policy.independent and not self._untouched and not detached:
            # The next block's inputs come from the dense block, this block's statistics from the changed one.
            self._onwards = path.actual.copy()
            self.floor_seconds += 2 * _advance(original, self._onwards)

    def stages(self, groups: list[list[Item]]) -> list[list[Item]]:
        """Return the stages: groups of items that are solved together, in the order of the forward pass."""
        if self.path.policy.sequential or not groups:
            return groups
        return [[item for group in groups for item in group]]

    def collect(self, taps: Sequence[str], places: Sequence[str] = ()) -> Collected:
        """Return the moments of the inputs of a stage's layers; `places` are the sub-modules that it prunes.

        A sub-module whose `calls` are needed must be named here with the first stage that prunes it.
        """
        policy, actual, dense = self.path.policy, self.path.actual, self._reference
        drifted = dense is not actual or not self._untouched
        # Without a dense target the pass that collects the moments also records the calls of the sub-modules.
        fresh = [place for place in places if place not in self._caught] if dense is None else []
        known = self._known if self._untouched and (dense is None or dense is actual) else None
        if known is not None and not fresh:
            found = known.found(taps, passing=policy.independent and not self._detached)
            if found is not None:
                return self._from_cache(found)
        if self._untouched and policy.independent and not self._detached:
            # The block is still dense, so this pass also computes the next block's inputs.
            output = self._onwards = actual.copy()
        else:
            output = None
        with catching(self.block, fresh, actual, self._wanted) as calls:
            collected = collect(
                self.block,
                actual,
                taps,
                reference=(self._original, dense) if dense is not None and drifted else None,
                correction=policy.correction,
                held_out=self.held_out,
                output=output,
                to_end=bool(fresh),
            )
        self._caught |= calls
        self._untouched = False
        self.floor_seconds += collected.gram_seconds
        if output is not None:
            self.floor_seconds += 2 * collected.forward_seconds
        elif self._onwards is None and not policy.sequential and not self._detached:
            self.floor_seconds += collected.forward_seconds
        if known is not None:
            known.keep(collected)
        return collected

    def _from_cache(self, found: Collected) -> Collected:
        """Use cached moments of the dense block in place of a pass that collects them."""
        policy, self._untouched = self.path.policy, False
        self.floor_seconds += found.gram_seconds
        if self._detached:
            self.floor_seconds += 2 * found.forward_seconds
        elif policy.independent:
            self._onwards = self.path.actual.copy()
            self.floor_seconds += 2 * _advance(self.block, self._onwards)
        elif not policy.sequential:
            self.floor_seconds += found.forward_seconds
        return found

    def calls(self, place: str) -> Calls:
        """Return the calls of a sub-module on the path for the selected batches, with its target outputs."""
        if self._reference is None:
            return self._caught[place]
        dense = calls_of(self._original, place, self._reference, self._wanted).targets
        found = calls_of(self.block, place, self.path.actual, self._wanted)
        if self.path.policy.correction == 1:
            return replace(found, targets=dense)
        return with_mixed_targets(found, self._original.get_submodule(place), dense, self.path.policy.correction)

    def close(self) -> None:
        """Move the path on to the next block."""
        if self._detached:
            return
        actual, dense, policy = self.path.actual, self.path.dense, self.path.policy
        if self._onwards is not None:
            actual.past(self._onwards.hidden)
        else:
            # With one pass a stage, no pass covered the whole block: this one counts for two.
            self.floor_seconds += (2 if policy.sequential else 1) * _advance(self.block, actual)
        if dense is not actual:
            advance(self._original, dense)

    def __enter__(self) -> "Visit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def _advance(block: nn.Module, stream: Stream) -> float:
    """Move a stream on through a block; return the seconds."""
    before = clock(stream.hidden.device)
    advance(block, stream)
    return clock(stream.hidden.device) - before
