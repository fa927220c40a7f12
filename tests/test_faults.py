"""Faults of clusters in tiny runs: signals, kills, hangs, losses of NaN, damaged checkpoints, two runs in one folder."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.launch import ROOT, launch
from benchmarks.proofs.equality import FP32_BOUND, full_state, relative_errors, trajectory_config
from fastjepa import distributed
from fastjepa.checkpoint.format import latest, load_weights
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.errors import Preempted
from fastjepa.run.folder import RunFolder
from fastjepa.run.watchdog import EXIT_STATUS
from fastjepa.train import main
from tests.support.reliability import Record, survive_kills
from tests.support.small import engine_of, small_batch
from tests.support.tiny_run import at_step, ended, metrics, start, write_recipe
from tests.workers import other_ranks

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_recipe(tmp_path_factory.mktemp("recipe"), "epochs: 4  # 32 steps")


@pytest.fixture(scope="module")
def uninterrupted(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted")
    assert main(["--config", recipe, f"output_dir={run}"]) == 0
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = latest(run / "checkpoints")
    assert newest is not None
    assert newest.name == "step_00000032"
    parts = ("context_encoder", "target_encoder", "predictor")
    return {f"{part}.{name}": w for part in parts for name, w in load_weights(newest, part).items()}


def assert_same_end(run: Path, expected: Path) -> None:
    mine, theirs = weights(run), weights(expected)
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    assert metrics(run, "step", "loss") == metrics(expected, "step", "loss")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_in_a_checkpoint_and_a_status_for_queueing_again(
    name: str, recipe: str, uninterrupted: Path, tmp_path: Path, record: Record
) -> None:
    arguments = ["--config", recipe, f"output_dir={tmp_path}"]
    fault = at_step(9, f"os.kill(os.getpid(), signal.{name})")
    ((status, message),) = ended(start(fault, arguments))
    assert status == Preempted.exit_status == 75, message
    assert f"fastjepa: stopped: {name}: stopped after step 10" in message
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000010"
    assert main(arguments) == 0
    assert_same_end(tmp_path, uninterrupted)
    record(
        f"{name} in step 10", f"checkpoint of step 10, exit status {status}; resumed: equal to the last bit", "nothing"
    )


def test_a_signal_to_one_rank_stops_all_after_the_same_step(recipe: str, tmp_path: Path, record: Record) -> None:
    arguments = ["--config", recipe, f"output_dir={tmp_path}"]
    fault = at_step(9, "os.kill(os.getpid(), signal.SIGUSR1)", rank=1)
    results = ended(start(fault, arguments, world=2))
    assert [status for status, _ in results] == [75, 75], results
    assert "SIGUSR1: stopped after step 11" in results[0][1]
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000011"
    record("SIGUSR1 to one of two ranks, in step 10", "both stopped after step 11, exit status 75", "nothing")


@pytest.mark.parametrize("where", ["trainer.resume", "evaluate.evaluate_run"])
def test_a_signal_before_or_after_training_ends_with_the_status_for_queueing_again(
    where: str, recipe: str, tmp_path: Path, record: Record
) -> None:
    arguments = ["--config", recipe, f"output_dir={tmp_path}", "evaluate=true", "epochs=1"]
    fault = f"""
from fastjepa import evaluate, trainer
def signalled(*arguments):
    os.kill(os.getpid(), signal.SIGUSR1)
{where} = signalled
"""
    ((status, message),) = ended(start(fault, arguments))
    assert status == Preempted.exit_status
    assert message.splitlines()[-1].startswith("fastjepa: stopped: SIGUSR1: stopped outside of training."), message
    assert main(arguments) == 0
    assert metrics(tmp_path, "step")[-1] == [8]
    record(f"SIGUSR1 during {where.rpartition('.')[2]}", f"exit status {status}", "nothing")


def test_an_error_of_one_rank_is_shown_and_ends_all_ranks_even_if_the_group_cannot_be_closed(
    recipe: str, tmp_path: Path, record: Record
) -> None:
    fault = at_step(9, "raise ValueError('of this rank alone')", rank=1)
    fault += "distributed.finish = lambda: time.sleep(300)"  # as NCCL's does, which waits for the other ranks
    alone, other = reversed(ended(start(fault, ["--config", recipe, f"output_dir={tmp_path}"], world=2)))
    assert alone[0] == 1
    assert "ValueError: of this rank alone" in alone[1]
    assert other[0] == 1
    assert "fastjepa: error (rank 0): lost contact with the other ranks" in other[1].splitlines()[-1]
    record(
        "an exception in one rank of two, whose process group cannot be closed",
        "that rank ended with its traceback and status 1; the other one lost contact, and ended with status 1 and one line",
        "the steps since the last checkpoint",
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_and_the_next_one_goes_on(
    rank: int, recipe: str, tmp_path: Path, record: Record
) -> None:
    # Not in the background, where the save of step 8 may or may not be complete in step 10.
    arguments = ["--config", recipe, f"output_dir={tmp_path}", "async_checkpoint=false"]
    processes = start(at_step(9, "os.kill(os.getpid(), signal.SIGKILL)", rank=rank), arguments, world=2)
    results = ended(processes)
    assert results[rank][0] == -signal.SIGKILL
    status, message = results[1 - rank]
    assert status == 1
    where, _, line = message.splitlines()[-1].partition(": lost contact ")
    assert where == f"fastjepa: error (rank {1 - rank})", message
    assert re.fullmatch(
        r"with the other ranks \([^/]+\): the cause is in the first error above, or in their logs", line
    )
    assert "Traceback" not in message
    assert ".cc:" not in message
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000008"
    assert all(status == 0 for status, _ in ended(start("", arguments, world=2)))
    assert [step for (step,) in metrics(tmp_path, "step")] == list(range(1, 33))
    record(
        f"kill -9 of rank {rank} of two in step 10, checkpoints every 4 steps",
        f"the other rank ended with status {status} and one line, without a traceback; resumed from step 8",
        "one step, trained again",
    )


def seen(run: Path) -> dict[int, list[Any]]:
    """Read what the steps saw: step -> identity, crop, pixels and masks of each image of the global batch."""
    steps: dict[int, list[Any]] = {}
    for path in sorted(run.glob("seen_*.jsonl")):
        for step, images in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(step, []).extend(images)
    return steps


def test_a_run_continues_on_another_number_of_ranks_and_with_another_zero_stage(
    recipe: str, tmp_path: Path, record: Record
) -> None:
    """What each step sees and its schedule are exactly equal. Weights differ by the order of sums, within the bound of
    benchmarks.proofs.equality."""
    calm, moved = tmp_path / "calm", tmp_path / "moved"
    other_ranks.go_on(recipe, calm, stage=None, signal_in_step=None)
    other_ranks.go_on(recipe, moved, stage=None, signal_in_step=5)
    launch("tests.workers.other_ranks", 2, recipe, str(moved))
    other_ranks.go_on(recipe, moved, stage=None, signal_in_step=None)
    shards = {path.name: len(list(path.glob("rank_*"))) for path in (moved / "checkpoints").glob("step_*")}
    one, two = (4, 6, 24, 28, 32), (8, 12, 14, 16, 20, 22)  # the signals stopped it at 6, 14 and 22
    assert shards == {f"step_{step:08d}": 1 for step in one} | {f"step_{step:08d}": 2 for step in two}
    assert seen(moved) == seen(calm)
    assert list(seen(calm)) == list(range(32))
    exact = ("step", "lr", "weight_decay", "ema_momentum", "context_tokens", "target_tokens")
    assert metrics(moved, *exact) == metrics(calm, *exact)
    assert np.array(metrics(moved, "loss")) == pytest.approx(np.array(metrics(calm, "loss")), rel=FP32_BOUND)
    error = max(relative_errors(weights(moved), weights(calm)).values())
    assert 0 < error < FP32_BOUND
    record(
        "one run: plain PyTorch on one rank, ZeRO 2 on two, ZeRO 3 on two, plain PyTorch on one; 32 steps, fp32",
        "images, crops, masks, learning rate and EMA momentum of every step as in an undisturbed run; weights and EMA "
        f"within {error:.0e} of it (relative, by norm, of the worst parameter)",
        "nothing",
    )


def in_a_save(step: int, action: str, rank: int = 0) -> str:
    """Return code that runs `action` on one rank, in the thread that writes the checkpoint of a step, half way through."""
    return f"""
from fastjepa.checkpoint import writer as checkpoint_writer
write_shard = checkpoint_writer._write_shard
def write(path, snapshot):
    if snapshot.state.step == {step} and distributed.rank() == {rank}:
        path.write_bytes(bytes(1000))
        {action}
    return write_shard(path, snapshot)
checkpoint_writer._write_shard = write
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_a_background_save_ends_the_run_and_leaves_the_checkpoint_before_it_whole(
    rank: int, recipe: str, uninterrupted: Path, tmp_path: Path, record: Record
) -> None:
    arguments = ["--config", recipe, f"output_dir={tmp_path}"]
    zero = ["--ds_config", str(ROOT / "configs" / "zero2.json")]  # both ranks write
    fault = in_a_save(8, "os.kill(os.getpid(), signal.SIGKILL)", rank=rank)
    results = ended(start(fault, [*zero, *arguments], world=2))
    assert results[rank][0] == -signal.SIGKILL
    status, message = results[1 - rank]
    assert status == 1, message
    last = message.splitlines()[-1]
    assert last.startswith(f"fastjepa: error (rank {1 - rank}): lost contact with the other ranks"), message
    assert "Traceback" not in message
    folder = tmp_path / "checkpoints"
    assert latest(folder) == folder / "step_00000004"
    assert [path.name for path in folder.glob(".*")] == [".step_00000008.tmp"]
    assert main(arguments) == 0
    assert [step for (step,) in metrics(tmp_path, "step")] == list(range(1, 33))
    assert not list(folder.glob(".*"))
    record(
        f"kill -9 of rank {rank} of two, in the middle of its share of the background save of step 8 (ZeRO 2)",
        f"the other rank ended with status {status} and one line; the next start, on one rank, went on from step 4",
        "the steps since the last checkpoint",
    )


def test_a_save_that_hangs_does_not_keep_a_failed_run_alive(recipe: str, tmp_path: Path, record: Record) -> None:
    fault = in_a_save(4, "time.sleep(300)") + at_step(5, "raise torch.OutOfMemoryError('no memory')")
    ((status, message),) = ended(start(fault, ["--config", recipe, f"output_dir={tmp_path}", "hang_timeout=3"]))
    assert status == EXIT_STATUS, message
    assert "error (rank 0): no progress for 3 s" in message
    assert re.search(r"checkpointer\.py.* in wait", message), message
    assert latest(tmp_path / "checkpoints") is None
    record(
        "a background save that hangs, in a run that runs out of memory, hang_timeout=3",
        f"status {status}, with the stacks of the save and of what waits for it",
        "the steps since the last checkpoint",
    )


def test_a_rank_that_hangs_is_named_with_its_place_in_the_run(recipe: str, tmp_path: Path, record: Record) -> None:
    """Rank 1 stands still; rank 0 waits for it in its step, and ends the run."""
    arguments = ["--config", recipe, f"output_dir={tmp_path}", "hang_timeout=4"]
    processes = start(at_step(9, "os.kill(os.getpid(), signal.SIGSTOP)", rank=1), arguments, world=2)
    try:
        message = processes[0].communicate(timeout=100)[1]
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == EXIT_STATUS
    assert "error (rank 0): no progress for 4 s" in message
    assert re.search(r"Least far: rank 1: (starting|step \d.*) \(process \d+ on ", message), message
    assert "micro_step" in message  # in the stack of the rank that waits
    behind = message.partition("Least far: ")[2].partition(" (process")[0]
    record(
        "a rank of two that stands still (SIGSTOP), hang_timeout=4",
        f"status {EXIT_STATUS}, and the line: least far: {behind}",
        "the steps since the last checkpoint",
    )


@contextmanager
def bad_loss(steps: set[int], rank: int = 0, value: str = "nan") -> Iterator[None]:
    """Make the objective's loss `value` in some of its calls (counted from 0), on one rank."""
    from fastjepa.objectives.ijepa.objective import IJEPAObjective

    plain, calls = IJEPAObjective.loss, iter(range(10**6))

    def loss(self: IJEPAObjective, *tensors: torch.Tensor) -> torch.Tensor:
        result = plain(self, *tensors)
        return result + float(value) if next(calls) in steps and distributed.rank() == rank else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IJEPAObjective, "loss", loss)
        yield


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_step_that_is_not_finite_changes_nothing(value: str) -> None:
    config = trajectory_config(micro=2, clip_grad=0.1)
    sizes = BatchSizes.share(config, world_size=1)
    engine = engine_of(config, sizes, torch.device("cpu"))
    batch = small_batch(config, sizes.micro)
    with bad_loss({2, 5}, value=value):  # one micro batch of two, in steps 1 and 2
        for step in range(4):
            before, updates = full_state(engine), engine.optimizer.updates
            for _ in range(sizes.accum):
                engine.micro_step(batch)
            changed = any(not torch.equal(w, before[name]) for name, w in full_state(engine).items())
            assert changed == (step in (0, 3))
            assert engine.optimizer.updates == updates + int(changed)
            assert engine.skipped_in_a_row() == {0: 0, 1: 1, 2: 2, 3: 0}[step]


def test_every_engine_skips_a_bad_step_of_one_rank_on_all_ranks(tmp_path: Path, record: Record) -> None:
    launch("tests.workers.skipped", 2, str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    engines = ("torch", "zero0", "zero1", "zero2", "zero3")
    assert list(results) == [f"{name} {precision}" for name in engines for precision in ("fp32", "bf16")]
    # "counts": after each of the four steps, of which the second and third are bad, updates and steps skipped in a row.
    # "changed": for each of the last three steps, whether it has changed anything since the first one.
    expected = {"counts": [[1, 0], [1, 1], [1, 2], [2, 0]], "changed": [False, False, True]}
    for name, ranks in results.items():
        assert ranks == [expected] * 2, name
    record(
        f"a loss of NaN in one micro batch of two on one rank of two; {', '.join(engines)}; fp32, bf16",
        "weights, moments and EMA of both ranks unchanged by the step, to the last bit",
        "the step",
    )


def test_skipped_steps_are_counted_and_end_the_run_when_there_are_too_many(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], record: Record
) -> None:
    arguments = ["--config", recipe, f"output_dir={tmp_path}", "max_skipped_steps=3"]
    with bad_loss({2, 5, 6, 9, 10, 11, 12, 13, 14}):
        assert main(arguments) == 2
    assert [count for (count,) in metrics(tmp_path, "skipped_steps")][:9] == [0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert metrics(tmp_path, "loss")[2] == [None]
    message = capsys.readouterr().err.splitlines()[-1]
    assert "not finite in 3 steps in a row, by step 12" in message
    assert f"{tmp_path / 'skipped_steps.jsonl'} has the losses and the samples" in message
    named = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rank"], line["loss"], len(line["samples"])) for line in named] == [
        (step, 0, "nan", 8) for step in (6, 9, 10, 11)
    ]
    assert all(name.endswith(".png") for line in named for name in line["samples"])
    # There is no checkpoint of step 12, whose last steps were bad.
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000008"
    record(
        "losses of NaN in a row, max_skipped_steps=3",
        f"stopped; skipped_steps.jsonl names the {sum(len(line['samples']) for line in named)} samples of the skipped steps",
        "the steps since the last checkpoint",
    )


def test_skipped_steps_between_two_checks_count(recipe: str, tmp_path: Path) -> None:
    with bad_loss({7, 8, 9, 10, 11}):  # checked at 10, after three of them, and at 15, after three good steps
        assert main(["--config", recipe, f"output_dir={tmp_path}", "max_skipped_steps=5", "log_interval=40",
                     "checkpoint_interval=40"]) == 2  # fmt: skip
    named = [json.loads(line)["step"] for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert named == [7, 8, 9, 10, 11]


def test_a_preemption_right_after_a_skipped_step_writes_a_checkpoint(recipe: str, tmp_path: Path) -> None:
    arguments = ["--config", recipe, f"output_dir={tmp_path}"]
    fault = at_step(
        9, "os.kill(os.getpid(), signal.SIGUSR1); batch = replace(batch, images=batch.images * float('nan'))"
    )
    ((status, message),) = ended(start(fault, arguments))
    assert status == Preempted.exit_status, message
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000010"
    assert metrics(tmp_path, "skipped_steps")[-1] == [1]


def test_two_runs_in_one_folder_are_refused(recipe: str, tmp_path: Path, record: Record) -> None:
    arguments = ["--config", recipe, f"output_dir={tmp_path}"]
    (first,) = start(at_step(5, "time.sleep(60)"), arguments)
    try:
        while not (tmp_path / "metrics.jsonl").is_file():
            assert first.poll() is None
            time.sleep(0.1)
        ((status, message),) = ended(start("", arguments))
        assert status == 2
        assert f"output_dir = {tmp_path}: another run is writing there (process {first.pid} on " in message
    finally:
        first.kill()
        first.communicate()
    with RunFolder(tmp_path).locked():  # the lock of a killed run is gone
        record("a second run in the folder of a living one", "refused with status 2; names process and host", "nothing")


def test_a_clock_that_jumps_changes_nothing(
    recipe: str, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    times = iter(range(10**6))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(times) * 10**7)
    assert main(["--config", recipe, f"output_dir={tmp_path}", "hang_timeout=100"]) == 0
    assert_same_end(tmp_path, uninterrupted)
    record("the clock jumps by four months at each look", "equal to an undisturbed run, to the last bit", "nothing")


def test_kills_at_random_moments_do_not_show(recipe: str, tmp_path: Path) -> None:
    """`python -m tests.support.reliability` kills 50 times."""
    kills = survive_kills(tmp_path, ["--config", recipe], kills=2, steps=160, seed=1)
    assert kills.equal
    assert kills.kills == 2


def damage(file: Path) -> None:
    """Flip one bit of the last byte."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_ranks_agree_on_the_checkpoint_before_the_damaged_ones(
    recipe: str, uninterrupted: Path, tmp_path: Path, record: Record
) -> None:
    """The ranks verify different files: rank 1 finds the first damage, rank 0 the second."""
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    damaged = [
        run / "checkpoints" / "step_00000032" / "model.safetensors",
        run / "checkpoints" / "step_00000028" / "rank_00000.safetensors",
    ]
    for file in damaged:
        damage(file)
    # Slow down the save of step 28, so that its messages overlap with those of the steps after it.
    slow = in_a_save(28, "time.sleep(1)")
    results = ended(start(slow, ["--config", recipe, f"output_dir={run}"], world=2))
    assert [status for status, _ in results] == [0, 0], results
    log = results[0][1]
    found = "is damaged: its SHA-256 is not the one in SHA256SUMS: looking for the checkpoint before it"
    assert f"\nrank 1: {damaged[0]} {found}" in log
    assert f"\n{damaged[1]} {found}" in log
    assert f"resuming from {run / 'checkpoints' / 'step_00000024'}" in log
    assert [step for (step,) in metrics(run, "step")] == list(range(1, 33))
    record(
        "one wrong bit in model.safetensors of the newest checkpoint, and in a shard of the one before it; two ranks",
        "both files named in the log; both ranks went on from the third checkpoint",
        "the steps since the third checkpoint, trained again",
    )


@pytest.mark.parametrize("given", ["checkpoint", "run"])
def test_a_damaged_checkpoint_that_the_user_names_is_an_error(
    given: str, recipe: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record: Record
) -> None:
    source = Path(shutil.copytree(uninterrupted, tmp_path / "source"))
    saved = source / "checkpoints" / "step_00000032"
    damage(saved / "rank_00000.safetensors")
    resume = str(saved if given == "checkpoint" else source)
    assert main(["--config", recipe, f"output_dir={tmp_path / 'run'}", "--resume", resume]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{saved / 'rank_00000.safetensors'} is damaged: its SHA-256" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    record(
        f"--resume names a {given} with one wrong bit in a shard",
        message.removeprefix("fastjepa: error: ").replace(f"{source}", "RUN"),
        "nothing: no other checkpoint is used in its place",
    )


def test_a_checkpoint_later_than_the_one_in_latest_is_not_taken_for_it(
    recipe: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The later checkpoints are of steps that were given up. The run does not start from the beginning either."""
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (run / "checkpoints" / "latest").write_text("step_00000020")
    arguments = ["--config", recipe, f"output_dir={run}"]
    assert main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{run / 'checkpoints' / 'step_00000020'} is not a complete checkpoint: index.json is missing" in message
    assert "--resume can name another one" in message
    assert main([*arguments, "--resume", str(run / "checkpoints" / "step_00000028")]) == 0
    assert_same_end(run, uninterrupted)
