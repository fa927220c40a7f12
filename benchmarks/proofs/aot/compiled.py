"""Read what the compiler made of a kernel from its machine code, without a GPU or a CUDA toolkit.

The disassembler is the one inside the triton wheel. ptxas's log has what the code does not show: registers, spilled
bytes, and whether ptxas had to serialize asynchronous matrix instructions.
"""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.runtime.cache import get_cache_manager


class Processor(NamedTuple):
    """Resources of a streaming multiprocessor, from the CUDA C++ programming guide, section on compute capabilities."""

    warps: int
    blocks: int
    registers: int
    shared_bytes: int
    shared_bytes_per_block: int
    tensor_memory_columns: int


PROCESSORS = {
    "sm_80": Processor(64, 32, 65536, 164 << 10, 163 << 10, 0),
    "sm_90": Processor(64, 32, 65536, 228 << 10, 227 << 10, 0),
    "sm_100": Processor(64, 32, 65536, 228 << 10, 227 << 10, 512),
}
GFX942_SHARED_BYTES = 64 << 10
GFX942_WARPS = 32  # of 64 lanes, on four SIMD units
REGISTER_UNIT = 256  # a warp gets registers in multiples of it
SHARED_UNIT = 128  # a block gets bytes of shared memory in multiples of it
SHARED_RESERVED = 1024  # bytes per block that the driver takes


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration, compiled for one target."""

    kernel: str
    target: str
    num_warps: int
    registers: int
    """Registers of a thread (AMD: vector registers, accumulators included)."""
    spill_bytes: int
    """Bytes spilled by stores and loads in the code, each counted once even in a loop."""
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    fits: bool
    """True if the target can run it: shared and tensor memory suffice, and the code is not the stub of a failed ptxas."""
    blocks_per_sm: int
    limited_by: str
    instructions: int
    mma: int
    mma_family: str
    loads: dict[int, int]
    """Bytes per thread -> number of instructions that read global memory, asynchronous copies included."""
    stores: dict[int, int]
    """The same for instructions that write global memory."""
    async_copies: int
    wide_fraction: float
    """Share of the global reads and writes that move at least 16 bytes per thread."""
    notes: tuple[str, ...]
    """ptxas's remarks on code that works but is slow."""
    compile_seconds: float


def blocks_per_sm(
    processor: Processor, num_warps: int, registers: int, shared_bytes: int, columns: int
) -> dict[str, int]:
    """The number of a kernel's blocks that fit into each resource of a multiprocessor; the least of them is resident."""
    registers_per_warp = math.ceil(max(registers, 1) * 32 / REGISTER_UNIT) * REGISTER_UNIT
    warps = processor.registers // registers_per_warp // 4 * 4  # four schedulers hold equally many
    shared = math.ceil((shared_bytes + SHARED_RESERVED) / SHARED_UNIT) * SHARED_UNIT
    limits = {
        "warps": processor.warps // num_warps,
        "blocks": processor.blocks,
        "registers": warps // num_warps,
        "shared memory": processor.shared_bytes // shared if shared_bytes <= processor.shared_bytes_per_block else 0,
    }
    if columns:
        limits["tensor memory"] = processor.tensor_memory_columns // columns
    return limits


@dataclass(frozen=True)
class Facts:
    """The facts that are kept of a compilation: log and time would be lost, and disassembling takes half a second."""

    log: str
    seconds: float
    opcodes: dict[str, int]
    """Opcode -> how often it stands in the machine code."""


class Compilations:
    """Watches compilations inside `watched` and keeps their facts in Triton's cache, beside the kernel."""

    _FILE = "facts.json"

    def __init__(self) -> None:
        self._printed = io.StringIO()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Collect the facts of what is compiled inside. Triton prints ptxas's log, so nothing printed inside is shown."""
        before = knobs.nvidia.dump_ptxas_log, knobs.compilation.listener
        knobs.nvidia.dump_ptxas_log, knobs.compilation.listener = True, self._compiled
        try:
            with redirect_stdout(self._printed):
                yield
        finally:
            knobs.nvidia.dump_ptxas_log, knobs.compilation.listener = before

    def _compiled(
        self, *, metadata: dict[str, Any], metadata_group: dict[str, str], times: Any, cache_hit: bool, **_: Any
    ) -> None:
        log = self._printed.getvalue()
        self._printed.seek(0)
        self._printed.truncate()
        if not cache_hit:
            files = {Path(path).suffix: Path(path) for path in metadata_group.values()}
            opcodes = _sass_opcodes(files[".cubin"]) if ".cubin" in files else _amd_opcodes(files[".amdgcn"])
            facts = Facts(log, round(times.total / 1e6, 2), opcodes)
            get_cache_manager(metadata["hash"]).put(json.dumps(asdict(facts)), self._FILE, binary=False)

    def facts(self, kernel: Any) -> Facts:
        """The facts of a kernel, whether it was compiled inside `watched` or by another process before."""
        cache = get_cache_manager(kernel.hash)
        if cache.get_file(self._FILE) is None:  # another process compiled it: compile it again, watched
            always, knobs.compilation.always_compile = knobs.compilation.always_compile, True
            try:
                with self.watched():
                    triton.compile(kernel.src, target=kernel.metadata.target, options=_options(kernel))
            finally:
                knobs.compilation.always_compile = always
        path = cache.get_file(self._FILE)
        assert path is not None, f"{kernel.metadata.name} has another hash when compiled again"
        return Facts(**json.loads(Path(path).read_text()))


def _options(kernel: Any) -> dict[str, Any]:
    """The options that were passed to the compiler, as tuples again where JSON made lists of them.

    extern_libs is left out, because Triton adds it itself. It names paths in the installation that compiled the
    kernel first, which may be gone; Triton hashes what these files hold, not where they lie.
    """
    fields = kernel.metadata._asdict()
    del fields["extern_libs"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.M)


def _sass_opcodes(cubin: Path) -> dict[str, int]:
    code = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", cubin], check=True, capture_output=True, text=True).stdout
    return dict(Counter(opcode for opcode in _SASS_LINE.findall(code) if opcode != "NOP"))


def _amd_opcodes(assembly: Path) -> dict[str, int]:
    return dict(Counter(re.findall(r"^\s+([a-z][a-z0-9_]+)\s", assembly.read_text(), re.M)))


def _bytes_per_thread(opcode: str) -> int:
    """Bytes per thread of a memory instruction such as LDG.E.128.CONSTANT or STG.E.U16."""
    for part in opcode.split(".")[1:]:
        if part in ("64", "128", "256"):
            return int(part) // 8
        if part in ("U16", "S16", "16"):
            return 2
        if part in ("U8", "S8"):
            return 1
    return 4


_MMA_FAMILIES = {"mma": r"[HIQDO]MMA", "wgmma": r"[HIQ]GMMA", "tcgen05": r"UT[A-Z]*MMA"}
_BULK = "UTMA|UBLKCP"  # the tensor memory accelerator, which moves whole rows for one thread
_SLOW = re.compile(r"(?:warning|info)\s*:\s*(.*(?:Potential|serializ|setmaxnreg).*)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def analyse(kernel: Any, target: str, facts: Facts) -> Compiled:
    """Analyse a triton CompiledKernel with its facts from `Compilations.facts`."""
    return _analyse_amd(kernel, target, facts) if target.startswith("gfx") else _analyse_nvidia(kernel, target, facts)


def _widths(opcodes: dict[str, int], pattern: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        if re.match(pattern, opcode):
            widths[_bytes_per_thread(opcode)] += count
    return dict(sorted(widths.items(), reverse=True))


def _count(opcodes: dict[str, int], pattern: str) -> int:
    return sum(count for opcode, count in opcodes.items() if re.match(pattern, opcode))


def _wide_fraction(loads: dict[int, int], stores: dict[int, int], bulk: int = 0) -> float:
    total = sum(loads.values()) + sum(stores.values()) + bulk
    wide = sum(count for widths in (loads, stores) for width, count in widths.items() if width >= 16) + bulk
    return round(wide / total, 3) if total else 0.0


def _limiters(limits: dict[str, int]) -> str:
    fewest = min(limits.values())
    return ", ".join(name for name, blocks in limits.items() if blocks == fewest)


def _analyse_nvidia(kernel: Any, target: str, facts: Facts) -> Compiled:
    metadata, processor = kernel.metadata, PROCESSORS[target]
    spills, used = _SPILLS.search(facts.log), _REGISTERS.search(facts.log)
    assert spills, f"ptxas's log of {metadata.name} says nothing of spills: {facts.log!r}"
    assert used, f"ptxas's log of {metadata.name} says nothing of registers: {facts.log!r}"
    opcodes, registers = facts.opcodes, int(used[1])
    columns = getattr(metadata, "tmem_size", None) or 0
    limits = blocks_per_sm(processor, metadata.num_warps, registers, metadata.shared, columns)
    fewest = min(limits.values())
    loads, stores = _widths(opcodes, r"LDG(?!DEPBAR)"), _widths(opcodes, "STG")
    families = {name: _count(opcodes, pattern) for name, pattern in _MMA_FAMILIES.items()}
    return Compiled(
        kernel=metadata.name,
        target=target,
        num_warps=metadata.num_warps,
        registers=registers,
        spill_bytes=int(spills[2]) + int(spills[3]),
        stack_bytes=int(spills[1]),
        shared_bytes=metadata.shared,
        tensor_memory_columns=columns,
        fits=fewest > 0 and sum(opcodes.values()) > 8,
        blocks_per_sm=fewest,
        limited_by=_limiters(limits),
        instructions=sum(opcodes.values()),
        mma=sum(families.values()),
        mma_family=", ".join(name for name, count in families.items() if count),
        loads=loads,
        stores=stores,
        async_copies=_count(opcodes, "LDGSTS|" + _BULK),
        wide_fraction=_wide_fraction(loads, stores, _count(opcodes, _BULK)),
        notes=tuple(sorted(set(_SLOW.findall(facts.log)))),
        compile_seconds=facts.seconds,
    )


_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_[us]?(dword|short|byte)(?:x(\d))?")


def _amd_widths(opcodes: dict[str, int], kind: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        access = _AMD_ACCESS.match(opcode)
        if access and access[1] == kind:
            widths[{"dword": 4, "short": 2, "byte": 1}[access[2]] * int(access[3] or 1)] += count
    return dict(sorted(widths.items(), reverse=True))


def _analyse_amd(kernel: Any, target: str, facts: Facts) -> Compiled:
    """Read what LLVM writes into the assembly. Its occupancy is in waves per SIMD unit; a compute unit has four of these."""
    metadata, text = kernel.metadata, kernel.asm["amdgcn"]

    def stated(pattern: str) -> int:
        match = re.search(pattern, text)
        assert match, f"no {pattern} in the assembly of {metadata.name}"
        return int(match[1])

    opcodes = facts.opcodes
    loads, stores = _amd_widths(opcodes, "load"), _amd_widths(opcodes, "store")
    waves = 4 * stated(r"; Occupancy:\s*(\d+)")
    limits = {
        "warps" if waves == GFX942_WARPS else "registers": waves // metadata.num_warps,
        "shared memory": GFX942_SHARED_BYTES // max(metadata.shared, 1),
    }
    fewest = min(limits.values())
    mma = _count(opcodes, "v_mfma")
    return Compiled(
        kernel=metadata.name,
        target=target,
        num_warps=metadata.num_warps,
        registers=stated(r"\.vgpr_count:\s*(\d+)"),
        spill_bytes=4 * stated(r"\.vgpr_spill_count:\s*(\d+)"),
        stack_bytes=stated(r"\.private_segment_fixed_size:\s*(\d+)"),
        shared_bytes=metadata.shared,
        tensor_memory_columns=0,
        fits=metadata.shared <= GFX942_SHARED_BYTES,
        blocks_per_sm=fewest,
        limited_by=_limiters(limits),
        instructions=sum(opcodes.values()),
        mma=mma,
        mma_family="mfma" if mma else "",
        loads=loads,
        stores=stores,
        async_copies=0,
        wide_fraction=_wide_fraction(loads, stores),
        notes=(),
        compile_seconds=facts.seconds,
    )


def resident_fraction(compiled: Compiled) -> float:
    """Resident warps as a share of those that a multiprocessor can hold."""
    most = PROCESSORS[compiled.target].warps if compiled.target in PROCESSORS else GFX942_WARPS
    return compiled.blocks_per_sm * compiled.num_warps / most
