"""The process of a test of tests/test_train.py: which tensors of training are still alive while the run is evaluated.

usage: python -m tests.workers.memory RUN.yaml FOLDER
It writes held.json there: engine -> bytes of each tensor.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

from torch import UntypedStorage

from benchmarks.proofs.bytes import storages
from fastjepa import distributed, train


def main(recipe: str, folder: Path) -> None:
    # DeepSpeed remembers groups of ranks, so that they must live as long as the process.
    distributed.finish = distributed.wait_for_gloo
    held: dict[str, list[int]] = {}
    for engine in ("torch", "zero1", "zero2", "zero3"):
        before = storages()

        def look(*_: object, engine: str = engine, before: dict[int, UntypedStorage] = before) -> None:
            # Mean and std of the pixels are kept for all runs.
            import_module("fastjepa_kernels.masked_gather")._by_channel.cache_clear()
            held[engine] = [storage.nbytes() for address, storage in storages().items() if address not in before]

        arguments = ["--config", recipe, f"output_dir={folder / engine}", "evaluate=true", "epochs=0.25"]
        if engine != "torch":
            arguments += ["--ds_config", f"configs/{engine}.json"]
        with mock.patch("fastjepa.evaluate.evaluate_run", look):
            assert train.main(arguments) == 0
    (folder / "held.json").write_text(json.dumps(held))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
