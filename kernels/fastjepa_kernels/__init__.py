"""The operations that fastjepa is made of, each behind one public function. Nothing here knows the trainer.

An operation has one file with its contract, its checks and its PyTorch path; its Triton kernels are in the file of the
same name in `triton_kernels`, and its plain twin, which tests compare against, is in `reference`. `selection` lists the
operations with their implementations and chooses by device and dtype which one runs, unless one is requested (`request`,
or the environment variable FASTJEPA_KERNELS). As with all Triton kernels, CUDA tensors must lie on the current device.
"""

from fastjepa_kernels.adamw_ema import adamw_ema_
from fastjepa_kernels.block_attention import block_attention, block_attention_packed
from fastjepa_kernels.linear import linear
from fastjepa_kernels.mask_sampling import mask_sampling
from fastjepa_kernels.masked_gather import gather_add, gather_patches, masked_gather, patchify
from fastjepa_kernels.masks import MaskRules, PackedMasks
from fastjepa_kernels.ragged import Ragged
from fastjepa_kernels.selection import OPERATIONS, Operation, choose, implementations, request, without_requests
from fastjepa_kernels.target_loss import target_loss

__all__ = [
    "OPERATIONS",
    "MaskRules",
    "Operation",
    "PackedMasks",
    "Ragged",
    "adamw_ema_",
    "block_attention",
    "block_attention_packed",
    "choose",
    "gather_add",
    "gather_patches",
    "implementations",
    "linear",
    "mask_sampling",
    "masked_gather",
    "patchify",
    "request",
    "target_loss",
    "without_requests",
]
