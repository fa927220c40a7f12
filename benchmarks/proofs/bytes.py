"""Bytes that a rank sends in a step and bytes of state that it holds, measured and by the formulas of fastjepa.plan.zero.

python -m benchmarks.proofs.bytes --output benchmarks/results

A small model is trained with plain PyTorch and ZeRO 0 to 3 on 1, 2 and 4 ranks of gloo. Bytes sent are counted at the
operators of torch.distributed, which every collective passes, whether DeepSpeed or fastjepa calls it. Bytes held are
the storages of all living floating-point tensors that were made with or after the engine. The settings are those of
configs/zeroN.json, with buckets and thresholds as small as the model. A third column, theory, says what a stage needs
to send at least (`theory`).
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.launch import ROOT, launch
from fastjepa import distributed
from fastjepa.config import Config, DataConfig, ModelConfig, OptimConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.build import build_engine
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import sample_masks
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import build_objective, method_of
from fastjepa.plan.zero import BF16, FP32, STAGES, Stage, Traffic, ZeroSettings, bytes_sent, parameters_of, state_bytes

ZERO = ZeroSettings(reduce_bucket_size=5_000, stage3_param_persistence_threshold=500, stage3_prefetch_bucket_size=5_000)
COLUMNS = ("ranks", "stage", "precision", "grad_accum_steps", "quantity", "measured", "formula", "theory")


class CollectiveCounter(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives of the default group, if these run as rings.

    `collectives` is the number of collectives. `sent` maps three kinds to bytes: gradients (all-reduce, reduce,
    reduce-scatter), weights (all-gather, broadcast) and small (reductions of 8 bytes or less: norms and flags).
    """

    # Prefix of the operator's name, bytes sent per byte of the whole tensor in units of (N-1)/N, kind.
    _KINDS = (
        ("allreduce", 2, "gradients"),
        ("reduce_scatter", 1, "gradients"),
        ("reduce_", 1, "gradients"),  # a chain to one rank: the mean over the ranks
        ("allgather", 1, "weights"),
        ("broadcast", 1, "weights"),
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: defaultdict[str, float] = defaultdict(float)
        self.collectives = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::").lstrip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        world = distributed.world_size()
        # The larger of input and output is the whole tensor. (A list of tensors adds up to it.)
        sizes = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args]
        whole = max(sizes, default=0)
        if name.startswith(("barrier", "monitored_barrier")):
            return
        if name.startswith("alltoall") or not any(name.startswith(prefix) for prefix, _, _ in self._KINDS):
            raise NotImplementedError(f"c10d::{name} is unknown: add it to CollectiveCounter")
        self.collectives += 1
        factor, kind = next((f, k) for prefix, f, k in self._KINDS if name.startswith(prefix))
        self.sent["small" if kind == "gradients" and whole <= 8 else kind] += factor * (world - 1) / world * whole


def storages() -> dict[int, UntypedStorage]:
    """Map address -> storage for every living floating-point tensor, gradients included.

    The result keeps the storages alive, so that no later storage can get the address of one of them.
    """
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at deprecated classes warns
        # Tensors of other classes are left out: fake tensors, which a compiler leaves behind, have no memory.
        tensors = [x for x in gc.get_objects() if type(x) in (Tensor, Parameter) and x.is_floating_point()]
        tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and tensor.device.type != "meta":
            found[storage.data_ptr()] = storage
    return found


def small_run(precision: str, accum: int, world: int) -> Config:
    """A small model, trained on micro batches of two images."""
    return Config(
        data=DataConfig(image_size=32, in_channels=1, mean=(0.5,), std=(0.25,)),
        model=ModelConfig(patch_size=4, embed_dim=36, depth=3, num_heads=3, init="fan_in"),
        objective=IJEPAConfig(predictor_embed_dim=12, predictor_depth=2, masks=MaskConfig(mode="budget", min_keep=2)),
        optim=OptimConfig(warmup_epochs=0),
        global_batch_size=2 * accum * world,
        micro_batch_size=2,
        precision=precision,  # type: ignore[arg-type]
    )


def ds_config(stage: Stage, zero: ZeroSettings, folder: Path) -> Path | None:
    """Write configs/zeroN.json with the sizes of `zero` into `folder`. None with plain PyTorch."""
    if stage == "torch":
        return None
    settings = json.loads((ROOT / "configs" / f"zero{stage}.json").read_text(encoding="utf-8"))
    if stage > 0:
        settings["zero_optimization"]["reduce_bucket_size"] = zero.reduce_bucket_size
    if stage == 3:
        for key in ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"):
            settings["zero_optimization"][key] = getattr(zero, key)
    path = folder / f"zero{stage}_rank{distributed.rank()}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def measure(stage: Stage, config: Config, folder: Path) -> list[dict[str, Any]]:
    """Measure one engine: rows of the table.

    Two steps warm up, a third is counted, and the state is measured before the last micro batch of a fourth.
    """
    world, rank = distributed.world_size(), distributed.rank()
    sizes = BatchSizes.share(config, world)
    images = torch.rand(sizes.micro, 1, *config.data.image_hw)
    indices = torch.arange(sizes.micro) + rank * sizes.micro
    settings = IJEPAConfig.of(config).masks
    masks = sample_masks(settings, config.grid_h, config.grid_w, seed=0, step=0, sample_indices=indices)
    before = storages()
    method = method_of(config)
    settings_of_zero = ds_config(stage, ZERO, folder)
    engine = build_engine(build_objective(method), method, config, sizes, torch.device("cpu"), settings_of_zero)

    def micro_steps(count: int) -> None:
        for _ in range(count):
            engine.micro_step(MaskedImages(images, masks))

    micro_steps(2 * sizes.accum)
    with CollectiveCounter() as counter:
        micro_steps(sizes.accum)
    micro_steps(sizes.accum - 1)
    distributed.wait_for_gloo()
    resident = sum(storage.nbytes() for address, storage in storages().items() if address not in before)
    resident -= sum(buffer.nbytes for buffer in engine.model.buffers())  # position tables
    resident -= sum(constant.nbytes for constant in engine.constants().values())  # their copies on the host
    micro_steps(1)
    masters = {piece.tensor.data_ptr(): piece for piece in engine.pieces()}.values()
    ema = sum(p.tensor.nbytes for p in masters if p.name.startswith("target_encoder."))
    moments = sum(x.nbytes for p in masters for x in engine.optimizer.moments(p.tensor).values())

    measured: dict[str, float] = {
        "sent: gradients": counter.sent["gradients"],
        "sent: weights": counter.sent["weights"],
        "sent: norms and flags": counter.sent["small"],
        "sent: collectives": counter.collectives,
        "state: ema": max(distributed.gather_objects(ema)),
        "state: moments": max(distributed.gather_objects(moments)),
        "state: resident": max(distributed.gather_objects(resident)),
    }
    if sizes.accum == 1:  # without accumulation, no gradients are alive between micro steps
        del measured["state: resident"]
    by_formula, by_theory = formulas(stage, config, world), theory(stage, config, world)
    return [
        dict(zip(COLUMNS, (world, stage, config.precision, sizes.accum, name, *numbers), strict=True))
        for name, value in measured.items()
        for numbers in [(round(value), by_formula.get(name), by_theory.get(name))]
    ]


def formulas(stage: Stage, config: Config, world: int) -> dict[str, int]:
    """The measured quantities by the formulas of fastjepa.plan.zero."""
    bf16, accum = config.precision == "bf16", BatchSizes.share(config, world).accum
    sent = bytes_sent(config, stage, world, accum, bf16=bf16, zero=ZERO)
    state = state_bytes(config, stage, world, bf16=bf16, zero=ZERO)
    return {
        "sent: gradients": round(sent.gradients),
        "sent: weights": round(sent.weights),
        # With plain PyTorch and ZeRO 0 the target encoder's weights are the average.
        "state: ema": state.ema or state.weights - state.moments // 2,
        "state: moments": state.moments,
        "state: resident": state.resident,
    }


def theory(stage: Stage, config: Config, world: int) -> dict[str, int]:
    """The bytes that a stage needs to send at least."""
    bf16, accum = config.precision == "bf16", BatchSizes.share(config, world).accum
    sent = least_traffic(config, stage, world, accum, bf16=bf16)
    return {"sent: gradients": round(sent.gradients), "sent: weights": round(sent.weights)}


def least_traffic(config: Config, stage: Stage, gpus: int, accum: int, *, bf16: bool = True) -> Traffic:
    """Bytes that a rank needs to send in a step, if nothing is padded.

    Stages 1 and 2 reduce-scatter gradients. Each weight is gathered once per use: in the forward and the backward pass of
    context encoder and predictor, and in the forward pass of the target encoder.
    """
    parameters = parameters_of(config)
    trained, everything, averaged = parameters.trained, parameters.total, parameters.averaged
    ring, low = (gpus - 1) / gpus, BF16 if bf16 else FP32
    if stage in ("torch", 0):
        return Traffic(2 * ring * FP32 * trained, 0.0)
    if stage == 1:
        return Traffic(ring * low * trained, ring * low * everything)
    if stage == 2:
        return Traffic(ring * low * trained * accum, ring * low * everything)
    return Traffic(ring * low * trained * accum, ring * low * accum * (2 * trained + averaged))


def run_rank(folder: Path, precisions: Sequence[str], accums: Sequence[int]) -> None:
    """Measure all engines as one rank, one after the other. The first rank writes rows.json into `folder`."""
    distributed.init()
    rows = []
    for precision, accum, stage in itertools.product(precisions, accums, STAGES):
        rows += measure(stage, small_run(precision, accum, distributed.world_size()), folder)
    if distributed.rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    distributed.finish()


def run(world: int, precisions: Sequence[str], accums: Sequence[int]) -> list[dict[str, Any]]:
    """Measure every stage on `world` ranks: rows of the table.

    Raises:
        RuntimeError: a rank failed; the message has what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--precisions", *precisions, "--grad_accum_steps", *map(str, accums)]
        launch("benchmarks.proofs.bytes", world, "--rank-in", folder, *arguments)
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="default: both"
    )
    parser.add_argument("--grad_accum_steps", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder for bytes.csv")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_in:
        run_rank(args.rank_in, args.precisions, args.grad_accum_steps)
        return
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    rows = [row for world in args.ranks for row in run(world, args.precisions, args.grad_accum_steps)]
    print(
        f"{'ranks':>5} {'stage':>6} {'':<5} {'accum':>5}  {'quantity':<22} {'measured':>9} {'formula':>9} {'theory':>9}"
    )
    for row in rows:
        numbers = ("-" if row[key] is None else row[key] for key in ("measured", "formula", "theory"))
        print("{ranks:>5} {stage:>6} {precision:<5} {grad_accum_steps:>5}  {quantity:<22} ".format(**row), end="")
        print(" ".join(f"{number:>9}" for number in numbers))
    if args.output:
        with (args.output / "bytes.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
