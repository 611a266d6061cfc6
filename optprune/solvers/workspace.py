"""Workspace: what a solve takes beside the weight, the moments and the metric, as a formula in the layer's widths."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workspace:
    """The bytes of a solve in float32 over in^2, in out and out^2, fitted to peaks by benchmarks/workspace.py."""

    square: float
    """bytes over in^2"""
    mixed: float
    """bytes over in out"""
    outputs: float = 0.0
    """bytes over out^2"""

    def bytes(self, outputs: int, inputs: int) -> int:
        """The bytes at a weight [outputs, inputs]."""
        return round(self.square * inputs**2 + self.mixed * inputs * outputs + self.outputs * outputs**2)
