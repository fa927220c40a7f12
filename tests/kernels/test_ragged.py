"""Ragged batches: the worked example of the module, and concatenation against a loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa_kernels import Ragged, concat_rows


def test_worked_example_of_the_docstring() -> None:
    ragged = Ragged.from_lengths(torch.tensor([2, 0, 3]))
    assert ragged.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert ragged.cu_seqlens.dtype == torch.int32
    assert (ragged.max_seqlen, ragged.total, ragged.num_seqs) == (3, 5, 3)
    assert ragged.sequence_ids().tolist() == [0, 0, 2, 2, 2]
    _, first, second = concat_rows(ragged, Ragged.from_lengths(torch.tensor([1, 1, 1])))
    order = torch.empty(8, dtype=torch.long)
    order[torch.cat([first, second])] = torch.arange(8)
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 4, 7]


def test_uniform_is_from_lengths_of_equal_numbers() -> None:
    uniform, ragged = Ragged.uniform(3, 4), Ragged.from_lengths(torch.tensor([4, 4, 4]))
    assert torch.equal(uniform.cu_seqlens, ragged.cu_seqlens)
    assert (uniform.max_seqlen, uniform.total) == (ragged.max_seqlen, ragged.total)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6))
def test_concatenation_interleaves_the_sequences(lengths: list[tuple[int, int]]) -> None:
    first, second = (Ragged.from_lengths(torch.tensor(n)) for n in zip(*lengths, strict=True))
    both, first_rows, second_rows = concat_rows(first, second)
    packed = torch.full((both.total,), -1)
    packed[first_rows] = torch.arange(first.total)
    packed[second_rows] = 1000 + torch.arange(second.total)
    expected, a, b = [], 0, 1000
    for n, m in lengths:
        expected += [*range(a, a + n), *range(b, b + m)]
        a, b = a + n, b + m
    assert packed.tolist() == expected
    assert both.lengths().tolist() == [n + m for n, m in lengths]


def test_different_numbers_of_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 sequences"):
        concat_rows(Ragged.uniform(2, 1), Ragged.uniform(3, 1))


@pytest.mark.parametrize(
    "cu_seqlens", [torch.tensor([0, 2]), torch.zeros(4, dtype=torch.int32)[::2], torch.zeros(0, dtype=torch.int32)]
)
def test_lengths_that_a_kernel_cannot_read_are_refused(cu_seqlens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected int32 \[num_seqs \+ 1\], contiguous"):
        Ragged(cu_seqlens, 2, 2)
