"""Moments: merging, centring, dtypes, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import InputError, NumericalError
from optprune.moments import InputMoments, MomentSums
from optprune.problems import LayerLoss
from optprune.testing import laws
from optprune.testing.strategies import samples

NAN, INF = float("nan"), float("inf")


def agree(one, other, slack):
    assert one.tokens == other.tokens
    for a, b in zip(one.parts(), other.parts(), strict=True):
        assert torch.allclose(a, b, rtol=slack, atol=slack)


@given(samples(), st.data())
def test_merged_moments_are_those_of_one_pass(drawn, data):
    tokens = drawn.inputs.shape[0]
    if tokens > 1:
        laws.merging_is_one_pass(drawn.inputs, drawn.dense, data.draw(st.integers(1, tokens - 1)))


@given(samples(3), samples(3))
def test_merging_does_not_depend_on_the_order(first, second):
    if (first.dense is None) == (second.dense is None):
        one, other = first.moments(), second.moments()
        # A few roundings of averages that stay below about 100.
        agree(one.merge(other), other.merge(one), 1e-12)


@given(samples())
def test_moments_are_the_averages_they_say(drawn):
    inputs, found = drawn.inputs, drawn.moments()
    tokens = inputs.shape[0]
    ideal = inputs if drawn.dense is None else drawn.dense
    # Sums of at most 40 products of numbers below about 10.
    close = {"rtol": 1e-13, "atol": 1e-12}
    assert torch.allclose(found.gram, torch.einsum("ti,tj->ij", inputs, inputs) / tokens, **close)
    assert torch.allclose(found.mean, inputs.mean(0), **close)
    assert torch.equal(found.gram, found.gram.T)
    assert torch.equal(found.dead, (inputs == 0).all(0))
    if drawn.dense is not None:
        assert torch.allclose(found.dense.cross, torch.einsum("ti,tj->ij", ideal, inputs) / tokens, **close)
        assert torch.allclose(found.dense.gram, torch.einsum("ti,tj->ij", ideal, ideal) / tokens, **close)
        assert torch.allclose(found.dense.mean, ideal.mean(0), **close)


@given(samples())
def test_centred_moments_are_those_of_centred_samples(drawn):
    dense = None if drawn.dense is None else drawn.dense - drawn.dense.mean(0)
    expected = InputMoments.from_samples(drawn.inputs - drawn.inputs.mean(0), dense)
    found = drawn.moments().centred()
    # Centring subtracts squares of means below about 100 of each other.
    agree(found, expected, 1e-12)
    assert bool((found.gram.diagonal() >= 0).all())


@given(samples())
def test_moments_times_a_factor_are_those_of_inputs_times_it(drawn):
    dense = None if drawn.dense is None else drawn.dense * 0.25
    agree(drawn.moments().times(0.25), InputMoments.from_samples(drawn.inputs * 0.25, dense), 1e-12)


@given(samples(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_share_of_the_drift_is_that_of_dense_inputs_nearer_to_the_real_ones(drawn, share):
    dense = None if drawn.dense is None else drawn.inputs + share * (drawn.dense - drawn.inputs)
    agree(drawn.moments().with_drift(share), InputMoments.from_samples(drawn.inputs, dense), 1e-12)


@given(samples())
def test_averages_that_are_not_centred_make_the_same_moments(drawn):
    whole = drawn.moments()
    again = InputMoments.from_averages(whole.gram, whole.mean, whole.tokens, whole.dense)
    # Centring subtracts squares of means below about 100 of each other.
    agree(again, whole, 1e-12)
    assert bool((again.covariance.diagonal() >= 0).all())


def far_from_zero(tokens=4000):
    """Float32 inputs of mean 100 and deviations 0.05 to 0.1, and dense inputs 1e-5 from them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, 12, generator=generator) * torch.linspace(0.05, 0.1, 12) + 100
    centre = torch.randn(tokens, 12, generator=generator)
    return inputs, centre, centre - 1e-5 * torch.randn(tokens, 12, generator=generator)


@pytest.mark.parametrize("how", ["one batch", "batches", "merged"])
def test_means_that_are_large_next_to_deviations_leave_them_their_digits(how):
    inputs, _, _ = far_from_zero()
    exact = inputs.double() - inputs.double().mean(0)
    if how == "merged":
        found = InputMoments.from_samples(inputs[:1000]).merge(InputMoments.from_samples(inputs[1000:]))
    else:
        sums = MomentSums(12, inputs.device)
        for batch in inputs.split(len(inputs) if how == "one batch" else 500):
            sums.add(batch)
        found = sums.moments()
    assert found.covariance.dtype == torch.float32
    # Four digits of the least variance, where averages of squares of 100 know none.
    expected = exact.T @ exact / len(exact)
    assert float((found.covariance.double() - expected).abs().max()) < 1e-4 * float(expected.diagonal().min())
    assert float((found.mean.double() - inputs.double().mean(0)).abs().max()) < 1e-5
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    loss = LayerLoss.of(weight, found, fit_bias=True)
    literal = float((exact @ weight.double().T).square().sum(1).mean()) / 2
    assert loss.value(torch.zeros_like(weight)) == pytest.approx(literal, rel=1e-4)


def test_dense_inputs_close_to_the_others_leave_their_difference_its_digits():
    _, inputs, dense = far_from_zero()
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    for fit_bias in (False, True):
        loss = LayerLoss.of(weight, InputMoments.from_samples(inputs, dense), fit_bias=fit_bias)
        error = (inputs.double() - dense.double()) @ weight.double().T
        error = error - error.mean(0) if fit_bias else error
        assert loss.value(weight) == pytest.approx(float(error.square().sum(1).mean()) / 2, rel=1e-4)
        outputs = inputs.double() - inputs.double().mean(0) if fit_bias else inputs.double()
        pull = error.T @ outputs / len(inputs)
        assert float((loss.pull.double() - pull).abs().max()) < 1e-4 * float(pull.abs().max())


@given(samples(2), st.integers(1, 4))
def test_batches_of_any_shape_add_up(drawn, size):
    sums = MomentSums(2, drawn.inputs.device, with_dense=drawn.dense is not None)
    for start in range(0, drawn.inputs.shape[0], size):
        part = slice(start, start + size)
        # With a batch dimension of one, as a model passes them.
        sums.add(drawn.inputs[part][None], None if drawn.dense is None else drawn.dense[part][None])
    agree(sums.moments(torch.float64), drawn.moments(), 1e-12)


def test_constant_inputs_have_no_variance():
    moments = InputMoments.from_samples(torch.full((7, 2), 0.1)).centred()
    assert bool((moments.gram.diagonal() >= 0).all())
    # float32 rounding of the square 0.01
    assert float(moments.gram.abs().max()) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_dtypes_are_averaged_in_float32(dtype):
    inputs = torch.tensor([[1.0, 2.0], [3.0, 5.0], [4.0, -1.0]]).to(dtype)
    moments = InputMoments.from_samples(inputs)
    assert all(part.dtype == torch.float32 for part in moments.parts())
    # These integers are exact in every dtype, so only the division rounds.
    assert torch.allclose(moments.gram, inputs.double().T.matmul(inputs.double()).float() / 3, rtol=1e-6)


def test_float64_sums_keep_what_float32_sums_lose():
    # 2^24 + 1 is not a float32: a sum kept in float32 would stay at 2^24.
    sums = MomentSums(1, torch.device("cpu"))
    sums.add(torch.tensor([[4096.0]]))
    for _ in range(8):
        sums.add(torch.tensor([[1.0]]))
    assert float(sums.moments(torch.float64).gram) * 9 == 2**24 + 8


def test_to_changes_dtype_of_every_part():
    samples64 = torch.eye(2, dtype=torch.float64)
    moments = InputMoments.from_samples(samples64, samples64).to(torch.float32)
    assert {part.dtype for part in moments.parts()} == {torch.float32}
    assert moments.tokens == 2


def test_moments_with_and_without_dense_inputs_do_not_mix():
    plain = InputMoments.from_samples(torch.eye(2))
    both = InputMoments.from_samples(torch.eye(2), torch.eye(2))
    with pytest.raises(InputError, match="cannot be merged"):
        plain.merge(both)
    sums = MomentSums(2, torch.device("cpu"), with_dense=True)
    with pytest.raises(InputError, match="every batch"):
        sums.add(torch.eye(2))


# A width of one would be broadcast without a word.
@pytest.mark.parametrize("width", [1, 3])
def test_moments_of_different_widths_do_not_mix(width):
    with pytest.raises(InputError, match=f"moments of 2 and of {width} inputs cannot be merged"):
        InputMoments.from_samples(torch.eye(2)).merge(InputMoments.from_samples(torch.eye(width)))


def test_no_tokens_is_an_error():
    with pytest.raises(InputError, match="no calibration tokens"):
        MomentSums(2, torch.device("cpu")).moments()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", range(5))
def test_check_refuses_what_is_not_finite_in_any_part(bad, where):
    moments = InputMoments.from_samples(torch.eye(2), torch.eye(2))
    moments.check()
    moments.parts()[where].view(-1)[0] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        moments.check()


def test_check_refuses_a_negative_mean_square():
    gram = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    with pytest.raises(NumericalError, match="negative diagonal"):
        InputMoments(gram, torch.zeros(2), 5).check()


def test_a_sum_that_rounding_left_uneven_has_a_symmetric_average() -> None:
    """Products of some sizes and machines are; here the entries of the first row and column differ by 6."""
    sums = MomentSums(5, torch.device("cpu"))
    sums.add(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    before, state = sums.moments(torch.float64).covariance, sums.state()
    state[1][1:5] += 6.0
    sums.restore(state)
    found = sums.moments(torch.float64).covariance
    assert torch.equal(found, found.T)
    assert torch.allclose(found[0, 1:], before[0, 1:] + 6.0 / 60)
    assert torch.equal(found[1:, 1:], before[1:, 1:])


def test_moments_of_inputs_with_gradients_hold_no_graph():
    inputs = torch.randn(9, 4, requires_grad=True)
    assert not InputMoments.from_samples(inputs, 2 * inputs).gram.requires_grad


def test_directions_are_counted_once_whatever_repeats_and_how_large_inputs_are():
    generator = torch.Generator().manual_seed(0)
    distinct = (torch.randn(20, 64, generator=generator) + 2) * torch.logspace(-3, 3, 64)
    distinct[:, 7] = 0
    repeated = distinct.repeat(50, 1)
    found = InputMoments.from_samples(repeated)
    assert found.directions() == (20, 63), "of inputs in any units, without the one that is zero on every token"
    assert found.directions(16) == (16, 16) == InputMoments.from_samples(distinct).directions(16)
    parts = [InputMoments.from_samples(part) for part in repeated.split([7, 400, 593])]
    assert parts[0].directions() == (7, 63)
    assert parts[0].merge(parts[1]).merge(parts[2]).directions() == (20, 63)
    assert parts[2].merge(parts[0]).merge(parts[1]).directions() == (20, 63)
    constant = InputMoments.from_samples(distinct[:1].repeat(1000, 1))
    assert constant.directions() == (1, 63)
    assert InputMoments.from_samples(torch.zeros(3, 8)).directions() == (0, 0)
    full = torch.randn(4096, 64, generator=generator) + 30 * torch.randn(4096, 1, generator=generator)
    assert InputMoments.from_samples(full).directions() == (64, 64), "one large direction hides none of the others"
