"""Use of a mixture's experts by several texts: how often its routers choose each expert, and with what weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from optprune.calibration.stream import advance, calibrating, first_inputs
from optprune.errors import InputError
from optprune.measure.memory import release
from optprune.models import Decoder
from optprune.models.mixture import DOWN, SeparateExperts, answer_factors, experts_in, scoring
from optprune.numerics.tensors import first_output
from optprune.problems.experts import router_gates
from optprune.system.wording import either, shown

RARELY = 0.1
"""the share of an even share of the tokens below which a text does not count as a user of an expert"""
MEASURES = ("reap", "share", "weight")
"""the numbers of an expert that may be its score"""


@dataclass(frozen=True, eq=False)
class ExpertUse:
    """Sums over the tokens of a text that reach each expert of one block, in float64."""

    tokens: int
    """the tokens of the text"""
    chosen: int
    """the number of experts that the router chooses for a token"""
    counts: Float[Tensor, "experts"]
    """the tokens that the router sends to an expert"""
    weights: Float[Tensor, "experts"]
    """the sum of the weights with which the model takes the expert's outputs"""
    saliences: Float[Tensor, "experts"]
    """the sum of g_j |y_j| as in `Reap`"""

    @property
    def share(self) -> Float[Tensor, "experts"]:
        """The share of the tokens that go to each expert; the sum is the number of experts chosen for a token."""
        return self.counts / self.tokens

    @property
    def weight(self) -> Float[Tensor, "experts"]:
        """The mean routing weight over the tokens that reach an expert; 0 without any."""
        return self.weights / self.counts.clamp(min=1)

    @property
    def reap(self) -> Float[Tensor, "experts"]:
        """The score of each expert by REAP: the mean of g_j |y_j| over the tokens that reach it."""
        return self.saliences / self.counts.clamp(min=1)

    @property
    def used(self) -> Bool[Tensor, "experts"]:
        """Whether an expert gets at least a tenth of an even share of the tokens."""
        return self.share >= RARELY * self.chosen / len(self.counts)

    def with_text(self, other: "ExpertUse") -> "ExpertUse":
        """Return the use by both texts together."""
        return ExpertUse(
            self.tokens + other.tokens,
            self.chosen,
            self.counts + other.counts,
            self.weights + other.weights,
            self.saliences + other.saliences,
        )


@dataclass(frozen=True, eq=False)
class UseByText:
    """Use of the experts of every block that has some, by texts with names."""

    blocks: Mapping[int, Mapping[str, ExpertUse]]
    """the use of a block's experts, by the number of the block and by text"""

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of the texts."""
        return tuple(next(iter(self.blocks.values())))

    @property
    def experts(self) -> int:
        """The number of experts in all blocks."""
        return sum(len(next(iter(uses.values())).counts) for uses in self.blocks.values())

    def used(self, text: str) -> dict[int, list[int]]:
        """Return the experts that a text uses, by block."""
        return self._where(lambda uses: uses[text].used)

    def used_only(self, text: str) -> dict[int, list[int]]:
        """Return the experts that a text uses and no other one does, by block."""
        others = [name for name in self.texts if name != text]
        return self._where(lambda uses: uses[text].used & ~_any(uses[name].used for name in others))

    def unused(self) -> dict[int, list[int]]:
        """Return the experts that no text uses, by block."""
        return self._where(lambda uses: ~_any(use.used for use in uses.values()))

    def overlap(self, one: str, other: str) -> dict[int, float]:
        """Return the overlap of where the routers send the tokens of two texts, by block: sum_j min(p_j, q_j).

        p_j is the share of the first text's choices that fall on expert j, and q_j that of the second: 1 where both use
        the experts alike, and 0 where they share none.
        """
        return {
            block: float(torch.minimum(*(uses[text].share / uses[text].chosen for text in (one, other))).sum())
            for block, uses in self.blocks.items()
        }

    def scores(self, measure: str = "reap", text: str | None = None) -> dict[int, tuple[float, ...]]:
        """Return a score of each expert by block, as `GivenScores` takes it, of one text or of all together."""
        if measure not in MEASURES:
            raise InputError(f"the measure {shown(measure)} is not known: use {either(MEASURES)}")
        if text is not None and text not in self.texts:
            raise InputError(f"no text is called {shown(text)}: use {either(self.texts)}")
        chosen = {block: _sum(uses) if text is None else uses[text] for block, uses in self.blocks.items()}
        return {block: tuple(getattr(use, measure).tolist()) for block, use in chosen.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the shares, weights and scores of all experts as plain data."""
        return {
            "tokens": {text: use.tokens for text, use in next(iter(self.blocks.values())).items()},
            "blocks": {
                str(block): {
                    text: {measure: getattr(use, measure).tolist() for measure in MEASURES}
                    for text, use in uses.items()
                }
                for block, uses in self.blocks.items()
            },
        }

    def _where(self, mask: Callable[[Mapping[str, ExpertUse]], Tensor]) -> dict[int, list[int]]:
        found = {block: mask(uses).nonzero()[:, 0].tolist() for block, uses in self.blocks.items()}
        return {block: experts for block, experts in found.items() if experts}


def expert_use(
    decoder: Decoder,
    texts: Mapping[str, Sequence[Tensor]],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> UseByText:
    """Measure which experts of a mixture serve which text, in one pass of all texts through the dense model.

    `texts` has batches of token ids [batch, length] by name. Blocks from a store are in memory one at a time.
    `on_block` gets the number of blocks that are done, and that of all. InputError for a model without experts.
    """
    mixture, blocks = decoder.architecture.mixture, len(decoder.blocks)
    if mixture is None or not any(shape.experts for shape in decoder.shapes()):
        raise InputError(f"this {decoder.architecture.model_type} model has no experts: give a mixture of experts")
    every, found = [batch for batches in texts.values() for batch in batches], dict[int, Mapping[str, ExpertUse]]()
    names = [name for name, batches in texts.items() for _ in batches]
    with calibrating(decoder):
        stream = first_inputs(decoder, every)
        for index in range(blocks):
            on_block(index, blocks)
            with decoder.resident(index) as block:
                if decoder.shape(index).experts:
                    with _watching(decoder, block, names) as uses:
                        advance(block, stream)
                    found[index] = uses
                else:
                    advance(block, stream)
            release()
        on_block(blocks, blocks)
    return UseByText(found)


@contextmanager
def _watching(decoder: Decoder, block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, ExpertUse]]:
    """Sum up the use of a block's experts within the context, where the passes are of texts with these names."""
    mixture = decoder.architecture.mixture
    assert mixture is not None
    experts = experts_in(block, mixture)
    assert isinstance(experts, SeparateExperts)
    factors = answer_factors(block, mixture, mixture.scale(decoder.model.config)).tolist()
    uses, passing = dict[str, ExpertUse](), iter(names)
    logits, norms = list[Tensor](), dict[int, Tensor]()

    def route(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits.append(first_output(output).reshape(-1, experts.count).double())

    def answer(number: int, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        norms[number] = abs(factors[number]) * output.double().norm(dim=-1)

    def total(_: nn.Module, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        (places, weights), raw, name = args[1:], logits.pop(), next(passing)
        gates = router_gates(raw, sigmoids=bool(mixture.correction))
        sums = raw.new_zeros(3, experts.count)
        for number in range(experts.count):
            tokens, among = torch.where(places == number)
            given = weights[tokens, among].double().sum()
            sums[:, number] = torch.stack([given.new_tensor(len(tokens)), given, gates[tokens, number] @ norms[number]])
        use = ExpertUse(len(places), decoder.experts_for_a_token, *sums.cpu())
        uses[name] = uses[name].with_text(use) if name in uses else use

    handles = [
        scoring(block, mixture).register_forward_hook(route),
        experts.register_forward_hook(total),
        *(
            experts.get_submodule(f"{number}.{DOWN}").register_forward_hook(partial(answer, number))
            for number in range(experts.count)
        ),
    ]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def _sum(uses: Mapping[str, ExpertUse]) -> ExpertUse:
    first, *rest = uses.values()
    for use in rest:
        first = first.with_text(use)
    return first


def _any(masks: Iterator[Tensor]) -> Tensor:
    found = torch.tensor(False)
    for mask in masks:
        found = found | mask
    return found
