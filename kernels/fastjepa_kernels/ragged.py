"""Ragged batches: sequences of different lengths, packed one after the other without padding.

Worked example. Three sequences of 2, 0 and 3 tokens of width D are one tensor [5, D]:

    lengths      2        0        3
    rows         0 1      -        2 3 4
    cu_seqlens   [0, 2, 2, 5]              int32, one more than there are sequences
    max_seqlen   3                         on the host, where it sizes the grids of kernels without a synchronisation
    total        5                         on the host

Sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1] - 1.
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
    """Upper bound of the lengths, on the host."""
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
        """Build from lengths, integers [num_seqs]. It reads two numbers back, so the lengths should lie on the CPU."""
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
        """int64 [total], the sequence that each packed token belongs to. This needs no synchronisation."""
        ids = torch.arange(self.num_seqs, device=self.cu_seqlens.device)
        return torch.repeat_interleave(ids, self.lengths(), output_size=self.total)

    def slice(self, first: int, stop: int) -> tuple[Ragged, slice]:
        """Sequences first to stop - 1, and their rows in the whole. It reads two lengths, which should lie on the CPU."""
        cu_seqlens = self.cu_seqlens[first : stop + 1]
        begin, end = int(cu_seqlens[0]), int(cu_seqlens[-1])
        return Ragged(cu_seqlens - begin, self.max_seqlen, end - begin), slice(begin, end)

    def to(self, device: torch.device) -> Ragged:
        return Ragged(self.cu_seqlens.to(device, non_blocking=True), self.max_seqlen, self.total)
