"""The command line: every launcher trains the same run, kills and resumes leave no trace, mistakes end in one plain line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from benchmarks.launch import ROOT, free_port, launch
from fastjepa.checkpoint.format import latest, load_weights
from fastjepa.objectives.registry import load_config
from fastjepa.train import main
from tests.support.read_backs import ReadBacks
from tests.support.tiny_run import metrics, write_recipe

TRAIN = str(ROOT / "fastjepa" / "train.py")
LEARNT = ("step", "epoch", "loss", "lr", "weight_decay", "ema_momentum", "grad_norm", "context_tokens", "target_tokens")


def output_of(*command: str) -> str:
    """Run a command that must succeed, and return what it prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


def assert_bit_identical(run: Path, expected: Path) -> None:
    assert metrics(run, *LEARNT) == metrics(expected, *LEARNT)
    last = "checkpoints/step_00000012/rank_00000.safetensors"
    assert (run / last).read_bytes() == (expected / last).read_bytes()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_recipe(tmp_path_factory.mktemp("recipe"), "epochs: 1.5  # 12 steps", "keep_last: 100")


@pytest.fixture(scope="module")
def images(recipe: str) -> Path:
    return Path(recipe).parent / "images"


@pytest.fixture(scope="module")
def finished(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of one process."""
    run = tmp_path_factory.mktemp("finished")
    assert main(["--config", recipe, f"output_dir={run}"]) == 0
    return run


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "again"))


class Failure(NamedTuple):
    """A run that was refused."""

    message: str
    config_before: str | None
    """The text of config.yaml before the run; None: there was none."""
    config_after: str | None


def refused(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> Failure:
    """Start a run that must end with status 2 and a single line, and return this line and config.yaml before and after."""
    config = run / "config.yaml"
    before = config.read_text() if config.is_file() else None
    assert main([*arguments, f"output_dir={run}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("fastjepa: error: ")
    return Failure(lines[0], before, config.read_text() if config.is_file() else None)


def test_a_run_leaves_its_configuration_metrics_and_checkpoints(finished: Path, recipe: str) -> None:
    asked_for = load_config(recipe, [f"output_dir={finished}"])
    assert load_config(finished / "config.yaml") == asked_for.resolved()
    assert [step for (step,) in metrics(finished, "step")] == list(range(1, 13))
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000004", "step_00000008", "step_00000012"}
    (line,) = metrics(finished, "data_wait", "images_per_second", "tokens_per_second", "memory_gib", "bad_samples")[-1:]
    assert 0 <= line[0] <= 1
    assert min(line[1:4]) > 0
    assert line[4] == 0


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_every_launcher_trains_the_same_run_on_two_ranks(
    launcher: str, finished: Path, recipe: str, tmp_path: Path
) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN]
    deepspeed = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port()), TRAIN]
    command = torchrun if launcher == "torchrun" else [*deepspeed, "--ds_config", str(ROOT / "configs" / "zero2.json")]
    output_of(sys.executable, "-m", *command, "--config", recipe, f"output_dir={tmp_path}")
    keys = ("step", "loss", "grad_norm", "lr")
    assert np.array(metrics(tmp_path, *keys)) == pytest.approx(np.array(metrics(finished, *keys)), rel=1e-5)
    index = json.loads((tmp_path / "checkpoints" / "step_00000012" / "index.json").read_text())
    assert len(index["shards"]) == {"torchrun": 1, "deepspeed": 2}[launcher]


@pytest.mark.processes
def test_deepspeed_trains_a_single_process_without_a_launcher(finished: Path, recipe: str, tmp_path: Path) -> None:
    zero = str(ROOT / "configs" / "zero1.json")
    output_of(sys.executable, TRAIN, "--ds_config", zero, "--config", recipe, f"output_dir={tmp_path}")
    assert np.array(metrics(tmp_path, "loss")) == pytest.approx(np.array(metrics(finished, "loss")), rel=1e-5)


KILLED_AT_STEP_6 = """
import os, signal, sys
from fastjepa import train
from fastjepa.run.progress import Progress
def report(self, line):
    if line["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Progress.report = report
train.main(sys.argv[1:])
"""


@pytest.mark.processes
def test_a_run_that_was_killed_and_started_again_ends_bit_for_bit_like_one_that_was_not(
    finished: Path, recipe: str, tmp_path: Path
) -> None:
    # Not in the background, where the save of step 4 may or may not be complete in step 6.
    arguments = ("--config", recipe, f"output_dir={tmp_path}", "async_checkpoint=false")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_STEP_6, *arguments], env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert metrics(tmp_path, "step")[-1] == [6]
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000004"
    assert main(arguments) == 0
    assert_bit_identical(tmp_path, finished)


def test_a_run_continues_from_a_checkpoint_given_by_its_path(finished: Path, recipe: str, tmp_path: Path) -> None:
    source = str(finished / "checkpoints" / "step_00000008")
    assert main(["--config", recipe, "--resume", source, f"output_dir={tmp_path}"]) == 0
    assert metrics(tmp_path, *LEARNT) == metrics(finished, *LEARNT)[8:]


def test_a_finished_run_is_not_trained_again(again: Path, finished: Path, recipe: str) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in again.rglob("*")
        if path.name not in ("config.yaml", ".lock") and path.is_file()
    }
    assert main(["--config", recipe, f"output_dir={again}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_bit_identical(again, finished)


def rewind(run: Path) -> None:
    """Make a run look as if it had been stopped after its checkpoint of step 8."""
    (run / "checkpoints" / "latest").write_text("step_00000008")


def test_a_finished_run_refuses_other_settings(again: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No step is left to train, and the weights that are there were not trained with these settings."""
    failure = refused(capsys, again, "--config", recipe, "optim.lr=5e-3")
    assert (
        "holds a complete run of other settings: optim.lr was 0.001, is 0.005. Choose another output_dir"
        in failure.message
    )
    assert failure.config_before == failure.config_after


def test_a_run_that_has_begun_continues_from_its_own_checkpoint_whatever_path_is_given(
    again: Path, finished: Path, recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that is queued again with the same command line must not start over."""
    rewind(again)
    source = str(finished / "checkpoints" / "step_00000004")
    assert main(["--config", recipe, f"output_dir={again}", "--resume", source]) == 0
    assert f"going on from {again / 'checkpoints' / 'step_00000008'}" in caplog.text
    assert "target_loss for torch.float32 on cpu: torch (triton: it needs a CUDA device, not cpu)" in caplog.text
    assert_bit_identical(again, finished)


def test_resuming_with_other_settings_names_them(again: Path, recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    rewind(again)
    changed = ["optim.weight_decay=0.1", "data.crop_aspect=[0.5,2]", "log_interval=3"]
    assert main(["--config", recipe, f"output_dir={again}", *changed]) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "resuming with another setting: data.crop_aspect was [0.75, 1.3333333333333333], is [0.5, 2.0]",
        "resuming with another setting: optim.weight_decay was 0.04, is 0.1",
    ]


def test_resuming_on_other_images_is_logged(
    again: Path, recipe: str, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fewer = Path(shutil.copytree(images, tmp_path / "fewer"))
    (fewer / "000.png").unlink()
    rewind(again)
    assert main(["--config", recipe, f"output_dir={again}", f"data.source={fewer}"]) == 0
    assert "the checkpoint saw 70 images, now there are 69" in caplog.text


def test_resume_never_refuses_a_folder_that_holds_a_run(
    again: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = refused(capsys, again, "--config", recipe, "--resume", "never", "seed=5")
    assert f"{again} already holds step_00000012: choose another output_dir, or resume=auto" in failure.message
    assert failure.config_before == failure.config_after


def test_another_model_in_the_folder_of_a_run_is_refused(
    again: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = refused(capsys, again, "--config", recipe, "model.embed_dim=32")
    assert "step_00000012 is of another model: " in failure.message
    assert failure.config_before == failure.config_after


@pytest.mark.parametrize("name", ["weights.pth", "absent"])
def test_a_resume_path_that_is_no_checkpoint_is_refused(
    name: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"\x80\x04N.")
    failure = refused(capsys, tmp_path / "run", "--config", recipe, "--resume", str(tmp_path / name))
    assert f"{tmp_path / name} is {'a file: expected a checkpoint' if '.' in name else 'not a comp'}" in failure.message


def test_the_output_of_print_config_can_be_trained_from(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["optim.lr=3e-4", "objective.masks.mode=budget", "optim.clip_grad=1"]
    assert main(["--config", recipe, "--print_config", *overrides]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(recipe, overrides).resolved()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["epochs=many"], "epochs = many: expected"),
        (["data.source=/nowhere/images"], "data.source = /nowhere/images: No such file or folder"),
        (["data.source=EMPTY"], "no images in"),
        (["data.source=TEXT"], "no images in"),
        (["global_batch_size=128"], "global_batch_size = 128: the data set has 70 images"),
        (["micro_batch_size=3"], "micro_batch_size = 3: expected a divisor of 8"),
        (["--ds_config", "/nowhere/zero.json"], "/nowhere/zero.json: cannot read this DeepSpeed configuration"),
        (["--ds_config", "CONTRADICTION"], "train_batch_size = 16 contradicts global_batch_size = 8"),
    ],
)
def test_a_mistake_ends_in_one_plain_line(
    overrides: list[str], message: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    (tmp_path / "zero.json").write_text('{"train_batch_size": 16}')
    places = {"EMPTY": "empty", "TEXT": "text", "CONTRADICTION": "zero.json"}
    for word, name in places.items():
        overrides = [value.replace(word, str(tmp_path / name)) for value in overrides]
    assert message in refused(capsys, tmp_path / "run", "--config", recipe, *overrides).message


def test_yaml_that_cannot_be_read_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nmodel: {name: vit_tiny\n")
    message = refused(capsys, tmp_path / "run", "--config", str(tmp_path / "run.yaml")).message
    assert f"{tmp_path / 'run.yaml'}, line " in message


def test_a_file_in_the_place_of_the_run_folder_is_named(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").touch()
    assert (
        f"output_dir = {tmp_path / 'run'}: cannot be written ("
        in refused(capsys, tmp_path / "run", "--config", recipe).message
    )


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absurd = ("optim.lr=1e30", "optim.start_lr=1e30", "checkpoint_interval=1")
    message = refused(capsys, tmp_path, "--config", recipe, *absurd, "epochs=3").message
    assert re.search(r"not finite in \d+ steps in a row, .*Try a lower optim.lr|the weights are not finite", message)
    for saved in (tmp_path / "checkpoints").glob("step_*"):
        weights = load_weights(saved, "target_encoder")
        assert all(bool(w.isfinite().all()) for w in weights.values())


def test_a_folder_without_labels_trains_and_the_run_says_that_there_are_no_probes(
    again: Path, recipe: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", recipe, f"output_dir={again}", "evaluate=true"]) == 0
    assert f"no labelled train and val splits in {images}, so no probes; " in capsys.readouterr().out


@pytest.mark.processes
def test_the_memory_of_training_is_free_while_the_run_is_evaluated(recipe: str, tmp_path: Path) -> None:
    launch("tests.workers.memory", 1, recipe, str(tmp_path))
    held = json.loads((tmp_path / "held.json").read_text())
    assert held == {"torch": [], "zero1": [], "zero2": [], "zero3": []}


def test_held_out_images_whose_classes_are_not_those_of_training_are_not_probed(
    recipe: str, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All accuracies would be 0, without an explanation."""
    for name, classes in {"train": "ab", "val": "xy"}.items():
        lines = (f"{images}/{index:03d}.png\t{classes[index % 2]}\n" for index in range(70))
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    sources = [f"data.source={tmp_path}/train.txt", f"data.val_source={tmp_path}/val.txt"]
    assert main(["--config", recipe, f"output_dir={tmp_path / 'run'}", "evaluate=true", *sources]) == 0
    assert "none of the held-out images' classes (x, y, ...) is one of the training images' (a, b, ...)" in caplog.text


@pytest.fixture
def spoiled(images: Path, tmp_path: Path) -> Path:
    """A copy of the images with eight bad files, each bad in its own way."""
    folder = Path(shutil.copytree(images, tmp_path / "spoiled"))
    good = (folder / "000.png").read_bytes()
    bomb = good[:16] + (50_000).to_bytes(4) + (50_000).to_bytes(4) + good[24:]
    for name, content in {
        "truncated.png": good[: len(good) // 2],
        "empty.jpg": b"",
        "text.jpg": b"a text that somebody renamed",
        "bomb.png": bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4) + bomb[33:],
        "cut.tif": b"II*\0\x08\0\0\0",
        "no_jpeg.jpg": b"\xff\xd8\xff\xe0" + b"\0" * 30,
    }.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.zeros((9, 9), np.float32)).save(folder / "float.tif")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    return folder


def test_a_run_over_bad_files_goes_on_and_names_each_once(recipe: str, spoiled: Path, tmp_path: Path) -> None:
    run, arguments = tmp_path / "run", ["--config", recipe, f"data.source={spoiled}", "epochs=4"]
    assert main([*arguments, f"output_dir={run}", "data.max_bad_share=0.5"]) == 0
    named = {}
    for line in (run / "bad_samples.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert entry["name"] not in named
        named[entry["name"]] = entry["reason"]
    # loop.jpg, a link that leads nowhere, is no file, so it was not listed.
    assert set(named) == {"truncated.png", "empty.jpg", "text.jpg", "bomb.png", "cut.tif", "no_jpeg.jpg", "float.tif"}
    assert named["bomb.png"].startswith("50000 x 50000 pixels")
    assert metrics(run, "bad_samples")[-1] == [7]
    rewind(run)
    assert main([*arguments, f"output_dir={run}", "data.max_bad_share=0.5"]) == 0
    assert len((run / "bad_samples.jsonl").read_text().splitlines()) == 7


def test_too_many_bad_files_end_the_run_in_one_plain_line(
    recipe: str, spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", recipe, f"data.source={spoiled}", "data.max_bad_share=0.02", "epochs=4"]
    assert main([*arguments, f"output_dir={tmp_path / 'run'}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"error: .*2 of 77 images are bad, more than .*max_bad_share = 0.02; .*bad_samples.jsonl names", last
    )


IMPORTED = """
import sys, torch
before = set(sys.modules)
import fastjepa, fastjepa.config, fastjepa.train
fastjepa.train.parse_args(["seed=1"])
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


@pytest.mark.processes
def test_the_command_line_imports_nothing_heavy_before_it_must() -> None:
    imported = set(output_of(sys.executable, "-c", IMPORTED).split())
    assert {"fastjepa", "yaml"} <= imported
    assert not imported & {"deepspeed", "nvidia", "triton", "PIL", "safetensors", "scipy", "sklearn", "tqdm"}


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    again: Path, finished: Path, recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    shard = again / "checkpoints" / "step_00000012" / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["--config", recipe, f"output_dir={again}"]) == 0
    assert f"{shard} is damaged: its SHA-256 is not the one in SHA256SUMS: looking for the" in caplog.text
    assert f"resuming from {again / 'checkpoints' / 'step_00000008'}" in caplog.text
    assert_bit_identical(again, finished)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(
    again: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("step_00000004", "step_00000008", "step_00000012"):
        (again / "checkpoints" / name / "index.json").unlink()
    message = refused(capsys, again, "--config", recipe).message
    assert "no checkpoint can be loaded: " in message
    assert message.count("index.json is missing") == 3


def test_between_two_lines_of_metrics_nothing_is_read_back(recipe: str, tmp_path: Path) -> None:
    """Loop, meter and loader read no more in a run of twice the steps with as many lines."""
    read_backs = []
    for epochs in (0.5, 1):  # 4 and 8 steps
        run = [f"epochs={epochs}", "log_interval=8", "checkpoint_interval=8", f"output_dir={tmp_path}/{epochs}"]
        with ReadBacks() as counted:
            assert main(["--config", recipe, *run]) == 0
        # These files take other paths on a CPU: costs.py reads the lengths, to slice the batch.
        files = ("masked_gather.py", "block_attention.py", "adamw_ema.py")
        model = {"optim/adamw_ema.py", "ijepa/costs.py", *(f"fastjepa_kernels/{file}" for file in files)}
        read_backs.append({file: count for file, count in counted.by_file.items() if file not in model})
    assert read_backs[0] == read_backs[1]
    # The counter works: it sees the one line of metrics and the look at which steps were skipped.
    assert {"engine/base.py", "run/meter.py", "fastjepa/trainer.py"} <= read_backs[0].keys()
