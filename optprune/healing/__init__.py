"""Healing: a short distillation of a pruned model from the dense one, in which zeros stay zeros."""

from optprune.calibration.generated import generated_windows
from optprune.healing.heal import HealReport, heal
from optprune.healing.run_folder import HealingFolder
from optprune.healing.settings import HealingSettings
from optprune.healing.training import HeldOut
from optprune.healing.zeros import KeepZeros, Masks, keep_zeros, masks

__all__ = [
    "HealReport",
    "HealingFolder",
    "HealingSettings",
    "HeldOut",
    "KeepZeros",
    "Masks",
    "generated_windows",
    "heal",
    "keep_zeros",
    "masks",
]
