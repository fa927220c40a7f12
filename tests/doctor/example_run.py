"""A run with made-up figures, and the one finding of a judgement, for the tests of the doctor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fastjepa.config import Config, ModelConfig
from fastjepa.doctor.diagnosis import Finding
from fastjepa.doctor.limits import Rate, Run
from fastjepa.host import GIB
from fastjepa.objectives.ijepa.settings import IJEPAConfig


def example_run(**changes: Any) -> Run:
    """A run on a GPU whose loader keeps up: 4 threads deliver 1,000 images/s, the step trains 480."""
    config = Config(
        model=ModelConfig(name="vit_small"), objective=IJEPAConfig(), global_batch_size=256, micro_batch_size=64
    )
    run = Run(
        config=config, stage="torch", ranks=1, gpu=True, bf16=True, bf16_is_fast=True, cores=16.0, memory=70.0 * GIB,
        loader={4: Rate(1000.0, 0.004), 8: Rate(1900.0, 0.004)}, step={64: Rate(480.0, 0.001)},
    )  # fmt: skip
    return replace(run, **changes)


def only(findings: Iterable[Finding]) -> Finding:
    """The one finding, which must come with advice unless it is ok."""
    (finding,) = findings
    assert finding.level == "ok" or finding.advice
    return finding
