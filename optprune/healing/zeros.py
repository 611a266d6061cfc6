"""Zeros: which weights pruning has set to zero, kept so while a model is trained, in whatever way that is done."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from optprune.errors import InputError
from optprune.models import Decoder
from optprune.system.wording import counted


class Masks:
    """The zeros of a model's linear weights, which training is to leave at zero.

    There is a mask for each matrix of the decoder blocks that holds exact zeros; it is True where a weight is kept.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        """`weights` are the matrices [out, in] by their full names, `kept` their bool masks of the same shape."""
        self.weights = dict(weights)
        self.kept = dict(kept)

    def __str__(self) -> str:
        zeros, whole = self.zeros, sum(mask.numel() for mask in self.kept.values())
        return (
            f"{counted(len(self.kept), 'matrix', 'matrices')} with zeros: {zeros} of their {whole} weights "
            f"({zeros / max(whole, 1):.2%})"
        )

    @property
    def zeros(self) -> int:
        """The number of weights that are zero."""
        return sum(mask.numel() - int(mask.sum()) for mask in self.kept.values())

    @property
    def shares(self) -> dict[str, float]:
        """The share of zeros in each matrix, by its name."""
        return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in self.kept.items()}

    def apply(self, model: PreTrainedModel | None = None) -> None:
        """Set what a mask does not keep to zero: in the model that the masks are of, or in another of its shapes."""
        for name, weight in self._found_in(model).items():
            self.clear(name, weight)

    def clear(self, name: str, tensor: Tensor) -> None:
        """Set a tensor [out, in] to zero, and not to -0, where the mask of a matrix does not keep."""
        if self.kept[name].device != tensor.device:
            self.kept[name] = self.kept[name].to(tensor.device)
        with torch.no_grad():
            tensor.masked_fill_(self.kept[name].logical_not(), 0.0)

    def check(self, model: PreTrainedModel | None = None) -> None:
        """Raise InputError where weights that were zero are zero no more, with the matrix and how many there are.

        Of the model that the masks are of, or of another of its shapes, such as one that an adapter was merged into.
        """
        filled = {}
        for name, weight in self._found_in(model).items():
            count = int((weight.detach()[self.kept[name].logical_not().to(weight.device)] != 0).sum())
            filled |= {name: count} if count else {}
        if filled:
            name, count = next(iter(filled.items()))
            others = (
                f", and so have {counted(len(filled) - 1, 'other matrix', 'other matrices')}" if len(filled) > 1 else ""
            )
            raise InputError(
                f"{name} has {counted(count, 'zero')} filled{others}: train with optprune.keep_zeros, and merge an "
                "adapter by Masks.merge, or put the zeros back by Masks.apply"
            )

    def merge(self, adapted: Any) -> PreTrainedModel:
        """Merge the adapters of a peft model (LoRA and its kin) into the weights, and give the model without them.

        What an adapter adds where a weight was pruned is dropped, so that the zeros are where they were; that part of
        what it has learned is lost. Needs peft, the extra optprune[heal].
        """
        try:
            from peft import PeftModel
        except ImportError as error:
            raise InputError(f"adapters need peft ({error}): pip install 'optprune[heal]'") from error
        if not isinstance(adapted, PeftModel):
            raise InputError(f"a model of peft can be merged, not a {type(adapted).__name__}: give what it has made")
        merged: Any = adapted.merge_and_unload()
        self.apply(merged)
        return merged

    def _found_in(self, model: PreTrainedModel | None) -> dict[str, nn.Parameter]:
        """The masked weights of a model; InputError where it has not all of them."""
        if model is None:
            return self.weights
        own = dict(model.named_parameters())
        for name, mask in self.kept.items():
            if name not in own or own[name].shape != mask.shape:
                found = f"is {list(own[name].shape)}" if name in own else "is not there"
                raise InputError(
                    f"{name} {found}, and its mask is {list(mask.shape)}: give the model that the masks are of, "
                    "without adapters around it"
                )
        return {name: own[name] for name in self.kept}


def masks(model: PreTrainedModel) -> Masks:
    """The masks of a model's zeros: of every linear weight of its decoder blocks that holds any, as it is now.

    Rows that are zero as a whole count as the single zeros that they are. InputError for a model that is quantised or
    has adapters. A mask takes a byte a weight.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"masks are of a transformers model, not of a {type(model).__name__}: take them before adapters"
        )
    decoder, weights = Decoder(model), {}
    for block in range(len(decoder.blocks)):
        for path in decoder.paths(block):
            weights[f"{decoder.name(block, path)}.weight"] = decoder.layer(block, path).weight
    kept = {name: weight.detach() != 0 for name, weight in weights.items()}
    sparse = {name: mask for name, mask in kept.items() if not bool(mask.all())}
    return Masks({name: weights[name] for name in sparse}, sparse)


def keep_zeros(optimizer: Optimizer, masks: Masks) -> RemovableHandle:
    """Keep the zeros of a model at zero after every step of an optimizer; the handle's `remove()` ends that.

    Weights and everything of their shape in the optimizer's state, such as momentum, are set to zero where the mask
    does not keep, now and after each step. Works with any optimizer of torch, also inside accelerate's. InputError
    where it holds none of the masked weights: then it trains an adapter, see `Masks.merge`, or copies of them.
    """
    inner = _innermost(optimizer)
    names = {id(weight): name for name, weight in masks.weights.items()}
    held = [
        (names[id(parameter)], parameter)
        for group in inner.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    ]
    if masks.weights and not held:
        raise InputError(
            "the optimizer holds none of the weights that have zeros: give it the parameters of the model that the "
            "masks are of, or, for an adapter, leave this out and merge by Masks.merge"
        )

    def clear(*_: Any) -> None:
        for name, parameter in held:
            masks.clear(name, parameter)
            for value in inner.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    masks.clear(name, value)

    clear()
    return inner.register_step_post_hook(clear)


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer of torch inside accelerate's, whose own hooks are never called."""
    from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
