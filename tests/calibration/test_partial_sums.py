"""Partial sums: added in order by any number of processes, and equal to one pass over all batches."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from optprune.calibration import calibrating, collect_metrics, first_inputs, sampled
from optprune.calibration.calls import Wanted, calls_of, catching
from optprune.calibration.dense_statistics import DenseStatistics
from optprune.calibration.moments_pass import collect
from optprune.calibration.partial_sums import OrderedSum, PartialSums
from optprune.models import Decoder
from optprune.moments import MomentSums
from tests.helpers.thread_peers import ThreadPeers, together
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches


class Digits:
    """Sums that show how they were added: the digits of the parts, in order, if each was added to all before."""

    def __init__(self) -> None:
        self.number = torch.zeros(1, dtype=torch.int64)

    def join(self, later: "Digits") -> None:
        self.number = 10 * self.number + later.number

    def state(self) -> list[Tensor]:
        return [self.number]

    def restore(self, state: Sequence[Tensor]) -> None:
        self.number = state[0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_partial_sums_are_added_one_by_one_in_their_order(size: int) -> None:
    def add(peers: ThreadPeers) -> int:
        partial_sums = PartialSums(4, peers)
        sums = OrderedSum(partial_sums, Digits)
        for own, part in enumerate(partial_sums.numbers):
            sums.at(own).number += part + 1
        return int(sums.total().number)

    assert together(size, add) == [1234] * size


def test_the_first_process_holds_two_sums_at_a_time() -> None:
    sums, most = OrderedSum(PartialSums(6), Digits), 0
    for part in range(6):
        sums.at(part).number += 1
        most = max(most, len(sums._parts))
    assert most == 2 and int(sums.total().number) == 111111


@pytest.mark.parametrize(("total", "count"), [(6, 4), (4, 4), (7, 2), (1, 3), (0, 2)])
def test_every_batch_is_in_one_part_of_one_process(total: int, count: int) -> None:
    def mine(peers: ThreadPeers) -> list[tuple[int, int]]:
        partial_sums = PartialSums(count, peers)
        share = partial_sums.share(total)
        own = share.of(range(total))
        return [(batch, partial_sums.numbers[share.part(place)]) for place, batch in enumerate(own)]

    for size in (size for size in range(1, count + 1) if count % size == 0):
        found = [pair for part in together(size, mine) for pair in part]
        assert [batch for batch, _ in found] == list(range(total))
        partial_sums = [part for _, part in found]
        assert partial_sums == sorted(partial_sums) and all(part * total // count <= batch for batch, part in found)
        assert partial_sums == [part for _, part in mine(ThreadPeers.alone())], "whoever has them"


def test_held_out_batches_are_the_last_of_all() -> None:
    shares = together(3, lambda peers: PartialSums(3, peers).share(6))
    assert [share.apart(2, 3) for share in shares] == [0, 1, 2]


@pytest.mark.parametrize(
    ("count", "first", "fewer"), [(1, [0, 1], [0]), (2, [0, 3], [0, 3]), (5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])]
)
def test_calls_are_wanted_of_the_first_batches_of_each_part(count: int, first: list[int], fewer: list[int]) -> None:
    """Of six batches of 24 tokens each, of which the last is held out: 48 tokens, and then 24 of those."""
    decoder, wanted = Decoder(tiny_llama()), Wanted(tokens=48, apart=1)
    with calibrating(decoder):
        stream = first_inputs(decoder, batches(count=6, length=12), PartialSums(count))
        assert wanted.of(stream) == [*first, 5]
        calls = calls_of(decoder.blocks[0], "mlp", stream, wanted)
        with catching(decoder.blocks[0], ["mlp"], stream, wanted) as caught:
            collect(decoder.blocks[0], stream, ["mlp.down_proj"], to_end=True)
    fit, apart = calls.split(1)
    assert [fit.places, apart.places, fit.first(24).places] == [first, [5], fewer]
    assert [part for part, *_ in fit.each()] == [stream.share.part(batch) for batch in first]
    assert caught["mlp"].places == calls.places
    for one, other in zip(calls.targets, caught["mlp"].targets, strict=True):
        assert torch.equal(one, other)


def drawn(seed: int, tokens: int) -> Tensor:
    """Inputs of float64 with means that are large next to what varies, another one in every batch."""
    generator = torch.Generator().manual_seed(seed)
    mean = 30 * torch.randn(5, generator=generator, dtype=torch.float64)
    return mean + torch.randn(tokens, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("with_dense", [False, True])
def test_moments_of_two_parts_are_those_of_all_tokens(with_dense: bool) -> None:
    """In float64, where the rounding of sums of squares of 100 is 1e-10 at the most: no tolerance hides a term."""
    parts = [(drawn(seed, 20 + seed), drawn(10 + seed, 20 + seed) if with_dense else None) for seed in range(4)]
    whole, partial_sums = MomentSums(5, torch.device("cpu"), with_dense=with_dense), []
    for number, (inputs, dense) in enumerate(parts):
        if number % 2 == 0:
            partial_sums.append(MomentSums(5, torch.device("cpu"), with_dense=with_dense))
        whole.add(inputs, dense)
        partial_sums[-1].add(inputs, dense)
    partial_sums[0].join(partial_sums[1])
    travelled = MomentSums(5, torch.device("cpu"), with_dense=with_dense)
    travelled.restore([part.clone() for part in partial_sums[0].state()])
    for sums in (partial_sums[0], travelled):
        expected, found = whole.moments(torch.float64), sums.moments(torch.float64)
        assert found.tokens == expected.tokens
        for one, other in zip(expected.parts(), found.parts(), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_partial_sums_of_nothing_change_nothing() -> None:
    sums, empty = MomentSums(5, torch.device("cpu")), MomentSums(5, torch.device("cpu"))
    sums.add(drawn(0, 20))
    expected = sums.moments(torch.float64)
    sums.join(MomentSums(5, torch.device("cpu")))
    empty.join(sums)
    for found in (sums.moments(torch.float64), empty.moments(torch.float64)):
        assert all(torch.equal(one, other) for one, other in zip(expected.parts(), found.parts(), strict=True))


def test_moments_in_float32_differ_by_the_rounding_of_their_products() -> None:
    """A product over n tokens is off by at most n units of the sum of its absolute terms, in either order."""
    decoder, tap = Decoder(tiny_llama()), "mlp.down_proj"
    with calibrating(decoder):
        one = collect(decoder.blocks[0], first_inputs(decoder, batches()), [tap]).moments[tap]
        four = collect(decoder.blocks[0], first_inputs(decoder, batches(), PartialSums(4)), [tap]).moments[tap]
        calls = calls_of(decoder.blocks[0], tap, first_inputs(decoder, batches()))
    inputs = torch.cat([args[0].flatten(0, -2) for args, _ in calls.arguments]).double()
    spread = inputs.abs() + 2 * inputs.abs().mean(0)  # no deviation from the mean of some of them is larger
    bound = 2 * (batches()[0].numel() + 3) * torch.finfo(torch.float32).eps * spread.T @ spread / len(inputs)
    difference = (one.covariance - four.covariance).double().abs()
    assert bool((difference <= bound).all()) and bool((difference > 0).any())


def test_each_process_draws_the_labels_of_its_own_positions() -> None:
    """In float64, metrics of three processes are those of one up to rounding; other labels give others."""
    decoder, tokens = Decoder(tiny_llama().double()), batches(count=5)
    full = ("mlp.down_proj",)
    expected = collect_metrics(decoder, tokens, sampled(7), full=full)

    def measure(peers: ThreadPeers):
        own = Decoder(tiny_llama().double())
        return DenseStatistics().metrics(
            own, tokens, 7, full, 1e9, None, lambda done, total: None, PartialSums(3, peers)
        )

    for metrics in together(3, measure):
        assert list(metrics) == list(expected)
        for name, metric in metrics.items():
            assert metric.tokens == expected[name].tokens
            assert torch.allclose(metric.average, expected[name].average, rtol=1e-9, atol=1e-15), name
    assert not torch.allclose(
        collect_metrics(decoder, tokens, sampled(8), full=full)[name].average, expected[name].average, rtol=1e-3
    )
