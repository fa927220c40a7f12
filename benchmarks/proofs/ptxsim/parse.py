"""Parse PTX text to a list of instructions, as far as Triton's back-end writes it: one entry function, no calls."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath


@dataclass(frozen=True)
class Instruction:
    """One statement of PTX, for example `@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd3+8];`."""

    text: str
    predicate: str | None
    """The register that switches it on (`%p1`) or off (`!%p1`), or None."""
    opcode: str
    """The first word: `ld`."""
    modifiers: tuple[str, ...]
    """The words after it: `("global", "v2", "b32")`."""
    operands: tuple[str, ...]
    """`("{%r1, %r2}", "[%rd3+8]")`."""
    source: str
    """Its place in the kernel's source: `file.py:12:8`."""

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    def __str__(self) -> str:
        return f"`{self.text}` ({self.source})"


@dataclass
class Program:
    """The entry function of a PTX module."""

    threads: int
    """Threads of a CTA."""
    parameters: list[tuple[str, str]]
    """(name, type) of each parameter, in order."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Label -> index of the instruction that it marks."""
    register_types: dict[str, str] = field(default_factory=dict)
    """Name -> type. Numbered registers stand under their stem: `%r` for all `%r<n>`."""

    def register_type(self, name: str) -> str | None:
        """b16, b32, b64 or pred; None if `name` is not a register."""
        return self.register_types.get(name) or self.register_types.get(name.rstrip("0123456789"))


_ENTRY = re.compile(r"\.entry\s+\w+\s*\((?P<parameters>.*?)\)(?P<directives>.*?)\n\{\n?(?P<body>.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(?P<type>\w+)\s.*?(?P<name>\w+)$", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>.+)")
_LOCATION = re.compile(r"\.loc\s+\d+\s+(?P<line>\d+)\s+(?P<column>\d+)[^/]*(?://\s*(?P<source>[^\s@]+))?")
_LABEL = re.compile(r"([$\w]+):\s*")
_STATEMENT = re.compile(r"(?:@(?P<predicate>!?[%\w]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL)


def parse(ptx: str) -> Program:
    """Parse the module's first entry function.

    Raises:
        NotImplementedError: the kernel needs local memory, has no number of threads, or has a statement that is not
        understood.
    """
    entry = _ENTRY.search(ptx)
    threads = entry and re.search(r"\.reqntid\s+(\d+)", entry["directives"])
    if not entry or not threads:
        raise NotImplementedError("expected a PTX entry function with .reqntid")
    program = Program(int(threads[1]), list(_parameters(entry["parameters"])))
    source = "?"
    for line in entry["body"].splitlines():
        if location := _LOCATION.search(line):
            source = PurePath(location["source"] or f"?:{location['line']}:{location['column']}").name
            continue
        for statement in re.sub(r"//.*", "", line).split(";"):
            _add(program, statement.strip(), source)
    return program


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    for piece in text.split(","):
        if piece.strip():
            parameter = _PARAMETER.search(piece.strip())
            if not parameter:
                raise NotImplementedError(f"PTX parameter {piece.strip()}")
            yield parameter["name"], parameter["type"]


def _add(program: Program, statement: str, source: str) -> None:
    statement = statement.lstrip("{} \t")  # the scopes around inline assembly
    while label := _LABEL.match(statement):
        program.labels[label[1]] = len(program.instructions)
        statement = statement[label.end() :].lstrip("{} \t")
    if registers := _REGISTERS.match(statement):
        for name in registers["names"].split(","):
            name = name.split("<")[0].strip()
            if program.register_types.setdefault(name, registers["type"]) != registers["type"]:
                raise NotImplementedError(f"PTX register {name} of two types")
    elif statement.startswith(".local"):
        raise NotImplementedError(f"PTX local memory: {statement}")
    elif statement and not statement.startswith("."):
        parts = _STATEMENT.fullmatch(" ".join(statement.split()))
        if not parts:
            raise NotImplementedError(f"PTX statement {statement}")
        opcode, *modifiers = parts["opcode"].split(".")
        operands = tuple(split_operands(parts["operands"]))
        program.instructions.append(
            Instruction(parts[0], parts["predicate"], opcode, tuple(modifiers), operands, source)
        )


def split_operands(text: str) -> list[str]:
    """Split "a, {b, c}, [d+4]" at its outer commas."""
    return [piece.strip() for piece in re.split(r",(?![^{\[]*[}\]])", text) if piece.strip()]


def elements(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or of the lone `%r1`."""
    return split_operands(operand.strip("{} "))
