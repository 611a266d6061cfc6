"""Recovery: once the masks are chosen, the kept weights of a sub-module are refitted against its dense output.

The output of an attention or a gated MLP is affine in some of its layers, taken one at a time: in the up and the down
projection, in the values and the output projection. So each is a linear least squares problem over the calibration
tokens, though not one over a Gram matrix, and the layers take turns. Tokens that no step sees decide where to stop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optprune.calibration.calls import Calls
from optprune.metric import OutputMetric
from optprune.models.surgery import write
from optprune.pruning.module_loss import AtOutput, Inside, ModuleLoss
from optprune.report import RecoveredPart

PATIENCE = 2
"""a turn ends after so many steps that made the error on the tokens kept apart no smaller"""


def recover(
    module: nn.Module,
    layers: Sequence[str],
    fit: Calls,
    apart: Calls,
    *,
    rounds: int = 1,
    steps: int = 8,
    damping: float = 0.1,
    metric: OutputMetric | None = None,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> RecoveredPart:
    """Refit the nonzero weights of the layers of a sub-module in place, each in turn, so that it answers the targets.

    Its output must be affine in each layer alone; `layers` are in the order of the forward pass, down to the one that
    gives the output. A turn minimises half the mean squared change of the output (in the metric, where there is one)
    plus a ridge towards the weights at its beginning, `damping` times the mean diagonal of the Hessian, by at most
    `steps` steps of conjugate gradients. The preconditioner is the Kronecker product of the Gram matrix of the layer's
    inputs and that of its outputs' effects on the answer, both damped (K-FAC). Of all iterates the one with the least
    error on the batches kept apart is written: that error never rises, and neither does the one on the batches fitted.
    Where weights will be stored in a `dtype` of fewer digits than the module has, iterates are tried as rounded to it:
    the error on the batches fitted may then rise by what that costs.
    A step costs a forward and a backward pass of the module, but in the turn of the last layer nothing: the moments of
    its inputs, from one pass, say all.
    """
    began = time.perf_counter()
    loss = ModuleLoss(module, fit, apart, metric)
    turn = _Turn(loss, steps, damping, dtype)
    held_out = held_out_before = loss.error(apart)
    # On the batches fitted, before and after every turn, which learns them on its way.
    errors, kept = list[float](), 0
    for _ in range(rounds):
        moved = 0
        for position in range(len(layers)):
            taken = turn.take(layers[position:], held_out)
            if taken is not None:
                moved, held_out = moved + taken.steps, taken.held_out
                errors += [taken.before, taken.after]
        kept += moved
        if not moved:
            break
    signal, held_out_signal = loss.signal(fit), loss.signal(apart)
    before, after = (errors[0], errors[-1]) if errors else (loss.error(fit),) * 2
    if kept and dtype is not None:
        after = loss.error(fit)
    return RecoveredPart(
        name=name,
        layers=tuple(layers),
        error_before=_share(before, signal),
        error_after=_share(after, signal),
        held_out_before=_share(held_out_before, held_out_signal),
        held_out_after=_share(held_out, held_out_signal),
        steps=kept,
        seconds=time.perf_counter() - began,
    )


def _share(error: float, signal: float) -> float:
    """The error as a share of the signal; of none, 1 stands for any error, as in a layer's relative error."""
    return error / signal if signal > 0 else float(error > 0)


@dataclass(frozen=True)
class _Taken:
    """What a turn did: the steps kept, and the mean squared change of the output."""

    steps: int
    before: float
    """the change on the batches fitted, with the weight that the turn began with"""
    after: float
    held_out: float
    """the change on the batches kept apart, with the weight kept"""


@dataclass(frozen=True)
class _Turn:
    """What one layer's least squares problem is made of."""

    loss: ModuleLoss
    steps: int
    damping: float
    dtype: torch.dtype | None = None
    """what iterates are rounded to, where that is not the module's own"""

    def take(self, layers: Sequence[str], held_out: float) -> _Taken | None:
        """Refit the first of the layers; None where it has no weight to refit."""
        layer: nn.Linear = self.loss.module.get_submodule(layers[0])  # type: ignore[assignment]
        start = layer.weight.detach().clone()
        mask = start != 0
        if not bool(mask.any()):
            return None
        problem = Inside(self.loss, layers) if len(layers) > 1 else AtOutput(self.loss, layer, held_out)
        # Any vector of signs is an estimate of the trace: Hutchinson (1989).
        signs = torch.randint(0, 2, start.shape, generator=torch.Generator().manual_seed(0)).to(start) * 2 - 1
        ridge = self.damping * problem.trace(torch.where(mask, signs, 0.0)) / int(mask.sum())
        precondition = _preconditioner(problem.gram, problem.outputs(), self.damping)
        at, residual = start, -torch.where(mask, problem.gradient, 0.0)
        direction = torch.where(mask, precondition(residual), 0.0)
        energy = float((residual * direction).sum())
        best, best_step, after = start, 0, problem.fit_error
        pulled = torch.zeros_like(start)  # H (at - start)
        for step in range(1, self.steps + 1):
            if not energy > 0 or step > best_step + PATIENCE:
                break
            product = problem.product(direction)
            curvature = float((direction * product).sum())
            curvature += ridge * float(direction.square().sum())
            if not curvature > 0:
                break
            length = energy / curvature
            at, pulled = at + length * direction, pulled + length * product
            tried = at if self.dtype is None else at.to(self.dtype).to(at)
            error = problem.held_out(tried)
            if error < held_out:
                best, best_step, held_out = tried, step, error
                after = problem.fit_error + float(((at - start) * (2 * problem.gradient + pulled)).sum())
            residual = residual - length * torch.where(mask, product + ridge * direction, 0.0)
            preconditioned = torch.where(mask, precondition(residual), 0.0)
            fresh = float((residual * preconditioned).sum())
            direction, energy = preconditioned + fresh / energy * direction, fresh
        write(layer, best)
        return _Taken(best_step, problem.fit_error, after, held_out)


def _preconditioner(
    gram: Float[Tensor, "in in"], outputs: Float[Tensor, "out out"] | None, damping: float
) -> Callable[[Tensor], Tensor]:
    """(outputs (x) gram)^-1 with both factors damped; no outputs stand for the identity, whose inverse is a number."""
    left, right = (None if outputs is None else _damped_inverse(outputs, damping)), _damped_inverse(gram, damping)
    alike = _damped_inverse(torch.ones(1, 1).to(gram), damping)
    return lambda residual: (alike * residual if left is None else left @ residual) @ right


def _damped_inverse(factor: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """(A + sqrt(damping) mean(diag A) I)^-1, with some damping in any case, for a factor of a Kronecker product.

    Both factors damped so, their product is damped by about `damping` times its mean diagonal.
    """
    mean = factor.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(factor)).to(factor)
    damped = factor + max(damping, 1e-3) ** 0.5 * mean * torch.eye(len(factor)).to(factor)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
