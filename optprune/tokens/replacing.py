"""Text with removed tokens in place of some of its own, of which it has few."""

import torch
from torch import Tensor

from optprune.tokens.targets import PushForward

REPLACED = 0.15
"""the share of the tokens of a text that are replaced by removed ones"""
MOST = 0.5
"""the largest probability with which a token is replaced"""


def with_removed(
    push: PushForward, ids: Tensor, probabilities: Tensor, generator: torch.Generator, *, evenly: bool = False
) -> tuple[Tensor, Tensor]:
    """Return old ids [length] with some replaced by removed tokens, and the weights of these tokens, 0 for others.

    The `probabilities` [length, rows] are the dense model's behind each token of the text. A token is replaced the more
    often the likelier a removed one is there, or `evenly`, and by one that is drawn from these. The weight of a removed
    token is the number of times that the model expects one there, for each time that one is put there.
    """
    among = probabilities[:-1, push.removed.to(probabilities.device)].cpu()
    chance = among.sum(1)
    likely = torch.ones_like(chance) if evenly else chance / chance.mean().clamp(min=1e-30)
    hit = (REPLACED * likely).clamp(max=MOST).masked_fill(torch.isin(ids[1:].cpu(), push.removed), 0.0)
    places = (torch.rand(len(hit), generator=generator) < hit).nonzero()[:, 0]
    new, weights = ids.clone(), torch.zeros(len(ids))
    for place in places.tolist():
        new[place + 1] = push.removed[torch.multinomial(among[place], 1, generator=generator)]
        weights[place + 1] = chance[place] / hit[place]
    return new, weights
