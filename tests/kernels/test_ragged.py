"""Ragged batches: the worked example of the module, and lengths that are refused."""

import pytest
import torch

from fastjepa_kernels import Ragged


def test_worked_example_of_the_docstring() -> None:
    ragged = Ragged.from_lengths(torch.tensor([2, 0, 3]))
    assert ragged.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert ragged.cu_seqlens.dtype == torch.int32
    assert (ragged.max_seqlen, ragged.total, ragged.num_seqs) == (3, 5, 3)
    assert ragged.sequence_ids().tolist() == [0, 0, 2, 2, 2]


def test_uniform_equals_from_lengths_of_equal_numbers() -> None:
    uniform, ragged = Ragged.uniform(3, 4), Ragged.from_lengths(torch.tensor([4, 4, 4]))
    assert torch.equal(uniform.cu_seqlens, ragged.cu_seqlens)
    assert (uniform.max_seqlen, uniform.total) == (ragged.max_seqlen, ragged.total)


@pytest.mark.parametrize(
    "cu_seqlens", [torch.tensor([0, 2]), torch.zeros(4, dtype=torch.int32)[::2], torch.zeros(0, dtype=torch.int32)]
)
def test_lengths_that_a_kernel_cannot_read_are_refused(cu_seqlens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected int32 \[num_seqs \+ 1\], contiguous"):
        Ragged(cu_seqlens, 2, 2)


@pytest.mark.parametrize(("first", "stop", "lengths"), [(0, 4, [2, 0, 3, 1]), (1, 3, [0, 3]), (2, 2, [])])
def test_a_slice_has_the_lengths_and_rows_of_its_sequences(first: int, stop: int, lengths: list[int]) -> None:
    whole = Ragged.from_lengths(torch.tensor([2, 0, 3, 1]))
    part, rows = whole.slice(first, stop)
    assert part.lengths().tolist() == lengths
    assert part.total == sum(lengths)
    ids = whole.sequence_ids()
    assert ids[rows].tolist() == [s for s in ids.tolist() if first <= s < stop]
