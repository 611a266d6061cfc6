"""Tracing of unknown architectures: descriptions derived from the behaviour of a small model."""

from optprune.models.tracing.laws import check_laws
from optprune.models.tracing.trace import trace

__all__ = ["check_laws", "trace"]
