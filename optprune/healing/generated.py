"""Windows that the dense model writes itself: more to be healed on, where there is little other text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from optprune.calibration.peers import Peers, SingleProcess
from optprune.healing.training import LARGEST_SEED
from optprune.measure.evaluate import evaluating

PROMPT = 32
"""the tokens of the text that a window begins with, at most half of it"""
ALONE = SingleProcess()
TOKENS_AT_ONCE = 16384
"""how many tokens are held in a cache of keys and values"""


@torch.no_grad()
def generated_windows(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    count: int,
    *,
    seed: int = 0,
    peers: Peers = ALONE,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """So many windows of token ids [count, length] that a model writes, as long as those of the first batch.

    Each begins with a piece of a window of the `batches`, token ids [n, length], and goes on with tokens drawn one
    after the other from the whole distribution that the model has on them, but for the end of the text. Every process
    writes a part, and all have all of it; `tell` hears how many parts are done. After LLM-QAT (Liu et al., 2023, arXiv
    2305.17888), where a window begins with one random token.
    """
    length = batches[0].shape[1]
    prompts = _pieces(batches, count, min(PROMPT, length // 2), torch.Generator().manual_seed(seed))
    parts = prompts.split(max(1, TOKENS_AT_ONCE // length))
    own = dict[int, list[list[int]]]()
    devices = [model.device] if model.device.type == "cuda" else []
    with _sampling(model), evaluating(model), torch.random.fork_rng(devices):
        for number in range(peers.rank, len(parts), peers.size):
            tell(number, len(parts))
            torch.manual_seed((seed * len(parts) + number) % LARGEST_SEED)
            ids = parts[number].to(model.device)
            # A method of transformers' generation mixin, which all causal models have.
            found = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), min_length=length, max_length=length
            )
            own[number] = found.tolist()
    every = dict[int, list[list[int]]]()
    for theirs in peers.all_gather(own):
        every |= theirs
    return torch.tensor([window for number in range(len(parts)) for window in every[number]])


def mixed(batches: Sequence[Tensor], windows: Tensor, seed: int) -> list[Tensor]:
    """Batches, and windows [n, length] in further ones of the first's size, in an order that the seed draws."""
    every = [*batches, *windows.split(len(batches[0]))]
    return [
        every[place] for place in torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    ]


def _pieces(batches: Sequence[Tensor], count: int, length: int, generator: torch.Generator) -> Tensor:
    """So many pieces [count, length] of windows, drawn with repetition."""
    windows = [window for batch in batches for window in batch if len(window) >= length]
    places = torch.randint(len(windows), (count,), generator=generator).tolist()
    starts = torch.rand(count, generator=generator).tolist()
    pieces = list[Tensor]()
    for place, start in zip(places, starts, strict=True):
        first = int(start * (len(windows[place]) - length + 1))
        pieces.append(windows[place][first : first + length])
    return torch.stack(pieces)


@contextmanager
def _sampling(model: PreTrainedModel) -> Iterator[None]:
    """Plain sampling meanwhile, whatever a model's own settings of generation are."""
    own = model.generation_config
    eos = own.eos_token_id if own is not None else None
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=0
    )
    try:
        yield
    finally:
        model.generation_config = own
