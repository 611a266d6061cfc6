"""Tracing: unknown architectures found out from what a small model of them does, where that is safe."""

from optprune.models.tracing.laws import check_laws
from optprune.models.tracing.trace import trace

__all__ = ["check_laws", "trace"]
