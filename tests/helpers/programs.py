"""Programs of tiny models, for tests of plans and checks."""

from typing import Any

from optprune.models import Decoder
from optprune.program import Program, Request, resolve
from optprune.recipe import Recipe, load_recipe
from tests.helpers.tiny_models import tiny_llama

LENGTH = 32


def program_of(
    recipe: str | Recipe = "fasp",
    samples: int = 8,
    decoder: Decoder | None = None,
    *,
    length: int = LENGTH,
    fields: dict[str, Any] | None = None,
    **more: Any,
) -> Program:
    """Return the program of a recipe for a model of Llama's kind, or another one."""
    if isinstance(recipe, str):
        named = {"propagation": more.pop("propagation")} if "propagation" in more else {}
        recipe = load_recipe(recipe, {**(fields or {}), **named})
    request = Request(recipe=recipe, samples=samples, seq_length=length, **more)
    return resolve(Decoder(tiny_llama()) if decoder is None else decoder, request)
