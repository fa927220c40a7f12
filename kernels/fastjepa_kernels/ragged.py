"""Ragged batches: sequences of different lengths, packed one after the other without padding.

Worked example. Three sequences of 2, 0 and 3 tokens of width D are one tensor [5, D]:

    lengths      2        0        3
    rows         0 1      -        2 3 4
    cu_seqlens   [0, 2, 2, 5]              int32, one more than there are sequences
    max_seqlen   3                         on the host: kernels size their grids by it without a synchronisation
    total        5                         on the host

Sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]. Two ragged batches with the same number of sequences can be
interleaved into one (`concat_rows`): with lengths [2, 0, 3] and [1, 1, 1], sequence s of the result is sequence s of the
first followed by sequence s of the second, and the rows of the concatenation cat([first, second]) are taken in the order
[0, 1, 5, 6, 2, 3, 4, 7].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """The lengths of packed sequences, in the form that varlen kernels take."""

    cu_seqlens: Tensor
    """int32 [num_seqs + 1]: cumulative lengths, starting at 0."""
    max_seqlen: int
    """An upper bound of the lengths, on the host."""
    total: int
    """Number of packed tokens, on the host."""

    def __post_init__(self) -> None:
        cu = self.cu_seqlens
        if cu.dtype != torch.int32 or cu.ndim != 1 or len(cu) == 0 or not cu.is_contiguous():
            raise ValueError(
                f"cu_seqlens are {cu.dtype} {tuple(cu.shape)} with strides {cu.stride()}, "
                "expected int32 [num_seqs + 1], contiguous"
            )

    @property
    def num_seqs(self) -> int:
        return self.cu_seqlens.numel() - 1

    @staticmethod
    def from_lengths(lengths: Tensor) -> Ragged:
        """From lengths, integers [num_seqs]. Reads two numbers back to the host: call it where the data lies on the CPU."""
        cu_seqlens = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
        max_seqlen = int(lengths.max()) if lengths.numel() else 0
        return Ragged(cu_seqlens, max_seqlen, int(cu_seqlens[-1]))

    @staticmethod
    def uniform(num_seqs: int, length: int, device: torch.device | None = None) -> Ragged:
        """`num_seqs` sequences of the same length."""
        cu_seqlens = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * length
        return Ragged(cu_seqlens, length, num_seqs * length)

    def lengths(self) -> Tensor:
        """int64 [num_seqs]."""
        return self.cu_seqlens.diff().long()

    def sequence_ids(self) -> Tensor:
        """int64 [total]: the sequence that each packed token belongs to. No synchronisation."""
        ids = torch.arange(self.num_seqs, device=self.cu_seqlens.device)
        return torch.repeat_interleave(ids, self.lengths(), output_size=self.total)

    def slice(self, first: int, stop: int) -> tuple[Ragged, slice]:
        """Sequences first to stop - 1, and their rows in the whole. Reads two lengths: call it where they lie on the CPU."""
        cu_seqlens = self.cu_seqlens[first : stop + 1]
        begin, end = int(cu_seqlens[0]), int(cu_seqlens[-1])
        return Ragged(cu_seqlens - begin, self.max_seqlen, end - begin), slice(begin, end)

    def to(self, device: torch.device) -> Ragged:
        return Ragged(self.cu_seqlens.to(device, non_blocking=True), self.max_seqlen, self.total)


def concat_rows(first: Ragged, second: Ragged) -> tuple[Ragged, Tensor, Tensor]:
    """Concatenate two ragged batches sequence by sequence (module docstring: worked example).

    Args:
        first, second: the same number of sequences, on the same device.

    Returns:
        The lengths of the result, and where the packed rows of `first` and of `second` lie in it:
        int64 [first.total] and int64 [second.total]. No synchronisation.

    Raises:
        ValueError: the numbers of sequences differ.
    """
    if first.num_seqs != second.num_seqs:
        raise ValueError(f"concat_rows: got {first.num_seqs} and {second.num_seqs} sequences, expected as many of both")
    both = Ragged(
        first.cu_seqlens + second.cu_seqlens, first.max_seqlen + second.max_seqlen, first.total + second.total
    )
    # A row of `first` is pushed back by all earlier sequences of `second`; one of `second` by its own of `first` too.
    first_rows = torch.arange(first.total, device=first.cu_seqlens.device)
    first_rows = first_rows + second.cu_seqlens.long()[first.sequence_ids()]
    second_rows = torch.arange(second.total, device=second.cu_seqlens.device)
    second_rows = second_rows + first.cu_seqlens.long()[second.sequence_ids() + 1]
    return both, first_rows, second_rows
