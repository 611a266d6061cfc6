"""The entries of a parameter that may move: the others stay zero, whatever is written, however many they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optprune.problems.matching import KeptEntries


@st.composite
def parameters(draw: st.DrawFn) -> Tensor:
    """Matrices, now and then turned, with any share of zeros, and vectors."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    share = draw(st.sampled_from((0.0, 0.05, 0.15, 0.5, 0.9, 1.0)))
    matrix = torch.randn(rows, columns, generator=generator) * (torch.rand(rows, columns, generator=generator) >= share)
    return draw(st.sampled_from((matrix, matrix.T, matrix[0])))


@given(parameters())
def test_what_is_written_is_read_and_zeros_of_a_matrix_stay(parameter: Tensor) -> None:
    mask = parameter != 0 if parameter.ndim > 1 else torch.ones_like(parameter, dtype=torch.bool)
    entries = KeptEntries.of(parameter)
    before = parameter.clone()
    own = entries.read()
    assert entries.count == int(mask.sum()) and len(own) == entries.room == len(entries.zeros())
    assert torch.equal(parameter[mask], own[own != 0] if parameter.ndim > 1 else own)
    values = torch.arange(1.0, entries.room + 1)
    entries.write(values)
    assert not bool(parameter[~mask].any()) and bool((parameter[mask] != 0).all()) and entries.count_outside() == 0
    read, room = entries.read(), torch.full((entries.room,), torch.nan)
    assert torch.equal(parameter[mask], read[read != 0]) and torch.equal(read[read != 0], values[read != 0])
    assert entries.read(room) is room and torch.equal(room, read)
    assert torch.equal(entries.clear(entries.gather(parameter.clone())), read)
    entries.write(own)
    assert torch.equal(parameter, before)
    own += 1
    assert torch.equal(parameter, before)


@given(parameters())
def test_of_another_tensor_the_same_entries_are_taken(parameter: Tensor) -> None:
    entries = KeptEntries.of(parameter)
    mask = parameter != 0 if parameter.ndim > 1 else torch.ones_like(parameter, dtype=torch.bool)
    other = torch.arange(1.0, parameter.numel() + 1).reshape(parameter.shape)
    before = other.clone()
    taken = entries.gather(other)
    assert torch.equal(other, before)
    found = entries.clear(taken.clone())
    assert torch.equal(found[found != 0], other[mask])


@given(parameters())
def test_what_is_back_is_counted(parameter: Tensor) -> None:
    gone = int((parameter == 0).sum()) if parameter.ndim > 1 else 0
    entries = KeptEntries.of(parameter)
    parameter[parameter == 0] = 1.0
    assert entries.count_outside() == gone


@pytest.mark.parametrize("share", [0.01, 0.16, 0.17, 0.6])
def test_four_vectors_take_the_less_memory_of_both_ways(share: float) -> None:
    """Of what may move alone, with where it is, or of all of it, with what may not."""
    parameter = torch.ones(100, 100)
    parameter.view(-1)[: int(share * 10_000)] = 0.0
    entries = KeptEntries.of(parameter)
    zeros = int(share * 10_000)
    taken = 4 * 4 * entries.room + sum(
        places.nbytes for places in (entries.places, entries.removed) if places is not None
    )
    assert taken == min(4 * 4 * 10_000 + 4 * zeros, (4 + 1) * 4 * (10_000 - zeros))
