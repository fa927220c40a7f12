"""Compile every kernel of training for absent GPUs and check it against limits.py: python -m benchmarks.proofs.aot

Writes aot.json, aot.md and aot.png. --check, which CI uses, writes nothing and compiles less: the sizes of ViT-B/16 and H/14
for NVIDIA's GPUs, in all configurations for sm_90 and in the first one for the others. Exits with 1 if a limit is broken.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from fastjepa_kernels.selection import TRITON_OPERATIONS

_CHECKED_MODELS = ("B/16", "H/14")  # head dims 64, 80, 32 and 24, patches of 16 and 14 pixels, every dtype
_CHECKED_TARGETS = ("sm_80", "sm_90", "sm_100")  # for gfx942, some attention kernels compile for half a minute each
_CHECKED_CONFIGS = ("sm_90",)


def main(arguments: list[str] | None = None) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is 1, which replaces the compiler by an interpreter: unset it")
    from benchmarks.proofs.aot import output, variants

    assert __doc__
    parser = argparse.ArgumentParser(
        "python -m benchmarks.proofs.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=variants.TARGETS, help="GPUs to compile for (default: all)")
    parser.add_argument(
        "--ops", nargs="+", choices=TRITON_OPERATIONS, default=TRITON_OPERATIONS, help="operations (default: all)"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)"
    )
    parser.add_argument("--check", action="store_true", help="compile CI's selection and write no files")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder for the files (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    started = time.perf_counter()
    targets = options.targets or (_CHECKED_TARGETS if options.check else variants.TARGETS)
    all_configs = _CHECKED_CONFIGS if options.check else targets
    cases = [case for case in variants.select(options.ops) if not options.check or case.model in _CHECKED_MODELS]
    result = variants.compile_all(cases, targets, all_configs=all_configs, jobs=options.jobs)
    if not options.check:
        output.write(result, options.output)
    kernels = {variant.kernel for variant in result.variants}
    seconds = time.perf_counter() - started
    print(f"{len(result.variants)} variants of {len(kernels)} kernels from {len(cases)} cases in {seconds:.0f} s")
    broken = result.broken()
    for line in broken:
        print(f"BROKEN: {line}")
    print("all limits kept" if not broken else f"{len(broken)} limits broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
