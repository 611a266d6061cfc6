"""Healing: a pruned model is trained for a while to predict what the dense one does, and its zeros stay zeros."""

from optprune.healing.callback import KeepZeros
from optprune.healing.folder import HealingFolder
from optprune.healing.generated import generated_windows
from optprune.healing.heal import heal
from optprune.healing.records import HealReport, HeldOut
from optprune.healing.zeros import Masks, keep_zeros, masks

__all__ = [
    "HealReport",
    "HealingFolder",
    "HeldOut",
    "KeepZeros",
    "Masks",
    "generated_windows",
    "heal",
    "keep_zeros",
    "masks",
]
