"""deepspeed fastjepa/train.py --ds_config configs/zero2.json [--config configs/RUN.yaml] [section.key=value ...]

Without --ds_config the run uses plain PyTorch, alone or under torchrun.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# A script's own folder comes first on sys.path; there, our modules would stand before others of the same names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from fastjepa.launch.openmp import set_wait_policy

set_wait_policy()  # before torch is imported

import argparse
import contextlib
import dataclasses
import gc
import logging
import traceback
from collections.abc import Sequence

from fastjepa import distributed
from fastjepa.config import Config, command_line
from fastjepa.config.file import dump_config
from fastjepa.errors import DataError, FastjepaError, Preempted
from fastjepa.objectives.registry import load_config
from fastjepa.run.stop_request import StopRequest

logger = logging.getLogger("fastjepa.train")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastjepa/train.py", description="Pretrain I-JEPA.")
    command_line.add_run_arguments(parser)
    parser.add_argument("--resume", help="auto (default), never, or a checkpoint or run folder to continue from")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="time and trace the first steps as they train, print where time, arithmetic and memory go, write it to "
        "output_dir/profile (report.html, trace.json, ...), and go on training; learns the same",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it; LOCAL_RANK says the same
    return parser.parse_intermixed_args(argv)


def resolve_config(args: argparse.Namespace) -> Config:
    config = load_config(command_line.config_file(args), args.overrides)
    return dataclasses.replace(config, resume=args.resume) if args.resume else config


def train(
    config: Config,
    ds_config: Path | None,
    stop_request: StopRequest,
    held: contextlib.ExitStack,
    *,
    profile: bool = False,
) -> None:
    """One run, from the data to the evaluation. `held` is given what the run holds to its end: its folder's lock."""
    # Imported here: --help, --print_config and a mistake in the configuration need none of this.
    import torch

    from fastjepa.config.batch_sizes import BatchSizes
    from fastjepa.data import open_dataset
    from fastjepa.engine.build import build_engine
    from fastjepa.evaluate import evaluate_run
    from fastjepa.launch.versions import versions_and_settings
    from fastjepa.objectives.registry import build_objective, method_of
    from fastjepa.run.folder import RunFolder
    from fastjepa.trainer import Trainer

    device = distributed.init(versions_and_settings(config, ds_config))
    first = distributed.rank() == 0
    first_here = int(os.environ.get("LOCAL_RANK", "0")) == 0
    for package in ("fastjepa", "fastjepa_kernels"):
        logging.getLogger(package).setLevel(logging.INFO if first else logging.WARNING)
    sizes = BatchSizes.share(config, distributed.world_size())
    folder = RunFolder(config.output_dir)
    with distributed.share_errors():
        if first:
            folder.create()
            held.enter_context(folder.locked())
        if first_here:
            # Lists them, for the other ranks of this machine to find the lists, and for mistakes to be found now.
            open_dataset(config.data, "train")
            if config.evaluate:
                open_dataset(config.data, "val")
    folder.check_shared()
    with distributed.share_errors():
        dataset = open_dataset(config.data, "train")
        method = method_of(config)
        model = build_objective(method)
    assert dataset is not None
    if len(set(distributed.gather_objects(dataset.fingerprint))) > 1:
        raise DataError(f"data.source = {config.data.source}: the machines of the run see different images there")
    if first:
        trained = sum(p.numel() for p in model.trained_parameters()) / 1e6
        logger.info(
            "%s: %d images, %.1f M trained parameters, %d ranks",
            config.output_dir,
            len(dataset),
            trained,
            distributed.world_size(),
        )
        logger.info(
            "per step: %d ranks x %d micro batches x %d images", distributed.world_size(), sizes.accum, sizes.micro
        )
    engine = build_engine(model, method, config, sizes, device, ds_config)
    trainer = Trainer(method, dataset, engine, sizes, folder, profile=profile)
    with distributed.share_errors():
        if first:
            # Write it this late, so that a run that is refused leaves the earlier run's file alone.
            folder.write_config(dump_config(dataclasses.replace(config, resume="auto")))
    trainer.run(stop_request)
    # Free the memory of training, and let the other ranks end, before the first rank evaluates.
    engine.close()
    distributed.finish()
    del trainer, engine, model
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    if first and config.evaluate:
        try:
            evaluate_run(folder, device)
        except Preempted:
            raise
        except FastjepaError as problem:
            logger.warning("the run is complete, but could not be evaluated: %s", problem)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        with StopRequest() as stop_request:
            status = _run(args, stop_request)
        if status and distributed.world_size() > 1:
            # finish() would wait, on GPUs, for ranks that may not come. The others lose contact, and end as well.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status
    finally:
        distributed.finish()


def _run(args: argparse.Namespace, stop_request: StopRequest) -> int:
    """The exit status. What went wrong is printed, but for what one process may raise."""
    try:
        config = resolve_config(args)
        if args.print_config:
            print(dump_config(config), end="")
            return 0
        with contextlib.ExitStack() as held:
            train(config, command_line.ds_config_file(args), stop_request, held, profile=args.profile)
        return 0
    except FastjepaError as error:
        return _say("stopped" if isinstance(error, Preempted) else "error", str(error), error.exit_status)
    except Exception as error:
        if distributed.world_size() == 1:
            raise
        lost = isinstance(error, RuntimeError) and distributed.is_lost_contact(error)
        if not lost or os.environ.get("FASTJEPA_DEBUG"):
            traceback.print_exc()
        if not lost:
            return 1
        return _say(
            "error",
            f"lost contact with the other ranks ({distributed.reason_of(error)}): the cause is in the first error above, or "
            "in their logs",
            1,
        )


def _say(what: str, message: str, status: int) -> int:
    where = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
    print(f"fastjepa: {what}{where}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
