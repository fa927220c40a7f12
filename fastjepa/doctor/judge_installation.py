"""Findings about the installation and the machine, by pure functions of the facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastjepa.doctor.diagnosis import Finding, Level
from fastjepa.doctor.host_facts import HostFacts
from fastjepa.doctor.probe_process import Outcome
from fastjepa.host import GIB, MIB

INSTALL = "pip install -c constraints.txt -e '.[dali]'"
# Some runs do without these requirements; without any other, no run starts.
_OPTIONAL = ("deepspeed", "triton")
# The mean difference of an image, in levels of 255. tests/data/decode/test_decoders.py has the same bounds.
_MAX_DALI_DIFFERENCE = {"cpu": 0.3, "cuda": 1.5}
# Relative difference between the fp32 losses of two steps. TF32 matrix products stay below it, a wrong kernel does not.
_MAX_LOSS_DIFFERENCE = 1e-2
_DOCKER_SHM = 64 * MIB  # bytes of /dev/shm in a Docker container, unless it is started with another size
_PLAIN_KERNELS = "kernels.OPERATION=torch (block_attention: padded)"


def judge_host(host: HostFacts) -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{host.python} on {host.system}")
    if host.requirements is None:
        found = "fastjepa is not installed but runs from its sources, so the versions of its packages were not checked"
        yield Finding("packages", "warning", found, INSTALL)
        return
    from packaging.specifiers import SpecifierSet

    for package, (wanted, found_version) in host.requirements.items():
        if found_version is None:
            level: Level = "warning" if package in _OPTIONAL else "problem"
            yield Finding(package, level, f"not installed, expected {package}{wanted}", INSTALL)
        elif not SpecifierSet(wanted).contains(found_version, prereleases=True):
            found = f"{found_version}, expected {wanted}: this version is untested and may give wrong results"
            yield Finding(package, "warning", found, INSTALL)
    right = [
        f"{package} {found_version}"
        for package, (wanted, found_version) in host.requirements.items()
        if found_version and SpecifierSet(wanted).contains(found_version, prereleases=True)
    ]
    if right:
        yield Finding("packages", "ok", ", ".join(right))


def judge_pytorch(outcome: Outcome, host: HostFacts) -> Iterator[Finding]:
    if outcome.failure:
        advice = f"expected `import torch` and a matrix product on each GPU to work: {INSTALL}"
        yield Finding("PyTorch", "problem", f"the check of it {outcome.failure}", advice)
        return
    facts = outcome.result
    yield Finding("PyTorch", "ok", f"{facts['version']}, CUDA {facts['cuda'] or 'not built in'}")
    if problem := facts.get("import_problem"):
        yield Finding("fastjepa", "problem", f"cannot be imported: {problem}", INSTALL)
    if facts["gpus"]:
        yield from _judge_gpus(facts["gpus"], host)
    elif facts["gpu_problem"]:
        advice = (
            "expected a driver as new as this CUDA, and a GPU that is not hidden: compare nvidia-smi and "
            "CUDA_VISIBLE_DEVICES"
        )
        yield Finding("GPU", "warning", f"none can be used: {facts['gpu_problem']}", advice)
    elif host.nvidia_driver and not facts["cuda"]:
        found = f"not used: there is a driver ({host.nvidia_driver}), but this PyTorch is built for CPUs only"
        advice = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
        yield Finding("GPU", "warning", found, advice)
    else:
        yield Finding("GPU", "ok", "none: the run trains on the CPU, which is enough to try things out only")


def _judge_gpus(gpus: list[dict[str, Any]], host: HostFacts) -> Iterator[Finding]:
    for index, gpu in enumerate(gpus):
        name = f"GPU {index}"
        capability = "{}.{}".format(*gpu["capability"])
        memory = f"{gpu['free'] / GIB:.1f} of {gpu['memory'] / GIB:.1f} GiB free"
        found = f"{gpu['name']}, compute capability {capability}, {memory}"
        if gpu["capability"] < [8, 0]:
            advice = (
                "expected compute capability 8.0 or newer for bf16 and the Triton kernels: PyTorch's slower fp32 paths run "
                "instead"
            )
            yield Finding(name, "warning", found, advice)
        elif gpu["free"] < 0.9 * gpu["memory"]:
            yield Finding(name, "warning", found, "another process holds the rest: end it (nvidia-smi names it)")
        else:
            yield Finding(name, "ok", found)
    yield Finding("GPU driver", "ok", host.nvidia_driver or "its version is not visible here")


def judge_deepspeed(outcome: Outcome, *, needed: bool) -> Iterator[Finding]:
    """
    Args:
        needed: the run is started with --ds_config.
    """
    if outcome.failure:
        advice = f"expected `import deepspeed` to work: {INSTALL}. Without --ds_config a run does not need DeepSpeed"
        yield Finding("DeepSpeed", "problem" if needed else "warning", f"importing it {outcome.failure}", advice)
    else:
        yield Finding("DeepSpeed", "ok", "can be imported")


def judge_dali(outcome: Outcome, *, loader: str, gpu: bool) -> Iterator[Finding]:
    """
    Args:
        loader: data.loader; `auto` decodes with DALI on a GPU only.
    """
    used = loader == "dali" or (loader == "auto" and gpu)
    level: Level = "problem" if loader == "dali" else "warning" if used else "ok"
    unused = "" if used else f"; data.loader={loader} does not use it" + (" on a CPU" if loader == "auto" else "")
    facts = outcome.result
    if outcome.failure or facts["problem"]:
        found = facts.get("problem") or f"decoding with it {outcome.failure}"
        if outcome.failure and used:
            level = "problem"  # training would fail in the same way
        advice = (
            f"decode on the CPU with data.loader=turbo, or install DALI (Linux): {INSTALL}" if level != "ok" else ""
        )
        yield Finding("DALI", level, found + unused, advice)
        return
    device, bound = facts["device"], _MAX_DALI_DIFFERENCE[facts["device"]]
    if facts["spread"] or facts["difference"] > bound:
        found = (
            f"decodes wrongly on the {device}: an image differs from libjpeg-turbo's by {facts['difference']:.2f} of 255 on "
            f"average (expected at most {bound}), and pixels differ between two rounds of DALI by up to "
            f"{facts['spread']:.0f} (expected 0)"
        )
        advice = "leave the hardware decoder out with data.hw_decoder_load=0, or DALI with data.loader=turbo"
        yield Finding("DALI", "problem" if used else "warning", found + unused, advice)
    else:
        found = f"decodes like libjpeg-turbo on the {device} (means differ by {facts['difference']:.2f} of 255)"
        yield Finding("DALI", "ok", found + unused)


def judge_apex(outcome: Outcome) -> Iterator[Finding]:
    problem = f"the check of it {outcome.failure}" if outcome.failure else outcome.result["problem"]
    if problem:
        advice = "fastjepa does not need it, and kernels.adamw_ema=auto is faster: pip uninstall apex"
        yield Finding("apex", "warning", problem, advice)
    else:
        yield Finding("apex", "ok", "NVIDIA's, with its CUDA extension; runs with kernels.adamw_ema=apex")


def judge_kernels(outcome: Outcome, *, gpu: bool) -> Iterator[Finding]:
    if outcome.failure:
        advice = f"expected two training steps of a small model: {_PLAIN_KERNELS} does without Triton"
        yield Finding("kernels", "problem", f"training a small model on them {outcome.failure}", advice)
        return
    facts, told = outcome.result, set[str]()
    for entry in facts["operations"]:
        name = entry["operation"] + (f" ({entry['head_dim']})" if entry["head_dim"] else "")
        if "problem" in entry:
            if entry["problem"] not in told:  # a wrong FASTJEPA_KERNELS gives the same problem for every operation
                told.add(entry["problem"])
                yield Finding(name, "problem", entry["problem"], "ask for one that is available, or for auto")
            continue
        heads = f" for head dim {entry['head_dim']}" if entry["head_dim"] else ""
        others = "".join(f"; not on {other}: {reason}" for other, reason in entry["others"].items())
        slow = gpu and entry["chosen"] != "triton" and "triton" in entry["others"]
        advice = "the Triton kernels are the fast ones on a GPU: remove what keeps them from running" if slow else ""
        yield Finding(name, "warning" if slow else "ok", f"runs on {entry['chosen']}{heads}{others}", advice)
    difference = facts["agreement"]
    if difference is None:
        if "not_compared" in facts:  # for example: varlen takes no fp32, the dtype in which the small model is trained
            yield Finding("kernels", "ok", f"not compared with plain PyTorch: {facts['not_compared']}")
        return
    if not difference <= _MAX_LOSS_DIFFERENCE:  # NaN counts as a difference
        found = (
            "two training steps of a small model give another loss than plain PyTorch: the relative difference is "
            f"{difference:.1%} (expected at most {_MAX_LOSS_DIFFERENCE:.0%})"
        )
        advice = f"do not train on these kernels: use {_PLAIN_KERNELS}, and please report it"
        yield Finding("kernels", "problem", found, advice)
    else:
        found = (
            f"two training steps of a small model give the loss of plain PyTorch (relative difference {difference:.1g})"
        )
        yield Finding("kernels", "ok", found)


def judge_cpu(host: HostFacts, threads: int, ranks: int, *, gpu: bool) -> Iterator[Finding]:
    """
    Args:
        threads: threads that torch computes with in a single process.
        ranks: ranks on this machine. They share the cores: unless OMP_NUM_THREADS is set, train.py divides the threads.
    """
    if host.cores_taken is not None and host.cores_taken > 0.2 * host.cores:
        advice = "they slow down all that is measured below: stop them, or run the doctor again later"
        found = f"keep {host.cores_taken:.1f} of {host.cores:g} cores busy"
        yield Finding("other processes", "warning", found, advice)
    given = host.omp_num_threads
    if given is None:
        threads = max(1, threads // ranks)
    each = f" in each of {ranks} ranks" if ranks > 1 else ""
    found = f"{host.cores:g} cores may be used, torch computes with {threads} thread{'s' * (threads != 1)}{each}"
    fitting = int(host.cores) // ranks
    if ranks > max(1.0, host.cores):
        advice = f"expected a core for each rank: start at most {max(1, int(host.cores))}"
        yield Finding("CPU", "warning", found, advice)
    elif threads > max(1, fitting):
        why = (
            f"OMP_NUM_THREADS={given} is too high" if given else "torch does not see the limit of this container or job"
        )
        advice = (
            f"{why}; more threads than cores make a step many times slower: export OMP_NUM_THREADS={max(1, fitting)}"
        )
        yield Finding("CPU", "warning", found, advice)
    elif threads < fitting and given and not gpu:
        yield Finding("CPU", "ok", found, f"OMP_NUM_THREADS={given} leaves the other cores to the loader")
    else:
        yield Finding("CPU", "ok", found)


def judge_shm(host: HostFacts, ranks: int, *, gpu: bool) -> Iterator[Finding]:
    """Judge the size of /dev/shm, through which GPUs without a direct link talk; a run uses it for nothing else."""
    if not gpu or ranks == 1:
        return
    free = host.shm_free or 0
    enough = free > 8 * _DOCKER_SHM
    advice = "" if enough else "NCCL may fail with 'No space left on device': docker run --shm-size=8g, or --ipc=host"
    yield Finding("/dev/shm", "ok" if enough else "warning", f"{free / GIB:.1f} GiB free", advice)
