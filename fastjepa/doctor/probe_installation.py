"""The probes of the installation: do PyTorch, DeepSpeed, apex, DALI and the kernels work here?

Each function runs in a process of its own (`probe_process`) and returns JSON. Packages that may be missing or broken, torch
among them, are imported inside.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


Settings = tuple[str | None, list[str]]
"""The settings of a run, as `load_config` takes them: the YAML file, and those of the command line."""


def pytorch() -> dict[str, Any]:
    """Import torch and all of fastjepa, and compute a product on every GPU."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "gpus": [],
        "gpu_problem": None,
    }
    if torch.version.cuda:
        try:
            torch.cuda.init()
            facts["gpus"] = [_gpu(index) for index in range(torch.cuda.device_count())]
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        except (RuntimeError, AssertionError) as error:  # no driver, too old a driver or a broken GPU
            facts["gpu_problem"] = str(error).strip().partition("\n")[0]
    try:
        import fastjepa.data
        import fastjepa.engine.build
        import fastjepa.evaluate  # noqa: F401
    except ImportError as error:
        facts["import_problem"] = f"{type(error).__name__}: {error}"
    return facts


def _gpu(index: int) -> dict[str, Any]:
    import torch

    device = torch.device("cuda", index)
    ones = torch.ones(64, 64, device=device)
    if (ones @ ones).sum().item() != 64**3:
        raise RuntimeError(f"GPU {index} computes a wrong product of matrices")
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    capability = [properties.major, properties.minor]
    return {"name": properties.name, "capability": capability, "memory": total, "free": free}


def deepspeed() -> dict[str, Any]:
    """Import DeepSpeed as `fastjepa.engine` does."""
    import importlib

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("deepspeed")
    return {"imported": True}


def apex() -> dict[str, Any]:
    """Find out why NVIDIA's apex cannot be used; the problem is None if it can."""
    from fastjepa_kernels.selection import apex_problem

    return {"problem": apex_problem()}


def dali(rounds: int = 10) -> dict[str, Any]:
    """Decode a fixed set of JPEG files with DALI, on the GPU if there is one, and compare with libjpeg-turbo.

    DALI decodes them several times, because hardware decoders are reported to have races. The result, in levels of 255:
    `difference`, the largest mean difference of an image to libjpeg-turbo's; `spread`, the largest difference of a pixel
    between two rounds of DALI.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import simplejpeg

    from fastjepa.config import DataConfig
    from fastjepa.data.decode.cpu import CPUDecoder
    from fastjepa.data.decode.dali import DaliDecoder, dali_problem
    from fastjepa.data.decode.images import read_header

    if problem := dali_problem():
        return {"problem": problem}
    device = first_device()
    files = []
    for height, width in ((97, 131), (240, 320), (375, 500), (768, 513)) * 4:
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / a) * np.cos(y / b) for a, b in ((9, 14), (23, 11), (17, 31))]
        pixels = (127.5 + 120 * np.stack(waves, 2)).astype(np.uint8)
        files.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90, colorsubsampling="420"))
    images = [read_header(file, 10**6) for file in files]
    boxes = np.array([(0, 0, image.height, image.width) for image in images], np.int32)
    flips = np.zeros(len(images), bool)
    config = DataConfig(image_size=(64, 96), loader="dali", dct_scaling=False)
    with ThreadPoolExecutor(config.num_threads) as pool:
        turbo = CPUDecoder(config, pool)
        expected = turbo.decode(images, boxes, flips).float()
        decoder = DaliDecoder(config, device, len(images), turbo, num_threads=2)
        decoded = [decoder.decode(images, boxes, flips).cpu().float() for _ in range(rounds)]
    difference = max((one - expected).abs().mean((1, 2, 3)).max().item() for one in decoded)
    spread = max((one - decoded[0]).abs().max().item() for one in decoded)
    return {"problem": None, "device": device.type, "difference": difference, "spread": spread}


def kernels(settings: Settings) -> dict[str, Any]:
    """Choose the implementation of each operation as the run would, and train a small model on those chosen.

    `agreement` is the relative difference between the losses of that model and of the same model on plain PyTorch; it is
    None if an operation cannot run, or if the two cannot be compared (`not_compared` says why).
    """
    import fastjepa_kernels
    from fastjepa.config import KernelsConfig
    from fastjepa.engine.base import resolve_precision
    from fastjepa.engine.build import operations_of
    from fastjepa.errors import ConfigError
    from fastjepa.objectives.registry import load_config, method_of

    run, device = load_config(*settings), first_device()
    dtype = resolve_precision(run, device)
    chosen: list[dict[str, Any]] = []
    for operation in operations_of(method_of(run), dtype):
        entry: dict[str, Any] = {"operation": operation.name, "head_dim": operation.head_dim}
        try:
            fastjepa_kernels.request({operation.name: getattr(run.kernels, operation.name)})
            others = operation.implementations(device.type)
            entry["chosen"] = operation.choose(device.type)
            entry["others"] = {name: reason for name, reason in others.items() if reason}
        except ValueError as error:
            entry["problem"] = str(error)
        chosen.append(entry)
    facts: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "operations": chosen, "agreement": None}
    if not any("problem" in entry for entry in chosen):
        try:
            loss = _small_loss(run.kernels, device)
            os.environ.pop("FASTJEPA_KERNELS", None)
            plain = dict.fromkeys(KernelsConfig.__dataclass_fields__, "torch") | {"block_attention": "padded"}
            facts["agreement"] = abs(loss / _small_loss(KernelsConfig(**plain), device) - 1)  # type: ignore[arg-type]
        except (
            ConfigError
        ) as error:  # the small model trains in fp32 with other head dims, which a request may not take
            facts["not_compared"] = str(error)
    return facts


def _small_loss(kernels: Any, device: torch.device) -> float:
    """The loss of the second fp32 step: by then every kernel ran forward and backward, and the optimizer once."""
    import torch

    from fastjepa.config import Config, DataConfig, ModelConfig
    from fastjepa.config.batch_sizes import BatchSizes
    from fastjepa.engine.build import build_engine
    from fastjepa.objectives.base import Moment
    from fastjepa.objectives.ijepa.settings import IJEPAConfig
    from fastjepa.objectives.registry import build_objective, method_of

    config = Config(
        model=ModelConfig(embed_dim=64, depth=2, num_heads=2, init="fan_in"),
        objective=IJEPAConfig(predictor_embed_dim=32, predictor_depth=2),
        data=DataConfig(image_size=96),
        global_batch_size=4,
        precision="fp32",
        kernels=kernels,
    )
    method = method_of(config)
    engine = build_engine(build_objective(method), method, config, BatchSizes(4, 1), device, None)
    generator = torch.Generator().manual_seed(0)
    loss = math.nan
    for step in range(2):
        pixels = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8, generator=generator)
        batch = method.prepare([pixels.to(device)], torch.arange(4, device=device), Moment(step, 2, 2))
        loss = engine.micro_step(batch).loss.item()
    return loss


def first_device() -> torch.device:
    """The first GPU; the CPU where there is none."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
