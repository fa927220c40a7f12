"""The operations that fastjepa is made of, each behind one public function; nothing here knows the trainer.

Today every operation runs on PyTorch, chosen per device and dtype by `_backend`; Triton kernels take their places behind
the same functions. `reference` holds the plain twin of each, which tests compare against.
"""

from fastjepa_kernels.adamw_ema import adamw_ema_
from fastjepa_kernels.block_attention import block_attention
from fastjepa_kernels.masked_gather import masked_gather, patchify
from fastjepa_kernels.ragged import Ragged, concat_rows

__all__ = ["Ragged", "adamw_ema_", "block_attention", "concat_rows", "masked_gather", "patchify"]
