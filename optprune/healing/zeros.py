"""Masks of a model's zeros, which keep them zero while the model is trained by any code."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from optprune.errors import InputError
from optprune.models import Decoder
from optprune.models.surgery import as_buffers
from optprune.system.wording import counted, install


class Masks:
    """Masks of the matrices of the decoder blocks that hold exact zeros: True where a weight is kept."""

    def __init__(self, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        """Take the matrices [out, in] by their full names, and their bool masks of the same shape."""
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
        """The number of zeros."""
        return sum(mask.numel() - int(mask.sum()) for mask in self.kept.values())

    @property
    def shares(self) -> dict[str, float]:
        """The share of zeros in each matrix, by its name."""
        return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in self.kept.items()}

    def apply(self, model: PreTrainedModel | None = None) -> None:
        """Set the weights that are not kept to zero, in the masks' own model or in another of the same shapes."""
        for name, weight in self._found_in(model).items():
            self.clear(name, weight)

    def clear(self, name: str, tensor: Tensor) -> None:
        """Set a tensor [out, in] to zero, never to -0, where the mask of the matrix `name` is False."""
        if self.kept[name].device != tensor.device:
            self.kept[name] = self.kept[name].to(tensor.device)
        with torch.no_grad():
            tensor.masked_fill_(self.kept[name].logical_not(), 0.0)

    def check(self, model: PreTrainedModel | None = None) -> None:
        """Raise InputError, with a matrix and a count, where weights are not zero any more.

        Checks the masks' own model, or another of the same shapes, such as one that an adapter was merged into.
        """
        filled = {}
        for name, weight in self._found_in(model).items():
            count = int((weight.detach()[self.kept[name].logical_not().to(weight.device)] != 0).sum())
            filled |= {name: count} if count else {}
        if filled:
            name, count = next(iter(filled.items()))
            others = (
                f", and so do {counted(len(filled) - 1, 'other matrix', 'other matrices')}" if len(filled) > 1 else ""
            )
            raise InputError(
                f"{name} has {counted(count, 'nonzero weight')} where its mask is zero{others}: train with "
                "optprune.keep_zeros, merge an adapter by Masks.merge, or restore the zeros by Masks.apply"
            )

    def merge(self, adapted: Any) -> PreTrainedModel:
        """Merge the adapters of a peft model (such as LoRA) into the weights, and return the model without them.

        The part of an adapter's update that falls on pruned weights is dropped and lost, so that zeros stay zeros.
        Needs peft, the extra `heal`.
        """
        try:
            from peft import PeftModel
        except ImportError as error:
            raise InputError(f"adapters need peft ({error}): {install('heal')}") from error
        if not isinstance(adapted, PeftModel):
            raise InputError(f"a {type(adapted).__name__} is not a peft model: give the model that peft returned")
        merged: Any = adapted.merge_and_unload()
        self.apply(merged)
        return merged

    def _found_in(self, model: PreTrainedModel | None) -> dict[str, nn.Parameter]:
        """Return the masked weights of a model. Raises InputError where one is missing or has another shape."""
        if model is None:
            return self.weights
        own = dict(model.named_parameters())
        for name, mask in self.kept.items():
            if name not in own or own[name].shape != mask.shape:
                found = f"is {list(own[name].shape)}" if name in own else "is missing"
                raise InputError(
                    f"{name} {found}, but its mask is {list(mask.shape)}: give the model of the masks, without adapters"
                )
        return {name: own[name] for name in self.kept}


def masks(model: PreTrainedModel) -> Masks:
    """Return the masks of all linear weights of the decoder blocks that hold zeros now.

    Zeros in rows that are zero as a whole count too. A mask takes one byte a weight. Raises InputError for a model that
    is quantised or has adapters.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"a {type(model).__name__} is not a transformers model: make the masks before adding adapters")
    decoder, weights = Decoder(model), {}
    for block in range(len(decoder.blocks)):
        for path in decoder.paths(block):
            weights[f"{decoder.name(block, path)}.weight"] = decoder.layer(block, path).weight
        as_buffers(decoder.blocks[block], (decoder.architecture.kept_pairs,))  # which are not trained
    kept = {name: weight.detach() != 0 for name, weight in weights.items()}
    sparse = {name: mask for name, mask in kept.items() if not bool(mask.all())}
    return Masks({name: weights[name] for name in sparse}, sparse)


def keep_zeros(optimizer: Optimizer, masks: Masks) -> RemovableHandle:
    """Register a hook that sets pruned weights to zero after every step of an optimizer; `remove()` it to stop.

    Tensors of the same shape in the optimizer's state, such as momentum, are set to zero as well, and all of it is done
    once now. Works with any optimizer of torch, also inside accelerate's. Raises InputError where the optimizer holds
    none of the masked weights: then it trains an adapter (see `Masks.merge`) or copies of them.
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
            "the optimizer holds none of the masked weights: give it the parameters of the masks' model, or, for an "
            "adapter, leave out keep_zeros and merge by Masks.merge"
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
    """Return the torch optimizer inside accelerate's, whose own hooks are never called."""
    from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


class KeepZeros(TrainerCallback):
    """Callback with which transformers' Trainer keeps zeros: `Trainer(..., callbacks=[KeepZeros(masks(model))])`.

    Raises InputError at the start of the training where the Trainer's optimizer holds none of the masked weights, as
    with an adapter (merge it by `Masks.merge`) or with sharded parameters (FSDP, DeepSpeed).
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle = keep_zeros(kwargs["optimizer"], self.masks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
