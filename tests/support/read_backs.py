"""Count, on a CPU, the operations for which the host would wait if the tensors were on a GPU."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAIT = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_unique2",
        "equal",
        "lift_fresh",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    )
}
_INDEX = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class ReadBacks(TorchDispatchMode):
    """A mode that counts, by the file that calls them, operations for which a GPU's host waits.

    These are values read back, constants sent to the device, and results whose sizes depend on values.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_file: Counter[str] = Counter()
        """Counts by the last folder and the name of a file: engine/base.py."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.name(), kwargs or {}
        waits = name in _WAIT
        if name in _INDEX:
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        elif name.startswith("aten::repeat_interleave"):
            waits = kwargs.get("output_size") is None
        if waits:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename and frame.f_back:
                frame = frame.f_back
            self.by_file["/".join(Path(frame.f_code.co_filename).parts[-2:])] += 1
        return func(*args, **kwargs)
