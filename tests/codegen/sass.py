"""Reading the machine code of NVIDIA GPUs: whether a matrix product may meet a descriptor that nobody set.

ptxas 12.8 has been seen to move the computation of an operand's descriptor in front of one loop and to use it in the
loop behind as well, which is reached without the first where that has no rounds. The product then reads whatever the
uniform registers hold. Such a kernel is right or wrong depending on the mask; no value of a small test need show it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from attncompile.codegen.triton.ahead import cuobjdump

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
_UNIFORM = re.compile(r"UR(\d+)")
_PREDICATE = re.compile(r"!?U?P(\d|T)")
_WITHOUT_RESULT = ("BRA", "BRX", "EXIT", "ST", "RED", "SYNCS", "UTMALDG", "UTMASTG", "USETMAXREG", "BAR", "FENCE")


@dataclass(frozen=True)
class Instruction:
    """One instruction: address, whether it is conditional, operation, operands."""

    address: int
    conditional: bool
    operation: str
    operands: tuple[str, ...]

    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands[-1]) if self.operands else None
        return int(found[1], 16) if found else None

    def sets(self) -> frozenset[int]:
        """Uniform registers that it sets."""
        results = [operand for operand in self.operands if not _PREDICATE.fullmatch(operand)]
        found = re.fullmatch(r"UR(\d+)", results[0]) if results else None
        if found is None or self.operation.startswith(_WITHOUT_RESULT):
            return frozenset()
        pair = any(part in ("64", "WIDE", "128") for part in self.operation.split(".")) and "USHF" not in self.operation
        return frozenset(range(int(found[1]), int(found[1]) + (4 if "128" in self.operation else 2 if pair else 1)))

    def describes(self) -> frozenset[int]:
        """Uniform registers that hold the descriptors of a matrix product: two for each operand in shared memory."""
        found = next((m for operand in self.operands if (m := re.search(r"gdesc\[UR(\d+)\]", operand))), None)
        if found is None:
            return frozenset()
        first = int(found[1])
        in_registers = len(self.operands) > 1 and re.fullmatch(r"R\d+", self.operands[1]) is not None
        return frozenset(range(first + 2 if in_registers else first, first + 4))


def rounds(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between the ends of each loop with a matrix product and no such loop inside: steps over key blocks."""
    places = {each.address: number for number, each in enumerate(code)}
    found = []
    for number, each in enumerate(code):
        target = each.target() if each.operation.startswith("BRA") else None
        if target in places and target <= each.address:
            found.append((places[target], number))
    products = [number for number, each in enumerate(code) if each.operation.startswith("HGMMA")]
    multiplying = [(first, last) for first, last in found if any(first <= number <= last for number in products)]
    return [
        code[first : last + 1]
        for first, last in multiplying
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in multiplying)
    ]


def instructions(cubin: bytes) -> list[Instruction]:
    """The instructions of a kernel."""
    tool = cuobjdump()
    assert tool is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return parsed(text)


def parsed(text: str) -> list[Instruction]:
    """The instructions of a disassembly."""
    made = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            operands = tuple(part.strip() for part in match[4].split(",") if part.strip())
            made.append(Instruction(int(match[1], 16), match[2] is not None, match[3], operands))
    return made


def unset_descriptors(code: list[Instruction]) -> list[str]:
    """Matrix products whose descriptors are not set on every way to them from where their warps begin."""
    places = {each.address: number for number, each in enumerate(code)}
    following: list[list[int]] = []
    for number, each in enumerate(code):
        kind, target = each.operation.partition(".")[0], each.target()
        conditional = each.conditional or any(_PREDICATE.fullmatch(operand) for operand in each.operands)
        jumps = [places[target]] if kind == "BRA" and target in places else []
        falls = kind not in ("BRA", "BRX", "EXIT") or (conditional and kind != "BRX")
        following.append([*jumps, *([number + 1] if falls and number + 1 < len(code) else [])])
    # warps of a partition begin where a table of addresses sends them: behind the jump, and wherever nothing leads
    beginnings = {0, *(number + 1 for number, each in enumerate(code) if each.operation.startswith("BRX"))}
    while True:
        known = _set_before(code, following, beginnings)
        lost = [n for n, each in enumerate(code) if n not in known and _works(each, n, following)]
        if not lost:
            break
        beginnings.add(lost[0])
    return [
        f"{code[number].address:#x} {code[number].operation} {', '.join(code[number].operands)}"
        for number, ready in sorted(known.items())
        if not code[number].describes() <= ready
    ]


def _works(each: Instruction, number: int, following: list[list[int]]) -> bool:
    return each.operation != "NOP" and following[number] != [number]


def _set_before(
    code: list[Instruction], following: list[list[int]], beginnings: set[int]
) -> dict[int, frozenset[int]]:
    """Uniform registers that are set on every way to each instruction that is reached."""
    known: dict[int, frozenset[int]] = dict.fromkeys(beginnings, frozenset())
    waiting = list(beginnings)
    while waiting:
        number = waiting.pop()
        after = known[number] | code[number].sets()
        for each in following[number]:
            before = known.get(each)
            found = after if before is None else before & after
            if found != before:
                known[each] = found
                waiting.append(each)
    return known
