"""Killed at random moments and resumed on another number of ranks, a run sees what an uninterrupted one sees, from every
source: the same images, crops, flips, pixels and masks, each exactly once."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.workers import loader
from tests.workers.loader import GLOBAL_BATCH, STEPS

pytestmark = pytest.mark.processes

NUM_IMAGES = 50  # four steps an epoch; two images are left out of each
BAD = (7, 31)


def encoded_images() -> list[bytes]:
    """PNG and JPEG files of different sizes; two are damaged."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(NUM_IMAGES):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (40 + i % 7, 40 + i % 5), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "png" if i % 2 else "jpeg")
        images.append(file.getvalue()[:200] if i in BAD else file.getvalue())
    return images


def make_source(kind: str, folder: Path) -> str:
    images = encoded_images()
    if kind in ("folder", "list"):
        for i, data in enumerate(images):
            (folder / f"class_{i % 3}").mkdir(exist_ok=True)
            (folder / f"class_{i % 3}" / f"{i:03d}.jpg").write_bytes(data)
        if kind == "folder":
            return str(folder)
        (folder / "images.txt").write_text("".join(f"class_{i % 3}/{i:03d}.jpg\n" for i in range(NUM_IMAGES)))
        return str(folder / "images.txt")
    if kind == "shards":
        for shard in range(3):
            with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
                for i in range(shard, NUM_IMAGES, 3):
                    member = tarfile.TarInfo(f"{i:03d}.jpg")
                    member.size = len(images[i])
                    tar.addfile(member, io.BytesIO(images[i]))
        return str(folder)
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    table = pa.table({"image": [{"bytes": data, "path": None} for data in images]})
    if kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, folder / "data.parquet", row_group_size=20)
    else:
        with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=20)
    return str(folder)


class Run:
    """A run that is started on some ranks, killed, and started again."""

    def __init__(self, source: str, folder: Path) -> None:
        self._source, self._folder = source, folder
        folder.mkdir()

    def go(self, world_size: int, start_step: int, *, kill_after: int | None) -> dict[int, list[Any]]:
        """Run, and kill all ranks (SIGKILL) once one of them has done `kill_after` steps, wherever the others are.

        Returns:
            Step -> images in the order of the global batch, for the steps that all ranks did.
        """
        outputs = [self._folder / f"{start_step}_{world_size}_{rank}.jsonl" for rank in range(world_size)]
        command = [sys.executable, "-m", "tests.workers.loader", self._source]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        ranks = [
            subprocess.Popen([*command, str(output), str(rank), str(world_size), str(start_step)], env=environment)
            for rank, output in enumerate(outputs)
        ]
        deadline = time.monotonic() + 300
        while kill_after is not None and all(len(_steps(output)) < kill_after for output in outputs):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in ranks)
            time.sleep(0.01)
        for process in ranks:
            if kill_after is not None:
                process.kill()
            assert process.wait(300) == (0 if kill_after is None else -9)
        parts = [_steps(output) for output in outputs]
        done = set.intersection(*map(set, parts))
        return {step: [image for part in parts for image in part[step]] for step in sorted(done)}


def _steps(path: Path) -> dict[int, Any]:
    """What a rank wrote, step by step; its last line may be incomplete."""
    return dict(json.loads(line) for line in path.read_text().split("\n")[:-1]) if path.exists() else {}


@pytest.mark.parametrize("kind", ["folder", "list", "shards", "arrow", "parquet"])
def test_killed_and_resumed_on_other_ranks_a_run_sees_what_an_uninterrupted_one_sees(kind: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = make_source(kind, tmp_path / "source")
    loader.main(source, tmp_path / "whole.jsonl", 0, 1, 0)
    whole = _steps(tmp_path / "whole.jsonl")
    assert list(whole) == list(range(STEPS))
    run, rng, start = Run(source, tmp_path / "killed"), random.Random(kind), 0
    seen: dict[int, list[Any]] = {}
    for world_size in (3, 1):
        seen |= run.go(world_size, start, kill_after=rng.randint(1, 8))
        start = max(0, max(seen, default=-1) + 1 - rng.randint(0, 2))  # the last checkpoint may be some steps old
    seen |= run.go(2, start, kill_after=None)
    assert seen == whole

    for epoch in range(STEPS // (NUM_IMAGES // GLOBAL_BATCH)):
        first = epoch * (NUM_IMAGES // GLOBAL_BATCH)
        ids = [image[0] for step in range(first, first + 4) for image in whole[step]]
        assert len(ids) - len(set(ids)) <= len(BAD)  # each image at most once, but for those that stand in for bad ones
    names = [json.loads(line)["name"] for line in (tmp_path / "killed" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(names) == len(set(names)) == len(BAD)
