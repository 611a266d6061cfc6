"""The words of commands that would work, on tiny models; an input spoils something in them or in what they read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Words:
    """What commands read, unless a test says otherwise."""

    model: Path
    """a dense model"""
    pruned: Path
    text: Path
    held: Path
    """a text that has no document of the other"""

    def of(self, command: str, output: Path, *more: str, **options: Any) -> list[str]:
        """The words of a command that writes an output."""
        return getattr(self, command)(output, *more, **options)

    def prune(self, output: Path, *more: str, **options: Any) -> list[str]:
        given = {"calibration": self.text, "output": output, "samples": 4, "seq_length": 32, "recipe": "fasp"}
        return ["prune", str(self.model), *listed(given | options), *more]

    def plan(self, *more: str, **options: Any) -> list[str]:
        return ["plan", str(self.model), *listed({"samples": 4, "seq_length": 32} | options), *more]

    def heal(self, output: Path, *more: str, **options: Any) -> list[str]:
        given = {"teacher": self.model, "text": self.text, "output": output, "tokens": 512, "seq_length": 32}
        given |= {"held_out": 2, "batch_size": 4}
        return ["heal", str(self.pruned), *listed(given | options), *more]

    def compare(self, output: Path, *more: str, **options: Any) -> list[str]:
        given = {"recipes": "wanda,magnitude", "sparsities": "0.4,0.5", "calibration": self.text, "text": self.held}
        given |= {"output": output, "samples": 4, "seq_length": 32, "windows": 3, "units": "weights"}
        return ["compare", str(self.model), *listed(given | options), *more]

    def frontier(self, output: Path, *more: str, **options: Any) -> list[str]:
        return ["frontier", str(self.model), *listed({"output": output} | options), *more]

    def problems(self, output: Path, *more: str, **options: Any) -> list[str]:
        given = {"calibration": self.text, "output": output, "samples": 4, "seq_length": 32}
        return ["problems", str(self.model), *listed(given | options), *more]

    def evaluate(self, *more: str, **options: Any) -> list[str]:
        given = {"text": self.held, "seq_length": 32, "windows": 2}
        return ["evaluate", str(self.pruned), *listed(given | options), *more]

    def report(self, *more: str, **options: Any) -> list[str]:
        return ["report", str(self.pruned), *listed(options), *more]

    def audit(self, *more: str, **options: Any) -> list[str]:
        return ["audit", str(self.pruned), *listed(options), *more]

    def export(self, output: Path, *more: str, **options: Any) -> list[str]:
        return ["export", str(self.pruned), *listed({"output": output} | options), *more]


def listed(options: dict[str, Any]) -> list[str]:
    """Options as words; those that are None are left out."""
    return [
        word
        for name, value in options.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
