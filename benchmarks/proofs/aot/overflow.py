"""Find address arithmetic of a kernel that can overflow 32 bits, for all sizes at once, from the kernel's Triton IR.

Every integer of the kernel gets an interval. Program ids, arguments and values read from index tensors get the bounds
that limits.py states, constants and ranges get exact ones, and the rest follows by propagation. An addition,
subtraction, multiplication, shift or truncation is an overflow if its exact result may leave its 32-bit type and if a
pointer offset, a mask or a loop bound is computed from it. An operation that is not understood gets the full range of
its type, so the check may complain too often but not too rarely.

Random generators wrap on purpose. Their words are told from addresses by the operations that they pass: an exclusive
or, the high half of a product, or a conversion from unsigned. The check does not follow a value through these, so
keep index arithmetic signed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from benchmarks.proofs.aot.ttir import Operation, Region, integer_bits, parse


class Interval(NamedTuple):
    """Integers from low to high, both included."""

    low: int
    high: int

    def __or__(self, other: Interval) -> Interval:
        return Interval(min(self.low, other.low), max(self.high, other.high))

    def within(self, other: Interval) -> bool:
        return other.low <= self.low and self.high <= other.high


def full(bits: int) -> Interval:
    """All values of a signed integer type; 0 and 1 for one bit."""
    return Interval(0, 1) if bits == 1 else Interval(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


GRID = {"x": Interval(0, (1 << 31) - 2), "y": Interval(0, 65534), "z": Interval(0, 65534)}  # CUDA's own limits


@dataclass(frozen=True)
class Overflow:
    """An operation whose result may leave its type."""

    kernel: str
    line: str
    """file:line of the Python source."""
    operation: str
    interval: Interval

    def __str__(self) -> str:
        return f"{self.line}: {self.operation} may be {self.interval.low:,} to {self.interval.high:,}"


def _corners(function: Callable[[int, int], int]) -> Callable[[Interval, Interval], Interval]:
    """Lift a function that is monotonic in each argument from integers to intervals."""

    def apply(a: Interval, b: Interval) -> Interval:
        values = [function(x, y) for x in a for y in b]
        return Interval(min(values), max(values))

    return apply


def _divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)  # towards zero


def _remainder(a: Interval, b: Interval) -> Interval:
    most = max(abs(b.low), abs(b.high)) - 1
    return Interval(max(a.low, -most) if a.low < 0 else 0, min(a.high, most) if a.high > 0 else 0)


# Intervals of exact results, first of the operations that can wrap, then of those that cannot. The caller checks
# divisors and shifts.
_WRAPPING: dict[str, Callable[[Interval, Interval], Interval]] = {
    "arith.addi": _corners(lambda a, b: a + b),
    "arith.subi": _corners(lambda a, b: a - b),
    "arith.muli": _corners(lambda a, b: a * b),
    "arith.shli": _corners(lambda a, b: a << b),
}
_BOUNDED: dict[str, Callable[[Interval, Interval], Interval]] = {
    "arith.minsi": _corners(min),
    "arith.maxsi": _corners(max),
    "arith.divsi": _corners(_divide),
    "arith.ceildivsi": _corners(lambda a, b: -(-a // b)),
    "arith.remsi": _remainder,
    "arith.shrsi": _corners(lambda a, b: a >> b),
}
_IF_NOT_NEGATIVE: dict[str, Callable[[Interval, Interval], Interval]] = {  # these read their operands as unsigned
    "arith.divui": _BOUNDED["arith.divsi"],
    "arith.remui": _remainder,
    "arith.shrui": _BOUNDED["arith.shrsi"],
    "arith.minui": _BOUNDED["arith.minsi"],
    "arith.maxui": _BOUNDED["arith.maxsi"],
    "arith.ori": lambda a, b: Interval(0, (1 << max(a.high, b.high).bit_length()) - 1),
}
_SAME = {
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.gather", "tt.bitcast",
    "arith.extsi", "arith.index_cast",
}  # fmt: skip
_ENDS = {"tt.load", "tt.mulhiui", "tt.atomic_rmw", "tt.atomic_cas", "tt.get_program_id", "tt.get_num_programs"}


def _ends_flow(operation: Operation) -> bool:
    """True if the result counts as a new number, so that a wrapped operand is not followed further."""
    if operation.name == "arith.extui":
        return operation.bits_from > 1
    return operation.name in _ENDS or (operation.name == "arith.xori" and operation.bits > 1)


class _Analysis:
    def __init__(self, text: str, bounds: Mapping[str, Interval]) -> None:
        signature, self._body, self._locations = parse(text)
        self._bounds = bounds
        self._values: dict[str, Interval] = {}
        self._bits: dict[str, int] = {}
        self._pointees: dict[str, str] = {}  # pointer -> the argument it was made from
        self._overflows: dict[str, tuple[Operation, Interval]] = {}  # by the first result of the operation
        self._sources: dict[str, set[str]] = {}  # value -> those it was computed from
        self._addresses: set[str] = set()
        for name, kind in self._body.arguments.items():  # of blocks that are jumped to
            self._set_argument(name, kind)
        for name, kind in signature.items():
            if kind.startswith("!tt.ptr"):
                self._pointees[name] = name.removeprefix("%")
            else:
                self._set_argument(name, kind, self._stated(name.removeprefix("%")))
        self._run(self._body)

    def overflows(self, kernel: str) -> Iterator[Overflow]:
        reached, frontier = set[str](), list(self._addresses)
        while frontier:
            value = frontier.pop()
            if value not in reached:
                reached.add(value)
                frontier += self._sources.get(value, ())
        for value, (operation, interval) in self._overflows.items():
            if value in reached:
                yield Overflow(kernel, self._line(operation.location), operation.name, interval)

    def _stated(self, name: str) -> Interval | None:
        return next((bound for pattern, bound in self._bounds.items() if fnmatchcase(name, pattern)), None)

    def _line(self, location: str) -> str:
        """The source line of a location: the innermost one if calls were inlined."""
        while location in self._locations or re.search(r'^(?:callsite\()?(#loc\d*)|^"[^"]*"\((#loc\d*)\)', location):
            found = re.search(r"#loc\d*", location)
            assert found
            location = self._locations[found[0]]
        found = re.match(r'"(?:[^"]*/)?([^"]*)":(\d+)', location)
        return f"{found[1]}:{found[2]}" if found else location

    def _set_argument(self, name: str, kind: str, value: Interval | None = None) -> None:
        """Set an argument of the kernel, or of a region that is not understood."""
        bits = integer_bits(kind)
        if bits:
            self._set(name, value or full(bits), bits, ())

    def _set(self, name: str, value: Interval, bits: int, sources: Sequence[str]) -> None:
        self._values[name], self._bits[name] = value, bits
        self._sources.setdefault(name, set()).update(sources)

    def _run(self, region: Region) -> list[str]:
        """Carry out the operations of a region; return the values that it yields."""
        for operation in region.operations:
            self._carry_out(operation)
        last = region.operations[-1:]
        return last[0].operands if last and last[0].name in ("scf.yield", "scf.condition") else []

    def _carry_out(self, operation: Operation) -> None:
        name, operands = operation.name, operation.operands
        if name == "tt.addptr":
            self._pointees[operation.results[0]] = self._pointees.get(operands[0], "")
            self._addresses.add(operands[1])
        elif name in _SAME and operands[0] in self._pointees:
            self._pointees[operation.results[0]] = self._pointees[operands[0]]
        if name in ("tt.load", "tt.store"):
            self._addresses.update(operands[1 if name == "tt.load" else 2 :][:1])  # the mask
        if name.startswith(("tt.make_tensor", "tt.advance", "tt.descriptor", "tt.atomic")):
            self._addresses.update(operands)
        if name.startswith("cf."):
            for argument in self._body.arguments:
                self._sources.setdefault(argument, set()).update(operands)
        if name == "scf.for":
            self._carry_out_for(operation)
        elif name == "scf.if":
            yields = [self._run(region) for region in operation.regions]
            for results in zip(operation.results, *yields, strict=True):
                self._join(results[0], results[1:])
        elif name in ("tt.reduce", "tt.scan"):
            self._carry_out_reduction(operation)
        elif operation.regions:
            self._forget(operation)
        elif operation.results:
            self._compute(operation)

    def _forget(self, operation: Operation) -> None:
        """Let the variables and results of an operation that is not understood, such as a while loop, be anything."""
        loops = operation.name == "scf.while"
        inputs, outputs = (re.findall(r"[^(),\s]+", kinds) for kinds in operation.types.rpartition(" -> ")[::2])
        variables = dict(zip(operation.operands[::2], inputs, strict=True)) if loops else {}
        for region in operation.regions:
            variables |= region.arguments
        for name, kind in variables.items():
            self._set_argument(name, kind)
        ends = [end for region in operation.regions for end in self._run(region)]
        variables |= dict(zip(operation.results, outputs, strict=True))
        for name, kind in variables.items():
            self._set_argument(name, kind)
            self._sources.setdefault(name, set()).update(ends, operation.operands)

    def _join(self, result: str, values: Sequence[str]) -> None:
        known = [self._values[value] for value in values if value in self._values]
        if len(known) == len(values):
            joined = known[0]
            for interval in known[1:]:
                joined |= interval
            self._set(result, joined, self._bits[values[0]], values)
        for value in values:
            if value in self._pointees:
                self._pointees[result] = self._pointees[value]

    def _carry_out_for(self, operation: Operation) -> None:
        """Run a loop to a fixed point. A bound that still moves after three rounds goes to the end of its type."""
        variable, low, high, step, *pairs = operation.operands
        self._addresses.update((variable, low, high, step))
        arguments, inits = pairs[::2], pairs[1::2]
        bits, strides = self._bits[low], self._values[step]
        first, last = self._values[low], self._values[high]
        values = Interval(first.low, max(last.high - 1, first.low)) if strides.low > 0 else full(bits)
        # Past the end the counter may wrap, and the loop would go on.
        past_end = Interval(values.low, values.high + strides.high)
        self._set_checked(operation, variable, past_end, bits, (low, high, step))
        self._set(variable, values, bits, ())
        for argument, init in zip(arguments, inits, strict=True):
            self._join(argument, (init,))
        for round_ in range(8):
            ends = self._run(operation.regions[0])
            moved = False
            for argument, end in zip(arguments, ends, strict=True):
                before, after = self._values.get(argument), self._values.get(end)
                if before is None or after is None:
                    continue
                self._sources[argument].add(end)
                if not after.within(before):
                    moved, joined, limit = True, before | after, full(self._bits[argument])
                    if round_ >= 3:
                        joined = Interval(
                            limit.low if joined.low < before.low else before.low,
                            limit.high if joined.high > before.high else before.high,
                        )
                    self._values[argument] = joined
            if not moved:
                break
        else:
            raise AssertionError(f"no fixed point: {operation.text}")
        for result, argument in zip(operation.results, arguments, strict=True):
            self._join(result, (argument,))

    def _carry_out_reduction(self, operation: Operation) -> None:
        """Sums grow by the number of elements, minima and maxima keep the interval, other results may be anything."""
        bits, steps = operation.bits, {inner.name for inner in operation.regions[0].operations}
        for operand, result in zip(operation.operands, operation.results, strict=False):
            value = self._values.get(operand)
            if value is None:
                continue
            if steps <= {"arith.addi", f"{operation.name}.return"}:
                count = self._count(operation)
                exact = Interval(min(value.low * count, value.low), max(value.high * count, value.high))
                self._set_checked(operation, result, exact, bits, (operand,))
            elif steps <= {"arith.minsi", "arith.maxsi", "arith.minui", "arith.maxui", f"{operation.name}.return"}:
                self._set(result, value, bits, (operand,))
            else:
                self._set(result, full(self._bits[operand]), self._bits[operand], operation.operands)

    @staticmethod
    def _count(operation: Operation) -> int:
        """The most elements that a reduction can add up: those of the whole tensor."""
        shape = re.search(r"tensor<([\dx]+)x", operation.types)
        assert shape, f"no shape in {operation.types}"
        count = 1
        for size in shape[1].split("x"):
            count *= int(size)
        return count

    def _set_checked(
        self, operation: Operation, result: str, exact: Interval, bits: int, sources: Sequence[str]
    ) -> None:
        """Set the result of an operation that can wrap; remember it if it leaves its type."""
        self._overflows.pop(result, None)
        if not exact.within(full(bits)):
            if 1 < bits <= 32:
                self._overflows[result] = operation, exact
            exact = full(bits)
        self._set(result, exact, bits, sources)

    def _compute(self, operation: Operation) -> None:
        name, result, bits = operation.name, operation.results[0], operation.bits
        if not bits:
            return
        values = [self._values.get(operand, full(64)) for operand in operation.operands]
        sources = () if _ends_flow(operation) else operation.operands
        if "arith.sh" in name and not values[1].within(Interval(0, bits - 1)):
            self._set(result, full(bits), bits, sources)
            return
        if name in _WRAPPING:
            self._set_checked(operation, result, _WRAPPING[name](*values), bits, sources)
            return
        if name == "arith.trunci":
            self._set_checked(operation, result, values[0], bits, sources)
            return
        value = self._bounded(operation, values) if name != "arith.constant" else self._constant(operation)
        self._set(result, value if value is not None and value.within(full(bits)) else full(bits), bits, sources)

    @staticmethod
    def _constant(operation: Operation) -> Interval | None:
        found = re.search(r"constant (?:dense<)?(-?\d+|true|false)\b", operation.text)
        return Interval(*[int({"true": 1, "false": 0}.get(found[1], found[1]))] * 2) if found else None

    def _bounded(self, operation: Operation, values: list[Interval]) -> Interval | None:
        """The interval of an operation that cannot wrap, or None if it is unknown."""
        name = operation.name
        if name == "tt.make_range":
            bounds = dict(re.findall(r"(start|end) = (\d+)", operation.text))
            return Interval(int(bounds["start"]), int(bounds["end"]) - 1)
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = re.search(r"\b([xyz])\b", operation.text)
            assert axis, operation.text
            bound = self._bounds.get(f"program_id({axis[1]})", GRID[axis[1]])
            return bound if name == "tt.get_program_id" else Interval(1, bound.high + 1)
        if name == "tt.load":
            stated = self._stated(f"*{self._pointees.get(operation.operands[0], '')}")
            # A masked load has a third operand: the value of masked elements.
            return stated | values[2] if stated and len(values) > 2 else stated
        if name == "arith.extsi" and operation.bits_from == 1:
            return Interval(-1, 0)
        if name in _SAME:
            return values[0]
        if name == "arith.select":
            return values[1] | values[2]
        if name == "arith.extui" and values[0].low >= 0:
            return values[0]
        if name == "arith.extui":
            return Interval(0, (1 << operation.bits_from) - 1)
        if name == "arith.andi" and max(value.low for value in values) >= 0:
            return Interval(0, min(value.high for value in values if value.low >= 0))
        if (
            name in ("arith.divsi", "arith.remsi", "arith.divui", "arith.remui", "arith.ceildivsi")
            and values[1].low <= 0
        ):
            return None
        if name in _BOUNDED:
            return _BOUNDED[name](*values)
        if name in _IF_NOT_NEGATIVE and min(value.low for value in values) >= 0:
            return _IF_NOT_NEGATIVE[name](*values)
        return None


def overflows(ttir: str, bounds: Mapping[str, Interval]) -> list[Overflow]:
    """The overflows of one kernel.

    Args:
        ttir: `kernel.asm["ttir"]`.
        bounds: intervals of integers by patterns of their names: "s_*" for arguments, "[*]p_index*" for what is read through
            a pointer (a star, then the argument's name), "program_id(x)" for the first axis of the grid. The first match
            counts; an integer without a bound may have any value of its type.

    Raises:
        NotImplementedError: the kernel calls a function that is not inlined.
    """
    kernel = re.search(r"tt\.func public @(\w+)", ttir)
    assert kernel, "no kernel in this IR"
    if "tt.call " in ttir:
        raise NotImplementedError(f"{kernel[1]} calls a function that is not inlined: it would go unchecked")
    return list(_Analysis(ttir, bounds).overflows(kernel[1]))
