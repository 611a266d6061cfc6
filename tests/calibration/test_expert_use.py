"""Which experts serve which text: against the routers and the tensors of stock models, token by token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import optprune
from optprune.calibration import ExpertUse, UseByText, expert_use
from optprune.calibration.calls import calls_of, expert_choice
from optprune.calibration.stream import first_inputs
from optprune.errors import InputError
from optprune.models import ARCHITECTURES, Decoder
from optprune.solvers import ExpertFrequency, GivenScores, Reap
from tests.helpers.cut_mixtures import mixture_in
from tests.helpers.expert_tokens import block_of, inner, last
from tests.helpers.tiny_models import ALL_MODELS, save_tiny, tiny_llama, tiny_mixture
from tests.helpers.token_batches import batches

MIXTURES = [name for name, architecture in ARCHITECTURES.items() if architecture.mixture is not None]
TEXTS = {"one": batches()[:3], "other": batches()[3:5]}


def passes(model: PreTrainedModel, number: int, text: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each batch: the hidden states, the experts and weights of each token, and the router's output."""
    module, seen = mixture_in(model, block_of(model, number)), list[Any]()
    router = module.router if hasattr(module, "router") else module.gate
    handles = [
        router.register_forward_hook(lambda _, args, output: seen.append(output[0])),
        module.experts.register_forward_pre_hook(lambda _, args: seen.append(args)),
    ]
    with torch.no_grad():
        for batch in TEXTS[text]:
            model(input_ids=batch, use_cache=False)
            logits, (hidden, chosen, weights) = seen
            yield hidden, chosen, weights, logits
            seen.clear()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", MIXTURES)
def test_the_sums_are_those_of_a_plain_computation(name: str) -> None:
    """Of the last mixture of a stock model; gates and answers in float64 from its router's output and its tensors."""
    stock, model = ALL_MODELS[name](), ALL_MODELS[name]()
    architecture = ARCHITECTURES[name]
    described = architecture.mixture
    assert described is not None
    found = expert_use(Decoder(model), TEXTS)
    number = len(found.blocks) - 1
    for text, own in TEXTS.items():
        use = found.blocks[block_of(stock, number)][text]
        count = len(use.counts)
        counts, weights, saliences, tokens = *torch.zeros(3, count, dtype=torch.float64), 0
        for hidden, chosen, given, logits in passes(stock, number, text):
            gates = logits.double().sigmoid() if described.correction else logits.double().softmax(1)
            factor = getattr(stock.config, described.factor) if described.factor else 1.0
            tokens += len(hidden)
            for expert in range(count):
                rows = [token for token in range(len(hidden)) if expert in chosen[token].tolist()]
                bias = _last_bias(stock, expert, number)
                made = inner(stock, expert, hidden[rows], number) @ last(stock, expert, number).double().T + bias
                counts[expert] += len(rows)
                saliences[expert] += float((gates[rows, expert] * factor * made.norm(dim=1)).sum())
                weights[expert] += sum(float(given[row][chosen[row] == expert]) for row in rows)
        assert use.tokens == tokens == sum(batch.numel() for batch in own)
        assert torch.equal(use.counts, counts) and 0 < counts.sum() == use.chosen * tokens
        torch.testing.assert_close(use.weights, weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(use.saliences, saliences, rtol=1e-4, atol=1e-6)


def _last_bias(model: PreTrainedModel, expert: int, number: int) -> Tensor | float:
    bias = getattr(mixture_in(model, block_of(model, number)).experts, "down_proj_bias", None)
    return 0.0 if bias is None else bias[expert].detach().double()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_shares_are_those_of_the_router_logits_of_transformers(name: str) -> None:
    stock: Any = ALL_MODELS[name]()
    found = expert_use(Decoder(ALL_MODELS[name]()), TEXTS)
    for text, own in TEXTS.items():
        with torch.no_grad():
            every = [stock(input_ids=batch, output_router_logits=True).router_logits for batch in own]
        for block, uses in found.blocks.items():
            shares = torch.cat([logits[block] for logits in every]).double().softmax(1)
            best = shares.topk(uses[text].chosen, 1).indices
            expected = torch.stack([(best == expert).any(1).double().mean() for expert in range(shares.shape[1])])
            torch.testing.assert_close(uses[text].share, expected, rtol=1e-12, atol=0)


def check_scores_of_recipes(name: str) -> None:
    model = tiny_mixture(name)
    decoder, every = Decoder(model), [batch for own in TEXTS.values() for batch in own]
    found, mixture = expert_use(decoder, TEXTS), decoder.architecture.mixture
    assert mixture is not None
    block = next(iter(found.blocks))
    with torch.no_grad():
        calls = calls_of(decoder.blocks[block], mixture.module, first_inputs(decoder, every))
    problem = expert_choice(decoder, block, calls, 3)
    expected = Reap().score(problem)
    torch.testing.assert_close(torch.tensor(found.scores()[block]).double(), expected, rtol=1e-5, atol=1e-7)
    frequent = torch.tensor(found.scores("share")[block]).double() * problem.tokens
    torch.testing.assert_close(frequent, ExpertFrequency().score(problem), rtol=1e-6, atol=1e-6)
    assert GivenScores(found.scores("weight", "other")).refusal([shape.experts for shape in decoder.shapes()]) is None


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_scores_of_all_texts_are_those_of_the_recipes(name: str) -> None:
    check_scores_of_recipes(name)


def test_scores_of_a_router_by_sigmoids_are_those_of_the_recipes() -> None:
    check_scores_of_recipes("glm4_moe")


def test_blocks_from_files_give_the_same_numbers(tmp_path: Path) -> None:
    save_tiny(ALL_MODELS["qwen3_moe"](), tmp_path / "model")
    whole = expert_use(optprune.load_model(tmp_path / "model", device="cpu").decoder(), TEXTS)
    done = list[tuple[int, int]]()
    streamed = expert_use(
        optprune.models.open_model(tmp_path / "model", device="cpu").decoder(), TEXTS, lambda *at: done.append(at)
    )
    assert streamed.to_dict() == whole.to_dict()
    assert done == [(0, 2), (1, 2), (2, 2)]


def use(tokens: int, *counts: float) -> ExpertUse:
    sums = torch.tensor(counts, dtype=torch.float64)
    return ExpertUse(tokens, 2, sums, sums / 2, 3 * sums)


BY_HAND = UseByText(
    {
        1: {"code": use(100, 100, 90, 9, 1, 0), "news": use(50, 4, 41, 50, 1, 4)},
        2: {"code": use(100, 40, 40, 40, 40, 40), "news": use(50, 20, 20, 20, 20, 20)},
    }
)
"""five experts, two for a token: an even share is 2 in 5 of the tokens, and a tenth of it 4 in 100"""


def test_users_of_experts_by_hand() -> None:
    assert BY_HAND.used("code") == {1: [0, 1, 2], 2: [0, 1, 2, 3, 4]}
    assert BY_HAND.used_only("code") == {}
    assert BY_HAND.used_only("news") == {1: [4]}
    assert BY_HAND.unused() == {1: [3]}
    assert BY_HAND.texts == ("code", "news") and BY_HAND.experts == 10


def test_the_overlap_by_hand() -> None:
    overlap = BY_HAND.overlap("code", "news")
    assert overlap[2] == pytest.approx(1)
    assert overlap[1] == pytest.approx((4 / 50 + 41 / 50 + 9 / 100 + 1 / 100 + 0) / 2)


def test_scores_by_hand() -> None:
    assert BY_HAND.scores("share", "code")[1] == (1.0, 0.9, 0.09, 0.01, 0.0)
    assert BY_HAND.scores("share")[1] == pytest.approx((104 / 150, 131 / 150, 59 / 150, 2 / 150, 4 / 150))
    assert BY_HAND.scores("reap", "code")[1] == (3.0, 3.0, 3.0, 3.0, 0.0)
    assert BY_HAND.scores("weight", "news")[1] == (0.5,) * 5
    with pytest.raises(InputError, match="the measure 'count' is not known: use reap, share or weight"):
        BY_HAND.scores("count")
    with pytest.raises(InputError, match="no text is called 'prose': use code or news"):
        BY_HAND.scores(text="prose")


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(InputError, match="this llama model has no experts: give a mixture of experts"):
        expert_use(Decoder(tiny_llama()), TEXTS)
