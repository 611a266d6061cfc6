"""What the router and every expert of a block make of tokens: the problem of which experts to keep."""

import torch
from torch import Tensor

from optprune.calibration.calls import Calls
from optprune.models import Decoder
from optprune.models.mixture import SeparateExperts, experts_in
from optprune.problems import ExpertChoice

MOST_PRODUCTS = 2**26
"""the products of answers that are held of a block: of 8 experts those of a million tokens, of 128 those of 4096"""


@torch.no_grad()
def expert_choice(decoder: Decoder, index: int, calls: Calls, keep: int) -> ExpertChoice:
    """The choice of `keep` experts of a block by the tokens that its mixture is called with.

    The first of them, as many as have no more than MOST_PRODUCTS products of the answers of two experts. Processes that
    share the calls ask together, and all have the same problem.
    """
    mixture, config, block = decoder.architecture.mixture, decoder.model.config, decoder.blocks[index]
    assert mixture is not None
    experts, router = experts_in(block, mixture), block.get_submodule(mixture.router)
    assert isinstance(experts, SeparateExperts)
    count, device = experts.count, router.get_parameter("weight").device
    most = left = MOST_PRODUCTS // count**2
    logits = [torch.zeros(0, count, device=device)]
    products = [torch.zeros(0, count, count, device=device)]
    for _, args, _, _ in calls.each():
        tokens = args[0].reshape(-1, args[0].shape[-1])[:left]
        left -= len(tokens)
        if not len(tokens):
            break
        logits.append(router(tokens)[0].float())
        answers = torch.stack([experts.outputs(tokens, number) for number in range(count)], 1).float()
        products.append(answers @ answers.mT)
    scores, pairs = (rows[:most] for rows in _of_all(calls, torch.cat(logits), torch.cat(products)))
    return ExpertChoice(scores, pairs, decoder.experts_for_a_token, mixture.normalised(config), keep)


def _of_all(calls: Calls, *own: Tensor) -> list[Tensor]:
    """The rows of all processes, in the order of the batches: a process has batches next to each other."""
    peers = calls.share.partial_sums.peers
    if peers.size == 1:
        return list(own)
    shared = peers.all_gather([rows.cpu() for rows in own])
    return [torch.cat(parts).to(rows.device) for parts, rows in zip(zip(*shared, strict=True), own, strict=True)]
