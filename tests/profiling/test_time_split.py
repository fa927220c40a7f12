"""The split of traces that are written by hand, so that it can be worked out on paper. Times are in microseconds."""

from __future__ import annotations

from typing import Any

import pytest

from fastjepa.profiling.time_split import TimeSplit, split_time

MAIN, AUTOGRAD, LOADER, GPU, NCCL = 1, 2, 3, 7, 8  # threads and streams
STAGES = ("context encoder", "target encoder", "predictor", "loss")


def span(cat: str, name: str, tid: int, start: float, end: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": start, "dur": end - start, "args": args}


def annotation(name: str, tid: int, start: float, end: float) -> dict[str, Any]:
    return span("user_annotation", name, tid, start, end)


def milliseconds(split: TimeSplit) -> dict[str, float]:
    return {part.name: part.ms for part in split.parts}


def assert_adds_up(split: TimeSplit) -> None:
    assert sum(part.ms for part in split.parts) == pytest.approx(split.step_ms)
    assert sum(part.share for part in split.parts) == pytest.approx(1)


CPU = [
    annotation("backward", MAIN, 0, 900),  # before the steps that count
    annotation("traced step", MAIN, 1000, 3000),
    annotation("traced step", MAIN, 3000, 5000),
    annotation("data wait", MAIN, 1000, 1200),
    annotation("target encoder", MAIN, 1200, 2200),
    annotation("waiting for weights", MAIN, 1300, 1500),  # within another annotation: its time counts as its own alone
    annotation("backward", MAIN, 2200, 3000),
    annotation("backward", MAIN, 3000, 4600),
    span("cpu_op", "aten::linear", MAIN, 1500, 2200),
    span("cpu_op", "aten::addmm", MAIN, 1510, 2200),
    span("cpu_op", "aten::copy_", MAIN, 1510, 1610),
    span("cpu_op", "aten::mm", MAIN, 3000, 4000),
    span("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu", MAIN, 4000, 4400),
    span("cpu_op", "aten::mm", LOADER, 3000, 4000),  # not the step's
    annotation("loader", LOADER, 500, 2000),  # half of it lies within the steps
    annotation("preparing", LOADER, 1500, 1700),
    span("cpu_op", "gloo:all_reduce", 4, 2500, 3500),
    span("cpu_op", "gloo:all_reduce", 5, 3000, 3800),
]


def test_on_a_cpu_a_part_takes_the_time_within_its_annotation() -> None:
    split = split_time(CPU, STAGES)
    assert_adds_up(split)
    assert split.step_ms == 2
    assert milliseconds(split) == pytest.approx(
        {"data wait": 0.1, "target encoder": 0.4, "waiting for weights": 0.1, "backward": 1.2, "other": 0.2}
    )
    beside = {part.name: part.ms for part in split.beside}
    assert beside == pytest.approx({"loader": 0.4, "preparing": 0.1, "communication": 0.65})


def test_on_a_cpu_operators_have_their_own_time() -> None:
    split = split_time(CPU, STAGES)
    assert {row.name: row.ms for row in split.operators} == pytest.approx(
        {
            "aten::mm": 0.5,
            "aten::addmm": 0.295,
            "aten::_scaled_dot_product_flash_attention_for_cpu": 0.2,
            "aten::copy_": 0.05,
            "aten::linear": 0.005,
        }
    )
    assert {row.calls for row in split.operators} == {0.5}
    assert {row.name for row in split.operators if row.kind == "other"} == {"aten::copy_", "aten::linear"}
    assert split.matmul_share == pytest.approx((1000 + 590 + 400) / 4000)
    assert [row.ms for row in split.operators] == sorted((row.ms for row in split.operators), reverse=True)


def launch(correlation: int, tid: int, time: float) -> dict[str, Any]:
    return span("cuda_runtime", "cudaLaunchKernel", tid, time, time + 5, correlation=correlation)


def kernel(name: str, correlation: int, start: float, end: float, stream: int = GPU, op: int = 0) -> dict[str, Any]:
    return span("kernel", name, stream, start, end, correlation=correlation, **{"External id": op})


# The host is ahead: while the kernels of a part run, it is in another part already.
ON_GPU = [
    annotation("traced step", MAIN, 0, 1000),
    annotation("context encoder", MAIN, 0, 100),
    annotation("backward", MAIN, 100, 200),
    annotation("optimizer", MAIN, 200, 300),
    annotation("data wait", MAIN, 300, 950),
    annotation("loader", LOADER, -50, 400),
    span("cpu_op", "aten::addmm", MAIN, 10, 30, **{"External id": 5}),
    launch(1, MAIN, 20),
    kernel("sm90_kernel_of_some_library", 1, 50, 250, op=5),
    launch(2, AUTOGRAD, 150),  # a thread without annotations, while the step's is in its backward pass
    kernel("_backward_keys_kernel", 2, 250, 550),
    launch(3, MAIN, 250),
    kernel("_adamw_ema_kernel", 3, 600, 700),
    launch(4, LOADER, -20),  # before the steps began
    kernel("_pack", 4, 500, 590, stream=9),
    launch(5, AUTOGRAD, 160),
    kernel("ncclDevKernel_AllReduce_Sum_bf16", 5, 500, 640, stream=NCCL),
    launch(6, MAIN, 960),  # outside of all annotations
    span("gpu_memcpy", "Memcpy DtoH", GPU, 970, 980, correlation=6),
    span("gpu_user_annotation", "context encoder", GPU, 50, 250),  # the profiler repeats annotations on the stream
]


def test_on_a_gpu_kernels_belong_to_what_launched_them() -> None:
    split = split_time(ON_GPU, STAGES)
    assert_adds_up(split)
    assert milliseconds(split) == pytest.approx(
        {
            "context encoder": 0.2,
            "backward": 0.3,
            "optimizer": 0.1,
            "communication": 0.05,  # from the end of the backward pass on; it hides the loader's kernel
            "data wait": 0.25,  # nothing ran from 700 on, and the host waited
            "other": 0.01,
            "idle": 0.09,
        }
    )
    kinds = {row.name: row.kind for row in split.operators}
    assert kinds["sm90_kernel_of_some_library"] == kinds["_backward_keys_kernel"] == "matmul"
    assert kinds["ncclDevKernel_AllReduce_Sum_bf16"] == "communication"
    assert kinds["_adamw_ema_kernel"] == kinds["_pack"] == kinds["Memcpy DtoH"] == "other"
    assert split.matmul_share == pytest.approx(0.5)
    assert {part.name: part.ms for part in split.beside} == pytest.approx({"loader": 0.4, "communication": 0.14})


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no annotation 'traced step'"):
        split_time(CPU[:1], STAGES)


def test_annotations_that_are_no_stage_of_the_method_are_not_parts() -> None:
    """Without its stage the time of the target encoder is `other`, but for what has an annotation of its own."""
    named, unnamed = (milliseconds(split_time(CPU, stages)) for stages in (STAGES, ("predictor",)))
    assert "target encoder" not in unnamed
    assert unnamed["other"] == pytest.approx(named["other"] + named["target encoder"])
    assert unnamed["waiting for weights"] == pytest.approx(named["waiting for weights"])


def test_stages_come_first_in_the_order_of_the_method() -> None:
    events = [*CPU, annotation("predictor", MAIN, 1250, 1290)]
    assert [part.name for part in split_time(events, STAGES).parts[:2]] == ["target encoder", "predictor"]
    assert [part.name for part in split_time(events, STAGES[::-1]).parts[:2]] == ["predictor", "target encoder"]
