"""Recovery of a mixture that lost experts: the last matrices of the others are refitted to its dense output.

The output of a mixture is sum_j g_j(t) V_j h_j(t) for token t: g_j are the router's weights over the experts that are
left, h_j the inner activations of expert j, and V_j its last matrix. It is linear in each V_j, so each is a linear
least squares problem over the tokens that the router sends to j, with Gram matrix E[a a^T] of a = g_j h_j.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optprune.calibration.calls import Calls
from optprune.calibration.partial_sums import OrderedSum, TensorSums
from optprune.models import Decoder
from optprune.models.mixture import DOWN, SeparateExperts, experts_in, mixture_of
from optprune.models.surgery import write
from optprune.numerics.linalg import cholesky, solve_lower, solve_upper
from optprune.numerics.tensors import first_output
from optprune.pruning.refinement import ModuleLoss, relative
from optprune.report import RecoveredPart


@dataclass(frozen=True)
class _Routed:
    """A batch at the entry of the experts, and what is left of the change of the mixture's output."""

    part: int
    hidden: Float[Tensor, "tokens hidden"]
    chosen: Tensor
    """the experts of each token [tokens, k]"""
    weights: Float[Tensor, "tokens k"]
    left: Float[Tensor, "tokens out"]
    """the dense output minus that of the mixture as it is; updated in place"""

    def inputs(self, experts: SeparateExperts, number: int) -> tuple[Tensor, Float[Tensor, "routed width"]]:
        """Return the tokens that an expert gets, and the inputs of its last layer times the router's weights."""
        tokens, places = torch.where(self.chosen == number)
        inner = experts.inner(self.hidden[tokens], number) * self.weights[tokens, places, None]
        return tokens, inner.to(self.left)


@torch.no_grad()
def recover_experts(
    decoder: Decoder,
    index: int,
    fit: Calls,
    apart: Calls,
    *,
    rounds: int = 1,
    damping: float = 0.1,
    dtype: torch.dtype | None = None,
) -> RecoveredPart:
    """Refit the last matrices of the experts of a block in place, each in turn, to match the calls' dense outputs.

    A turn minimises half the mean squared change of the mixture's output plus a ridge towards the matrix at its
    beginning, `damping` times the mean diagonal of the Gram matrix of the expert's inputs, in closed form. It goes as
    far along the change as the error falls on the fitted batches and on the held-out ones, so that neither error rises
    but by the rounding to the dtype of the weights, or to a `dtype` in which they will be stored. Zeros stay. `rounds`
    turns are taken for each expert, fewer where none gains. A round costs three passes of the mixture without the last
    layers, and the Gram products.
    """
    began, mixture = time.perf_counter(), decoder.architecture.mixture
    assert mixture is not None
    block = decoder.blocks[index]
    module, experts = mixture_of(block, mixture), experts_in(block, mixture)
    assert isinstance(experts, SeparateExperts)
    loss = ModuleLoss(module, fit, apart, None)
    before, held_out_before = loss.error(fit), loss.error(apart)
    fitted, held_out = _routed(module, experts, fit), _routed(module, experts, apart)
    turn, kept = _Turn(loss, experts, fitted, held_out, damping, dtype), 0
    for _ in range(rounds):
        moved = sum(turn.take(number) for number in range(experts.count))
        kept += moved
        if not moved:
            break
    signal, held_out_signal = loss.signal(fit), loss.signal(apart)
    return RecoveredPart(
        name=decoder.name(index, mixture.module) if mixture.module else decoder.block_name(index),
        layers=tuple(f"experts.{number}.{DOWN}" for number in range(experts.count)),
        error_before=relative(before, signal),
        error_after=relative(loss.error(fit) if kept else before, signal),
        held_out_before=relative(held_out_before, held_out_signal),
        held_out_after=relative(loss.error(apart) if kept else held_out_before, held_out_signal),
        steps=kept,
        seconds=time.perf_counter() - began,
    )


def _routed(module: nn.Module, experts: SeparateExperts, calls: Calls) -> list[_Routed]:
    """Return the batches of the calls as the experts get them."""
    found, seen = list[_Routed](), list[tuple[Any, ...]]()
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        for part, args, kwargs, target in calls.each():
            left = (target - first_output(module(*args, **kwargs))).flatten(0, -2)
            hidden, chosen, weights = seen.pop()
            found.append(
                _Routed(part, hidden, chosen, weights, left.to(torch.promote_types(left.dtype, torch.float32)))
            )
    finally:
        handle.remove()
    return found


@dataclass(frozen=True)
class _Turn:
    """The settings of one expert's least squares problem."""

    loss: ModuleLoss
    experts: SeparateExperts
    fitted: list[_Routed]
    held_out: list[_Routed]
    damping: float
    dtype: torch.dtype | None

    def take(self, number: int) -> bool:
        """Refit one expert, and return whether that lowered the error."""
        layer: nn.Linear = self.experts[str(number)].get_submodule(DOWN)  # type: ignore[assignment]
        weight = layer.weight.detach().clone()
        sums = self._sums(self.loss.fit, (layer.in_features,) * 2, tuple(weight.shape))
        for each in self.fitted:
            tokens, inputs = each.inputs(self.experts, number)
            sums.at(each.part).add(inputs.T @ inputs, each.left[tokens].T @ inputs)
        gram, cross = sums.total().tensors
        ridge = self.damping * float(gram.diagonal().mean())
        if not ridge > 0:
            return False  # no token of the calibration gets here
        root = cholesky(gram.double() + ridge * torch.eye(len(gram), dtype=torch.float64, device=gram.device))
        change = solve_upper(root.T, solve_lower(root, cross.double().T)).T.to(gram) * (weight != 0)
        length = _length(float((change * cross).sum()), float((change @ gram * change).sum()))
        length = min(length, self._held_out_length(number, change))
        if not length > 0:
            return False
        moved = weight + (length * change).to(weight)
        write(layer, moved if self.dtype is None else moved.to(self.dtype))
        done = layer.weight.detach().to(gram) - weight.to(gram)
        for each in (*self.fitted, *self.held_out):
            tokens, inputs = each.inputs(self.experts, number)
            each.left[tokens] -= inputs @ done.T
        return True

    def _held_out_length(self, number: int, change: Float[Tensor, "out width"]) -> float:
        """Return the share of a change at which the held-out error is least; 1 where no held-out token gets there."""
        sums = self._sums(self.loss.apart, (), ())
        for each in self.held_out:
            tokens, inputs = each.inputs(self.experts, number)
            moved = inputs @ change.T
            sums.at(each.part).add((moved * each.left[tokens]).sum(), moved.square().sum())
        gain, energy = map(float, sums.total().tensors)
        return _length(gain, energy) if energy > 0 else 1.0

    def _sums(self, calls: Calls, *shapes: tuple[int, ...]) -> OrderedSum[TensorSums]:
        """Return empty sums over calls, in the dtype of the changes that are left."""
        like = self.fitted[0].left
        return OrderedSum(calls.share.partial_sums, lambda: TensorSums(*map(like.new_zeros, shapes)))


def _length(gain: float, energy: float) -> float:
    """Return the share of a change, at most all of it, at which an error with this slope and curvature is least."""
    return min(1.0, max(0.0, gain / energy)) if energy > 0 else 0.0
