"""A run that is followed: its events go to whoever listens, and with progress to a person as well."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from optprune.allocation import Allocation
from optprune.models import Decoder
from optprune.pruning.expectation import expected_computing
from optprune.recipe import Recipe
from optprune.report import Event

Listener = Callable[[Event], None]


@contextmanager
def followed(
    progress: bool,
    listener: Listener | None,
    decoder: Decoder,
    batches: list[Tensor],
    recipe: Recipe,
    allocation: Allocation | None,
) -> Iterator[Listener]:
    """What is to hear of a run's events: the listener, if there is one, and with `progress` what shows them too."""
    listener = listener or (lambda event: None)
    if not progress:
        yield listener
        return
    from optprune.report.progress import Reporter

    tokens = sum(batch.numel() for batch in batches)
    expected = expected_computing(decoder, recipe, allocation, tokens, decoder.model.device)
    with Reporter().events(expected, left="left of pruning") as show:

        def on_event(event: Event) -> None:
            show(event)
            listener(event)

        yield on_event
