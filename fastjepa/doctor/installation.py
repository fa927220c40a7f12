"""What is installed and what the machine gives: facts, and what is to be said of each."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastjepa.doctor.probes import Outcome
from fastjepa.host import busy_cores, free_memory, usable_cores

GIB = 2**30
INSTALL = "pip install -c constraints.txt -e '.[dali]'"
# Without these a run goes on, or need not be begun; all other requirements it needs.
_NOT_ALWAYS_NEEDED = ("deepspeed", "triton")
# Levels of 255, of an image's mean: tests/data/decode/test_dali.py holds the same.
_DALI_DIFFERENCE = {"cpu": 0.3, "cuda": 1.5}
# Relative, of the loss of two steps in fp32. TF32 in matrix products stays below; a wrong kernel does not.
_KERNELS_AGREE = 1e-2
_DOCKER_SHM = 64 * 2**20  # bytes; what Docker gives unless asked

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """A problem: a run would not start, or give wrong results. A warning: it would be slower, or may end early."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """What was expected, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What is known without importing anything."""

    python: str
    system: str
    requirements: dict[str, tuple[str, str | None]] | None
    """Package -> what fastjepa asks for, and the version that is there, or None; None: fastjepa itself is not installed."""
    apex_is_there: bool
    nvidia_driver: str | None
    cores: float
    """That may be used."""
    busy: float | None
    """Cores that others keep at work, in the way of those that may be used; None: not known."""
    memory: int
    """Bytes that are free, for this process."""
    omp_num_threads: str | None
    shm: int | None
    """Free bytes of /dev/shm."""


def look_at_host() -> Host:
    shm = Path("/dev/shm")
    driver = Path("/proc/driver/nvidia/version")
    cores, busy = usable_cores(), busy_cores()
    return Host(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        requirements=_requirements(),
        apex_is_there=find_spec("apex") is not None,
        nvidia_driver=driver.read_text(encoding="utf-8").partition("\n")[0] if driver.is_file() else None,
        cores=cores,
        busy=None if busy is None else max(0.0, busy - ((os.cpu_count() or 1) - cores)),
        memory=free_memory(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        shm=shutil.disk_usage(shm).free if shm.is_dir() else None,
    )


def _requirements() -> dict[str, tuple[str, str | None]] | None:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("fastjepa") or []]
    except PackageNotFoundError:
        return None
    here = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {r.name: (str(r.specifier), _version(r.name)) for r in here}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Judging


def judge_host(host: Host) -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{host.python} on {host.system}")
    if host.requirements is None:
        yield Finding("packages", "warning", "fastjepa runs from its sources: versions were not compared", INSTALL)
        return
    from packaging.specifiers import SpecifierSet

    for package, (wanted, found) in host.requirements.items():
        if found is None:
            level: Level = "warning" if package in _NOT_ALWAYS_NEEDED else "problem"
            yield Finding(package, level, f"not installed, expected {package}{wanted}", INSTALL)
        elif not SpecifierSet(wanted).contains(found, prereleases=True):
            yield Finding(package, "warning", f"{found}, expected {wanted}: not tried, may give wrong results", INSTALL)
    right = [
        f"{package} {found}"
        for package, (wanted, found) in host.requirements.items()
        if found and SpecifierSet(wanted).contains(found, prereleases=True)
    ]
    if right:
        yield Finding("packages", "ok", ", ".join(right))


def judge_pytorch(outcome: Outcome, host: Host) -> Iterator[Finding]:
    if outcome.failure:
        advice = "expected `import torch` and a product of matrices to work: " + INSTALL
        yield Finding("PyTorch", "problem", f"looking at it {outcome.failure}", advice)
        return
    facts = outcome.result
    yield Finding("PyTorch", "ok", f"{facts['version']}, CUDA {facts['cuda'] or 'not built in'}")
    if problem := facts.get("import_problem"):
        yield Finding("fastjepa", "problem", f"cannot be imported: {problem}", INSTALL)
    if facts["gpus"]:
        yield from _judge_gpus(facts["gpus"], host)
    elif facts["gpu_problem"]:
        advice = (
            "expected a driver as new as this CUDA, and a GPU that is not hidden (nvidia-smi, CUDA_VISIBLE_DEVICES)"
        )
        yield Finding("GPU", "warning", f"none can be used: {facts['gpu_problem']}", advice)
    elif host.nvidia_driver and not facts["cuda"]:
        advice = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
        yield Finding(
            "GPU", "warning", f"there is a driver ({host.nvidia_driver}), but this PyTorch is for CPUs", advice
        )
    else:
        yield Finding("GPU", "ok", "none: training on the CPU, which is for trying things out")


def _judge_gpus(gpus: list[dict[str, Any]], host: Host) -> Iterator[Finding]:
    for index, gpu in enumerate(gpus):
        name = f"GPU {index}"
        capability = "{}.{}".format(*gpu["capability"])
        memory = f"{gpu['free'] / GIB:.1f} of {gpu['memory'] / GIB:.1f} GiB free"
        found = f"{gpu['name']}, compute capability {capability}, {memory}"
        if gpu["capability"] < [8, 0]:
            advice = "expected 8.0 or newer for bf16 and the Triton kernels: PyTorch's fp32 paths run instead, slower"
            yield Finding(name, "warning", found, advice)
        elif gpu["free"] < 0.9 * gpu["memory"]:
            yield Finding(name, "warning", found, "another process holds the rest: end it (nvidia-smi names it)")
        else:
            yield Finding(name, "ok", found)
    yield Finding("GPU driver", "ok", host.nvidia_driver or "its version is not told here")


def judge_deepspeed(outcome: Outcome, *, needed: bool) -> Iterator[Finding]:
    if outcome.failure:
        advice = f"expected `import deepspeed` to work; plain PyTorch runs without it: leave --ds_config out. {INSTALL}"
        yield Finding("DeepSpeed", "problem" if needed else "warning", f"importing it {outcome.failure}", advice)
    else:
        yield Finding("DeepSpeed", "ok", "can be imported")


def judge_dali(outcome: Outcome, *, loader: str, gpu: bool) -> Iterator[Finding]:
    """Args: loader: data.loader; with `auto`, DALI decodes on a GPU only."""
    used = loader == "dali" or (loader == "auto" and gpu)
    level: Level = "problem" if loader == "dali" else "warning" if used else "ok"
    facts = outcome.result
    if outcome.failure or facts["problem"]:
        found = facts.get("problem") or f"decoding with it {outcome.failure}"
        if outcome.failure and used:
            level = "problem"  # the run would end in the same way
        advice = f"data.loader=turbo decodes on the CPU; DALI for Linux: {INSTALL}" if level != "ok" else ""
        yield Finding("DALI", level, found + ("" if used else " (not used: data.loader)"), advice)
        return
    bound = _DALI_DIFFERENCE[facts["device"]]
    if facts["unlike"] or facts["difference"] > bound:
        found = (
            f"decodes wrongly on the {facts['device']}: an image differs from libjpeg-turbo's by {facts['difference']:.2f} "
            f"of 255 on average (expected at most {bound}), from itself in another round by up to {facts['unlike']:.0f} "
            "(expected 0)"
        )
        advice = "data.hw_decoder_load=0 leaves the hardware decoder out, data.loader=turbo leaves DALI out"
        yield Finding("DALI", "problem" if used else "warning", found, advice)
    else:
        found = (
            f"decodes on the {facts['device']} as libjpeg-turbo does (means differ by {facts['difference']:.2f} of 255)"
        )
        yield Finding("DALI", "ok", found + ("" if used else "; not used: data.loader"))


def judge_apex(outcome: Outcome) -> Iterator[Finding]:
    problem = f"looking at it {outcome.failure}" if outcome.failure else outcome.result["problem"]
    if problem:
        yield Finding(
            "apex", "warning", problem, "nothing needs it: kernels.adamw_ema=auto is faster. pip uninstall apex"
        )
    else:
        yield Finding("apex", "ok", "NVIDIA's, with its CUDA extension; runs with kernels.adamw_ema=apex")


def judge_kernels(outcome: Outcome, *, gpu: bool) -> Iterator[Finding]:
    if outcome.failure:
        advice = (
            "expected a step of a small model: kernels.OPERATION=torch (block_attention: padded) goes without Triton"
        )
        yield Finding("kernels", "problem", f"training on them {outcome.failure}", advice)
        return
    facts, told = outcome.result, set[str]()
    for entry in facts["operations"]:
        name = entry["operation"] + (f" ({entry['head_dim']})" if entry["head_dim"] else "")
        if "problem" in entry:
            if entry["problem"] not in told:  # a wrong FASTJEPA_KERNELS is one of all operations
                told.add(entry["problem"])
                yield Finding(name, "problem", entry["problem"], "ask for one that is available, or for auto")
            continue
        others = "; ".join(f"{other}: {reason}" for other, reason in entry["others"].items())
        slow = gpu and entry["chosen"] != "triton" and "triton" in entry["others"]
        advice = "Triton's kernels are the fast ones on a GPU" if slow else ""
        found = entry["chosen"] + (f"; not {others}" if others else "")
        yield Finding(name, "warning" if slow else "ok", found, advice)
    difference = facts["agreement"]
    if difference is None:
        if "not_compared" in facts:  # varlen, for one, takes no fp32, in which the small model is trained
            yield Finding("kernels", "ok", f"not compared with PyTorch's plain paths: {facts['not_compared']}")
        return
    found = f"two steps of a small model give the loss of PyTorch's plain paths, to {difference:.1g}"
    if not difference <= _KERNELS_AGREE:
        advice = "do not train on them: kernels.OPERATION=torch (block_attention: padded), and please report it"
        found = f"two steps of a small model give another loss than PyTorch's plain paths, by {difference:.1%} (at most 1 %)"
        yield Finding("kernels", "problem", found, advice)
    else:
        yield Finding("kernels", "ok", found)


def judge_cpu(host: Host, threads: int, ranks: int, *, gpu: bool) -> Iterator[Finding]:
    """Args: threads: of torch, in one process; ranks: on this machine, which share the cores (train.py sees to it)."""
    if host.busy is not None and host.busy > 0.2 * host.cores:
        advice = "what is measured below is too low by that: stop them, or look again later"
        yield Finding("other processes", "warning", f"keep {host.busy:.1f} of {host.cores:g} cores busy", advice)
    given = host.omp_num_threads
    if given is None:
        threads = max(1, threads // ranks)
    found = f"{host.cores:g} cores may be used, torch computes with {threads}" + f" in each of {ranks} ranks" * (
        ranks > 1
    )
    fitting = int(host.cores) // ranks
    if ranks > max(1.0, host.cores):
        yield Finding(
            "CPU", "warning", found, f"expected a core for each rank: start {max(1, int(host.cores))}, or fewer"
        )
    elif threads > max(1, fitting):
        why = f"OMP_NUM_THREADS={given}" if given else "torch does not see the limit of this container or job"
        advice = (
            f"{why}: more threads than cores make a step many times slower: export OMP_NUM_THREADS={max(1, fitting)}"
        )
        yield Finding("CPU", "warning", found, advice)
    elif threads < fitting and given and not gpu:
        yield Finding("CPU", "ok", found, f"OMP_NUM_THREADS={given} leaves the other cores to the loader alone")
    else:
        yield Finding("CPU", "ok", found)


def judge_shm(host: Host, ranks: int, *, gpu: bool) -> Iterator[Finding]:
    """The GPUs of a machine talk through it where they have no direct way; nothing else of a run does."""
    if not gpu or ranks == 1:
        return
    free = host.shm or 0
    enough = free > 8 * _DOCKER_SHM
    advice = "" if enough else "NCCL may fail with 'No space left on device': docker run --shm-size=8g, or --ipc=host"
    yield Finding("/dev/shm", "ok" if enough else "warning", f"{free / GIB:.1f} GiB free", advice)


def judge_folders(
    output_dir: Path, cache: Path, checkpoint_bytes: int, kept: int, held: int, *, free: int | None = None
) -> Iterator[Finding]:
    """
    Args:
        kept: checkpoints that will lie there at once.
        held: bytes of those that lie there already.
        free: bytes on the disk of output_dir; None: look.
    """
    there = _nearest(output_dir)
    free = shutil.disk_usage(there).free if free is None else free
    size = (
        f"{checkpoint_bytes / GIB:.2f} GiB" if checkpoint_bytes >= GIB / 100 else f"{checkpoint_bytes / 2**20:.1f} MiB"
    )
    found = f"{output_dir}: {free / GIB:.1f} GiB free; {kept} checkpoints of {size} are kept at once"
    needed = 1.05 * kept * checkpoint_bytes - held
    if not _writable(there):
        yield Finding(
            "output_dir",
            "problem",
            f"{there} cannot be written to",
            "expected a folder of yours: choose another output_dir",
        )
    elif free < 1.05 * checkpoint_bytes:
        advice = (
            f"not even one fits: free {1.05 * checkpoint_bytes / GIB:.1f} GiB, or choose an output_dir on a larger disk"
        )
        yield Finding("output_dir", "problem", found, advice)
    elif free < needed:
        advice = f"{needed / GIB:.1f} GiB are needed: lower keep_last, or choose an output_dir on a larger disk"
        yield Finding("output_dir", "warning", found, advice)
    else:
        yield Finding("output_dir", "ok", found)
    there = _nearest(cache)
    if _writable(there):
        yield Finding("cache folder", "ok", f"{cache}: {shutil.disk_usage(there).free / GIB:.1f} GiB free")
    else:
        advice = "lists of images are made anew for each run: export FASTJEPA_CACHE=FOLDER, which you can write to"
        yield Finding("cache folder", "warning", f"{there} cannot be written to", advice)


def _nearest(path: Path) -> Path:
    """The path, or the folder above it that is there."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
