"""Parse Triton's intermediate representation as it is printed, as far as needed to follow a kernel's integers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(eq=False)
class Region:
    """A block of operations: a kernel's body, or the body of a loop or branch."""

    arguments: dict[str, str] = field(default_factory=dict)
    """Name -> type."""
    operations: list[Operation] = field(default_factory=list)


@dataclass(eq=False)
class Operation:
    """One operation: `%r, ... = name operands : types`, with the regions inside of it."""

    name: str
    text: str
    results: list[str]
    operands: list[str]
    location: str
    types: str
    regions: list[Region]

    @property
    def bits(self) -> int:
        """Bits of the result's integers, or 0. The last printed type is the result's, except for loads and comparisons."""
        if self.name in ("arith.cmpi", "arith.cmpf"):
            return 1
        return integer_bits(self.types, pointed_to=self.name == "tt.load")

    @property
    def bits_from(self) -> int:
        """Bits of a conversion's operand."""
        return integer_bits(self.types.partition(" to ")[0])


def integer_bits(types: str, *, pointed_to: bool = False) -> int:
    """Bits of the last type if it is an integer (or, if `pointed_to`, a pointer to integers), else 0."""
    if types.endswith("index"):
        return 64
    found = re.search(r"ptr<i(\d+)>+$" if pointed_to else r"(?:^|x|\W)(?<!ptr<)i(\d+)>?$", types)
    return int(found[1]) if found else 0


_VALUE = r"%[\w$.-]+(?:#\d+)?"
_RESULTS = re.compile(r"^((?:%[\w$.-]+(?::\d+)?(?:, )?)+) = ")
_LOCATION = re.compile(r" loc\((.*)\)$")


class _Scopes:
    """Makes names unique, because regions may define the same name again."""

    def __init__(self) -> None:
        self._scopes: list[dict[str, str]] = [{}]
        self._used: set[str] = set()

    def enter(self) -> None:
        self._scopes.append({})

    def leave(self) -> None:
        self._scopes.pop()

    def define(self, name: str) -> str:
        unique = name
        while unique in self._used:
            unique += "'"
        self._used.add(unique)
        self._scopes[-1][name] = unique
        return unique

    def look_up(self, name: str) -> str:
        return next(scope[name] for scope in reversed(self._scopes) if name in scope)


def parse(text: str) -> tuple[dict[str, str], Region, dict[str, str]]:
    """Parse a kernel: its arguments with their types, its body, and the locations by name. Braces nest the lines."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))
    lines = [line.strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("tt.func public"))
    scopes = _Scopes()
    signature = {
        scopes.define(name): kind for name, kind in re.findall(rf"({_VALUE}): (!tt\.ptr<\w+|\w+)", lines[start])
    }
    body = Region()
    stack: list[tuple[Region, Operation | None]] = [(body, None)]
    for line in lines[start + 1 :]:
        found = _LOCATION.search(line)
        location, line = (found[1], line[: found.start()]) if found else ("", line)
        region, parent = stack[-1]
        if line.startswith("^"):  # arguments of a region, or of a block that early returns branch to
            for name, kind in re.findall(rf"({_VALUE}): (\S+?)(?= loc|,|\))", line):
                region.arguments[scopes.define(name)] = kind
        elif line.startswith("}"):
            if parent is None:
                break
            stack.pop()
            scopes.leave()
            if line.endswith("{"):  # } else {
                parent.regions.append(Region())
                stack.append((parent.regions[-1], parent))
                scopes.enter()
            else:
                parent.types = line.partition(" : ")[2] or parent.types
        elif line:
            operation = _parse_operation(line, location, scopes)
            region.operations.append(operation)
            if line.endswith("{"):
                stack.append((operation.regions[0], operation))
    return signature, body, locations


def _parse_operation(line: str, location: str, scopes: _Scopes) -> Operation:
    """Parse one line. If the operation has a region, its scope is left open."""
    found = _RESULTS.match(line)
    rest = line[found.end() :] if found else line
    name = re.match(r'"?([\w.]+)', rest)
    assert name, f"not an operation: {line}"
    head, _, types = rest.removesuffix("{").rpartition(" : ") if " : " in rest else (rest, "", "")
    operands = re.findall(_VALUE, head)
    loop = {"scf.for": {0, *range(4, len(operands), 2)}, "scf.while": set(range(0, len(operands), 2))}
    defined = loop.get(name[1], set())  # positions of the names that the loop gives to its variables
    uses = {i: scopes.look_up(operand) for i, operand in enumerate(operands) if i not in defined}
    results: list[str] = []
    for result in found[1].split(", ") if found else ():
        base, _, count = result.partition(":")
        results += [scopes.define(f"{base}#{i}") for i in range(int(count))] if count else [scopes.define(base)]
    regions = [Region()] if line.endswith("{") else []
    if regions:
        scopes.enter()
    unique = [uses[i] if i in uses else scopes.define(operand) for i, operand in enumerate(operands)]
    return Operation(name[1], rest, results, unique, location, types.strip(), regions)
