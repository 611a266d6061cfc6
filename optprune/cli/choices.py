"""The names that options take, without the imports that define them, so that a typing error is refused at once.

The tables themselves stand beside the code (models, calibration, program, texts), which takes seconds to import;
tests/cli/test_choices.py compares each of them with its copy here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from optprune.errors import InputError
from optprune.system.wording import either, shown, suggestion

SHIPPED = Path(__file__).parents[1] / "recipe" / "shipped"
RECIPES = tuple(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
UNITS = (
    "mlp",
    "vo",
    "rotated-vo",
    "qk",
    "kv-groups",
    "recurrent-heads",
    "all",
    "rotated-all",
    "rotated-all-qk",
    "all-heads",
    "rotated-all-heads",
    "all-recurrent",
    "weights",
    "experts",
    "blocks",
)
POLICIES = ("dense", "pruned", "intra", "cross", "partial", "local")
BITS = ("none", "q4_0", "q5_0", "q8_0", "w4a16", "w4a16_shifted")
RUNTIMES = ("transformers", "vllm", "gguf", "onnx")
STATES = ("auto", "device", "host", "disk")
SEQUENCES = ("packed", "packed-no-bos", "whole")
EFFORTS = ("quick", "standard", "best")
MEASURES = ("reap", "share", "weight")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MULTIPLES = "32, and 64 for MLPs of 4096 units or more; 8 or 16 in small heads and MLPs"
"""the default multiples of widths"""
CHOICES: Mapping[str, Sequence[str]] = {
    "units": UNITS,
    "effort": EFFORTS,
    "bits": BITS,
    "propagation": POLICIES,
    "target": RUNTIMES,
    "states": STATES,
    "sequences": SEQUENCES,
    "by": MEASURES,
    "dtype": DTYPES,
    "save-dtype": DTYPES,
}
"""the accepted names, by option"""


def check_choices(recipe: str | None = None, **given: str | None) -> None:
    """Raise InputError unless the recipe and the values of options in `CHOICES` are known; None is not checked."""
    if recipe is not None and recipe not in RECIPES and Path(recipe).suffix.lower() not in (".yaml", ".yml"):
        raise InputError(
            f"the recipe {shown(recipe)} is not known{suggestion(recipe, RECIPES)}: use one of {', '.join(RECIPES)}, "
            "or a .yaml file"
        )
    for name, value in given.items():
        option = name.replace("_", "-")
        if value is not None and value not in CHOICES[option]:
            known = CHOICES[option]
            raise InputError(f"--{option} cannot be {shown(value)}{suggestion(value, known)}: use {either(known)}")
