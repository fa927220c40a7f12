"""The whole examination on the outcomes of fake probes: what it finds, and what it suggests."""

from __future__ import annotations

from typing import Any

import pytest

from fastjepa.doctor import __main__ as doctor
from fastjepa.doctor.probe_process import Outcome


def change(outcomes: dict[str, Outcome], name: str, **changes: Any) -> None:
    outcomes[name] = Outcome({**outcomes[name].result, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "arguments", "message"),
    [
        ("loader", {"problem": "data.source = /x: No such file", "images": 0, "rates": {}}, [], "No such file"),
        ("loader", {"images": 50}, [], "global_batch_size = 64: the data set has 50 images"),
        ("kernels", {"operations": [{"operation": "a", "head_dim": 0, "problem": "it"}]}, [], "ask for one that is"),
        ("dali", {}, ["data.loader=dali"], "decode on the CPU with data.loader=turbo"),
        ("pytorch", {"import_problem": "ModuleNotFoundError: No module named 'yaml'"}, [], "cannot be imported"),
        ("pytorch", {}, ["--ranks", "3"], "a global batch of 64 images cannot be divided among 3 ranks"),
        (
            "pytorch",
            {},
            ["micro_batch_size=48"],
            "the 64 images of each rank cannot be divided into micro batches of 48",
        ),
        ("pytorch", {}, ["output_dir=/proc/run"], "PROBLEM output_dir /proc"),
    ],
)
def test_whatever_would_stop_the_run_is_a_problem(
    fake_probes: dict[str, Outcome],
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    change(fake_probes, name, **changes)
    assert doctor.main(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert message in printed
    assert "PROBLEM" in printed


def test_a_model_that_does_not_fit_gets_a_smaller_micro_batch(
    fake_probes: dict[str, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    change(
        fake_probes, "pytorch", gpus=[{"name": "GPU", "capability": [8, 0], "memory": 12 * 2**30, "free": 12 * 2**30}]
    )
    huge = [
        "model.name=vit_base",
        "model.embed_dim=768",
        "model.depth=12",
        "data.image_size=224",
        "model.patch_size=14",
    ]
    assert doctor.main([*huge, "global_batch_size=512"]) == 1
    printed = capsys.readouterr().out
    assert "limited by memory: a micro batch of 512 images needs" in printed
    assert "micro_batch_size: " in printed


@pytest.mark.parametrize(("spread", "suggested"), [(0.0, True), (9.0, False)])
def test_dali_is_suggested_only_if_it_decodes_correctly(
    fake_probes: dict[str, Outcome], capsys: pytest.CaptureFixture[str], spread: float, suggested: bool
) -> None:
    change(fake_probes, "pytorch", gpus=[{"name": "GPU", "capability": [8, 0], "memory": 2**36, "free": 2**36}])
    fake_probes["dali"] = Outcome({"problem": None, "device": "cuda", "difference": 0.1, "spread": spread})
    doctor.main(["data.loader=turbo"])
    assert ("data.loader=auto: DALI works here" in capsys.readouterr().out) == suggested


def test_a_run_whose_kernels_do_not_work_is_not_trained_to_measure_it(
    fake_probes: dict[str, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_probes["kernels"] = Outcome({}, "ended by signal SIGSEGV: it printed nothing")
    del fake_probes["step"]
    assert doctor.main([]) == 1
    assert "the step could not be measured. See the problems above" in " ".join(capsys.readouterr().out.split())
