"""Count what one training step does, in figures that are the same on every machine: python -m benchmarks.proofs.counts

A small model takes a step with each mode of masks, precision, activation checkpointing and engine. The figures, for
each part of the step:

    flops            matrix products and attention, by the formulas of torch.utils.flop_counter
    operators        calls that compute, write or read back, without views and empty memory; on a GPU each launches one
                     kernel or more
    allocations      new storages that operators returned, whatever the allocator does; memory inside of them is not seen
    allocated_bytes  bytes of these storages
    copied_bytes     bytes written by operators that only move values or change their dtype
    kept_bytes       bytes of the storages alive when the backward pass begins: what the forward pass keeps for it
    peak_bytes       most bytes alive at a time in the whole step, without weights and optimizer state
    kernels          launches of fastjepa's Triton kernels, in the cases named Triton. There the kernels are not run, and the
                     operators are those of the GPU path

Unlike times, these figures do not vary from run to run, so CI holds them exactly. --check compares them with the committed
counts.json and names every figure that changed. --output FOLDER writes the file, which accepts the change.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fastjepa_kernels
from benchmarks.launch import ROOT, launch
from fastjepa.config import Config, DataConfig, ModelConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.build import build_engine
from fastjepa.engine.torch_engine import TorchEngine
from fastjepa.host import MIB
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import build_objective, method_of

RESULTS = ROOT / "benchmarks" / "results" / "counts.json"
ACCEPT = "python -m benchmarks.proofs.counts --output benchmarks/results"

PARTS = ("context encoder", "target encoder", "predictor", "backward", "optimizer", "other")
"""Parts of the step by their names for the profiler (record_function), and what lies outside of them: the loss."""
FIGURES = ("flops", "operators", "allocations", "allocated_bytes", "copied_bytes", "kept_bytes")

Counts = dict[str, dict[str, int]]
"""Part of the step (or "step" for all of it) -> figure -> number."""


def _attention_flops(queries: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> int:
    """FLOPs of packed attention [T, ..., H, head_dim]: two products for each pair of a query and a key of its sequence."""
    pairs = int((cu_queries.diff().long() * cu_keys.diff()).sum())
    return 4 * queries.shape[-2] * queries.shape[-1] * pairs


# FLOPs as a function of the positional arguments, for operators that torch.utils.flop_counter does not know.
_FLOPS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_: sdpa_flop_count(q.shape, k.shape, v.shape),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda d_out, q, k, v, *_: sdpa_backward_flop_count(
        d_out.shape, q.shape, k.shape, v.shape
    ),
    "fastjepa::block_attention": lambda q, k, v, cu_q, cu_k, *_: _attention_flops(q, cu_q, cu_k),
    "fastjepa::block_attention_backward": lambda q, k, v, out, lse, d_out, cu_q, cu_k, *_: (
        _attention_flops(q, cu_q, cu_k) * 5 // 2
    ),
    "fastjepa::block_attention_packed": lambda qkv, cu, *_: _attention_flops(qkv, cu, cu),
    "fastjepa::block_attention_packed_backward": lambda qkv, out, lse, d_out, cu, *_: (
        _attention_flops(qkv, cu, cu) * 5 // 2
    ),
}

# Operators that change no value, only its place or dtype -> index of the argument as large as what they write; None: the
# result is.
_COPIES: dict[str, int | None] = {
    "aten::_foreach_copy_": 0,
    "aten::copy_": 0,
    "aten::index_copy_": 3,
    "aten::index_put_": 2,
    **dict.fromkeys(
        (
            *("aten::_to_copy", "aten::cat", "aten::clone", "aten::constant_pad_nd", "aten::embedding", "aten::gather"),
            *("aten::index", "aten::index_copy", "aten::index_put", "aten::index_select", "aten::repeat", "aten::roll"),
            *("aten::select_backward", "aten::slice_backward", "aten::stack"),
            *("fastjepa::gather_rows", "fastjepa::scatter_rows"),
        )
    ),
}

_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class StepCounter(TorchDispatchMode):
    """Counts the operators called inside, also those of backward passes, which run in the caller's thread on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: Counts = {part: dict.fromkeys(FIGURES, 0) for part in PARTS}
        self.peak_bytes = 0
        self._records: list[str] = []
        """Names of the open profiler ranges, outermost first."""
        self._alive: list[tuple[StorageWeakRef, int, str]] = []
        """Storages made inside, with their bytes and the part that made them."""

    def _part(self) -> str:
        return next((name for name in self._records if name in PARTS), "other")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            self._follow(func, args)
            return func(*args, **kwargs)
        name = func._schema.name
        if func.namespace == "fastjepa":
            with self:  # count the PyTorch operators inside; Triton launches are counted by `counted`
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            out = func(*args, **kwargs)
        figures = self.parts[self._part()]
        if name in _FLOPS:
            figures["flops"] += _FLOPS[name](*args)
        elif formula := flop_registry.get(func._overloadpacket):
            figures["flops"] += int(formula(*args, **kwargs, out_val=out))
        if name in _COPIES:
            which = _COPIES[name]
            figures["copied_bytes"] += sum(x.nbytes for x in _tensors(out if which is None else args[which]))
        if func.namespace == "fastjepa":
            return out
        given, results = _tensors((args, kwargs)), _tensors(out)
        made = self._remember(given, results)
        reads_back = given and not results
        if (made and name not in _EMPTY) or func._schema.is_mutable or reads_back:
            figures["operators"] += 1
        return out

    def _follow(self, func: Any, args: tuple[Any, ...]) -> None:
        if func._schema.name != "profiler::_record_function_enter_new":
            self._records.pop()
            return
        self._records.append(args[0])
        if args[0] == "backward":
            self._forget()
            for _, size, part in self._alive:
                self.parts[part]["kept_bytes"] += size

    def _remember(self, given: list[Tensor], results: list[Tensor]) -> bool:
        """Count the storages that an operator made. Returns whether it made any."""
        known = {x.untyped_storage()._cdata for x in given}
        made = {x.untyped_storage()._cdata: x.untyped_storage() for x in results}
        new = [storage for key, storage in made.items() if key not in known]
        part = self._part()
        self._alive += [(StorageWeakRef(storage), storage.nbytes(), part) for storage in new]
        self.parts[part]["allocations"] += len(new)
        self.parts[part]["allocated_bytes"] += sum(storage.nbytes() for storage in new)
        if new:
            self._forget()
            self.peak_bytes = max(self.peak_bytes, sum(size for _, size, _ in self._alive))
        return bool(new)

    def _forget(self) -> None:
        self._alive = [entry for entry in self._alive if not entry[0].expired()]


@dataclass(frozen=True)
class Case:
    """One way to train, of which a step is counted."""

    mode: Literal["ragged", "official", "budget"]
    precision: Literal["fp32", "bf16"]
    checkpointing: bool = False
    engine: Literal["", "ZeRO 2", "Triton"] = ""

    @property
    def name(self) -> str:
        parts = [self.mode, self.precision, "checkpointing" if self.checkpointing else "", self.engine]
        return ", ".join(part for part in parts if part)

    @property
    def config(self) -> Config:
        """A narrow ViT with every kind of block: first, middle and last of an encoder, first and last of a predictor."""
        model = ModelConfig(
            name="vit_tiny",
            patch_size=8,
            embed_dim=48,
            depth=3,
            activation_checkpointing=self.checkpointing,
        )
        return Config(
            data=DataConfig(image_size=64),
            model=model,
            objective=IJEPAConfig(
                predictor_embed_dim=24, predictor_depth=2, masks=MaskConfig(mode=self.mode, min_keep=4)
            ),
            global_batch_size=4,
            precision=self.precision,
        )


def cases() -> Iterator[Case]:
    modes: tuple[Literal["ragged", "official", "budget"], ...] = ("ragged", "official", "budget")
    for mode in modes:
        for precision, checkpointing in itertools.product(("fp32", "bf16"), (False, True)):
            yield Case(mode, precision, checkpointing)  # type: ignore[arg-type]
        yield Case(mode, "bf16", engine="Triton")
    yield Case("ragged", "bf16", engine="ZeRO 2")


def masks_of(case: Case, step: int) -> MaskBatch:
    config = case.config
    indices = torch.arange(config.global_batch_size)
    settings = IJEPAConfig.of(config).masks
    return sample_masks(settings, config.grid_h, config.grid_w, seed=0, step=step, sample_indices=indices)


def count(case: Case) -> Counts:
    """The figures of a step. DeepSpeed allows one engine per process, so its case gets a process of its own."""
    if case.engine != "ZeRO 2":
        return _count_here(case)
    with tempfile.TemporaryDirectory() as folder:
        launch("benchmarks.proofs.counts", 1, "--case", case.name, "--output", folder)
        counts: Counts = json.loads((Path(folder) / RESULTS.name).read_text(encoding="utf-8"))["cases"][case.name]
    return counts


def _count_here(case: Case) -> Counts:
    """Count the second step: the first one makes what is made once per run."""
    config = case.config
    images = torch.zeros(config.global_batch_size, 3, *config.data.image_hw, dtype=torch.uint8)
    batches = [MaskedImages(images, masks_of(case, step)) for step in range(2)]
    launches: Counter[str] = Counter()
    with ExitStack() as stack:
        stack.enter_context(fastjepa_kernels.without_requests())
        if case.engine == "Triton":
            from benchmarks.proofs.aot.launches import counted

            launches = stack.enter_context(counted())
        ds_config = ROOT / "configs" / "zero2.json" if case.engine == "ZeRO 2" else None
        method, sizes = method_of(config), BatchSizes.share(config, 1)
        engine = build_engine(build_objective(method), method, config, sizes, torch.device("cpu"), ds_config)
        if case.engine == "Triton":
            assert isinstance(engine, TorchEngine)
            engine._passes = engine._forward_and_backward  # a GPU takes the batch whole, a CPU in slices
        engine.micro_step(batches[0])
        _forget_batches()
        launches.clear()
        gc.collect()
        gc.disable()  # so that references alone decide what is alive
        try:
            with StepCounter() as counter:
                engine.micro_step(batches[1])
        finally:
            gc.enable()
            engine.close()
    step = {figure: sum(figures[figure] for figures in counter.parts.values()) for figure in FIGURES}
    step["peak_bytes"] = counter.peak_bytes
    return {"step": step, **counter.parts} | ({"kernels": dict(sorted(launches.items()))} if launches else {})


def _forget_batches() -> None:
    """Clear what the kernels cache of a batch's lengths, so that the counted step sees new masks, as in training."""
    for cached in gc.get_objects():
        if type(cached) is functools._lru_cache_wrapper and cached.__module__.startswith("fastjepa_kernels."):
            cached.cache_clear()


def versions() -> dict[str, str]:
    """Versions of the packages whose operators are counted: other versions may give other figures."""
    return {"torch": torch.__version__.partition("+")[0], "deepspeed": version("deepspeed")}


def changes(before: dict[str, Counts], after: dict[str, Counts]) -> list[str]:
    """One line for each figure that differs, each new case and each missing one."""
    lines = []
    for case in dict.fromkeys([*before, *after]):
        old, new = before.get(case), after.get(case)
        if old is None or new is None:
            lines.append(f"{case}: {'new' if old is None else 'gone'}")
            continue
        for part in dict.fromkeys([*old, *new]):
            a, b = old.get(part, {}), new.get(part, {})
            for figure in dict.fromkeys([*a, *b]):
                x, y = a.get(figure, 0), b.get(figure, 0)
                if x != y:
                    share = f" ({100 * (y - x) / x:+.1f} %)" if x else ""
                    lines.append(f"{case}: {part}: {figure} {x:,} -> {y:,}{share}")
    return lines


def problem_with(recorded: dict[str, Any]) -> str | None:
    """The reason why the file's figures cannot be compared with this installation's, or None."""
    here, there = versions(), recorded["versions"]
    others = [f"{name} {here[name]}, not {there[name]}" for name in here if here[name] != there[name]]
    return f"{RESULTS.name} was made with other versions; this installation has {'; '.join(others)}" if others else None


def _write(counts: dict[str, Counts], path: Path) -> None:
    """Write JSON with one line for each part of a step, so that a change is a changed line."""
    blocks = []
    for case, parts in counts.items():
        lines = ",\n".join(f"  {json.dumps(part)}: {json.dumps(figures)}" for part, figures in parts.items())
        blocks.append(f"{json.dumps(case)}: {{\n{lines}\n}}")
    text = f'{{"versions": {json.dumps(versions())},\n"cases": {{\n' + ",\n".join(blocks) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


def _print_row(case: str, counts: Counts) -> None:
    step = counts["step"]
    kernels = sum(counts.get("kernels", {}).values())
    print(
        f"{case:<30}{step['flops'] / 1e6:>10.3f}{step['operators']:>11}{kernels:>9}{step['allocations']:>13}"
        f"{step['allocated_bytes'] / MIB:>11.3f}{step['copied_bytes'] / MIB:>11.3f}"
        f"{step['kept_bytes'] / MIB:>11.3f}{step['peak_bytes'] / MIB:>11.3f}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(
        "python -m benchmarks.proofs.counts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help=f"compare with {RESULTS.name}; exit with 1 if a figure changed"
    )
    parser.add_argument("--output", type=Path, help="folder for counts.json")
    parser.add_argument("--case", choices=[case.name for case in cases()], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    print(
        f"{'one step':<30}{'MFLOP':>10}{'operators':>11}{'kernels':>9}{'allocations':>13}"
        f"{'MiB':>11}{'copied MiB':>11}{'kept MiB':>11}{'peak MiB':>11}"
    )
    counts = {}
    for case in cases():
        if options.case and case.name != options.case:
            continue
        counts[case.name] = _count_here(case) if options.case else count(case)
        _print_row(case.name, counts[case.name])
    status = 0
    if options.check:
        recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
        if problem := problem_with(recorded):
            print(f"not compared: {problem}")
        elif changed := changes(recorded["cases"], counts):
            print("\n".join(["", *changed, f"{len(changed)} figures changed. If this is intended: {ACCEPT}"]))
            status = 1
        else:
            print("as recorded")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        _write(counts, options.output / "counts.json")
    return status


if __name__ == "__main__":
    sys.exit(main())
