"""The zeros of a model kept while transformers' Trainer trains it."""

from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from optprune.healing.zeros import Masks, keep_zeros


class KeepZeros(TrainerCallback):
    """Has the Trainer keep zeros: `Trainer(..., callbacks=[KeepZeros(masks(model))])`.

    Raises InputError when training begins and the Trainer's optimizer holds none of the masked weights, as with an
    adapter, whose weights are merged later (see `Masks.merge`), or with sharded parameters (FSDP, DeepSpeed).
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
