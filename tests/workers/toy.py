"""One rank of test_contract: the toy objective through the real trainer, by every engine.

usage: toy RUN.yaml FOLDER

Each engine trains 8 steps without a stop, and once more from the checkpoint of step 4, as a killed run would. The test
compares the files of both, bit for bit. State buffers must be the same on all ranks.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import torch

from benchmarks.launch import ROOT
from fastjepa import distributed
from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.config.file import dump_config
from fastjepa.data import open_dataset
from fastjepa.engine.build import build_engine
from fastjepa.objectives.registry import build_objective, load_config, method_of, register
from fastjepa.run.folder import RunFolder
from fastjepa.run.stop_request import StopRequest
from fastjepa.trainer import Trainer
from tests.support.toy_objective import Toy, ToyConfig

ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")


def run(config: Config, engine_name: str) -> None:
    """Train as train.py does, from what the folder holds to the end."""
    method = method_of(config)
    sizes = BatchSizes.share(config, distributed.world_size())
    ds_config = None if engine_name == "torch" else ROOT / "configs" / f"{engine_name}.json"
    dataset = open_dataset(config.data, "train")
    assert dataset is not None
    folder = RunFolder(config.output_dir)
    if distributed.rank() == 0:
        folder.create()
        folder.write_config(dump_config(config))
    engine = build_engine(build_objective(method), method, config, sizes, torch.device("cpu"), ds_config)
    with StopRequest() as stop_request:
        Trainer(method, dataset, engine, sizes, folder).run(stop_request)
    for name, buffer in engine.model.state().items():
        everyone = distributed.gather_objects(buffer)
        assert all(torch.equal(buffer, other) for other in everyone), f"{name} differs between ranks: {everyone}"
    engine.close()


def main(recipe: str, folder: Path) -> None:
    register("toy", ToyConfig, Toy)
    distributed.init()
    for name in ENGINES:
        config = load_config(recipe, [f"output_dir={folder / name / 'whole'}"])
        run(config, name)
        resumed = folder / name / "resumed"
        if distributed.rank() == 0:  # as a kill after step 4 would leave it
            (resumed / "checkpoints").mkdir(parents=True)
            shutil.copytree(
                folder / name / "whole" / "checkpoints" / "step_00000004", resumed / "checkpoints" / "step_00000004"
            )
            (resumed / "checkpoints" / "latest").write_text("step_00000004")
        distributed.raise_together(None)
        run(dataclasses.replace(config, output_dir=str(resumed)), name)
    distributed.raise_together(None)
    distributed.finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
