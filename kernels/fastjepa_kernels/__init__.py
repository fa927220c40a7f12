"""The operations that fastjepa is made of, each behind one public function; nothing here knows the trainer.

Every operation has several implementations: Triton kernels (`_triton`), PyTorch, and packages that may be installed. The one
that runs is chosen by device and dtype (`choose`), or asked for (`request`, or the environment variable FASTJEPA_KERNELS).
As with all Triton kernels, CUDA tensors must lie on the current device.
`reference` holds the plain twin of each, which tests compare against.
"""

from fastjepa_kernels._backend import choose, implementations, no_wishes, request
from fastjepa_kernels.adamw_ema import adamw_ema_, ema_
from fastjepa_kernels.block_attention import block_attention, block_attention_packed
from fastjepa_kernels.linear import linear
from fastjepa_kernels.mask_sampling import MaskRules, PackedMasks, mask_sampling
from fastjepa_kernels.masked_gather import gather_add, gather_patches, masked_gather, patchify
from fastjepa_kernels.ragged import Ragged, concat_rows
from fastjepa_kernels.target_loss import target_loss

__all__ = [
    "MaskRules",
    "PackedMasks",
    "Ragged",
    "adamw_ema_",
    "block_attention",
    "block_attention_packed",
    "choose",
    "concat_rows",
    "ema_",
    "gather_add",
    "gather_patches",
    "implementations",
    "linear",
    "mask_sampling",
    "masked_gather",
    "no_wishes",
    "patchify",
    "request",
    "target_loss",
]
