"""What a module of torch gives back."""

from typing import Any

from torch import Tensor


def first_output(output: Any) -> Tensor:
    """The tensor of a module's output, which some versions of some modules wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output
