"""What a GPU kernel's inner loop asks of a processor, counted in its machine code. Nothing is run.

A processor has four parts, each of which issues one instruction a cycle. The matrix units, the unit of special
functions (exp2) and the issue slots work side by side, so a loop takes at least as many cycles as the busiest of them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from tests.kernels.triton_aot import cuobjdump

# Products of 16-bit numbers that a part's matrix unit finishes in a cycle, by the instruction of one warp (HMMA) and
# of a warp group (HGMMA). The faster one is the datasheet's peak; HMMA's on an H100 is an assumption, after arXiv
# 2402.13499.
RATES = {"80": {"HMMA": 256}, "90": {"HMMA": 320, "HGMMA": 512}}
SPECIAL_CYCLES = 8  # of a part, for the 32 special functions of a warp: 16 a cycle and processor

_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*(?P<code>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_CONDITIONAL = re.compile(r"\*/\s+@")
_MAY_BRANCH = re.compile(r"BRA(\.\w+)* +[!~]?U?[PR]\d|BRA\.(DIV|CONV)")
_HMMA = re.compile(r"HMMA\.(\d{2})(8)(\d+)\.F32")
_HGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    code: str
    conditional: bool
    target: int | None  # of a branch

    @property
    def products(self) -> int:
        """Of one warp; a warp group's are four warps', each on a part of its own."""
        if match := _HMMA.match(self.code):
            return int(match[1]) * int(match[2]) * int(match[3])
        if match := _HGMMA.match(self.code):
            return int(match[1]) * int(match[2]) * int(match[3]) // 4
        return 0


@dataclass(frozen=True)
class Loop:
    """Cycles of one part for one turn of one warp: of the matrix unit, of special functions, and issue slots on the way
    through the loop's branches with the fewest and with the most instructions."""

    matrix: float
    special: int
    fewest: int
    most: int
    matrix_at_peak: float  # cycles that the products would take at the datasheet's rate
    instructions: str  # that multiply: HMMA, HGMMA or both

    def share(self, slots: int) -> float:
        """Of the matrix units' peak, at most."""
        return self.matrix_at_peak / max(self.matrix, self.special, slots)


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its name in the file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    out: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if "Function : " in line:
            out[line.split("Function : ")[1].strip()] = current = []
        elif match := _LINE.match(line):
            branch = (
                re.search(r"0x([0-9a-f]+)\s*$", match["rest"]) if match["code"].startswith("BRA") else None
            )
            current.append(
                Instruction(
                    int(match["address"], 16),
                    match["code"],
                    bool(_CONDITIONAL.search(line) or _MAY_BRANCH.search(line)),
                    int(branch[1], 16) if branch else None,
                )
            )
    return out


def main_loop(code: list[Instruction], arch: str) -> Loop | None:
    """Of the loops with products and none such inside, the one with the most products an instruction: it takes whole
    tiles, without masks. None where products are in no loop."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = [
        (index[x.target], i) for i, x in enumerate(code) if x.target is not None and x.target < x.address
    ]
    # Code that is seldom run stands behind the kernel's end and jumps back: no loop.
    ends = [i for i, x in enumerate(code) if x.code == "EXIT" and not x.conditional]
    spans = [(a, b) for a, b in spans if not any(a < end < b for end in ends)]
    spans = [(a, b) for a, b in spans if any(x.products for x in code[a:b])]
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)]
    loops = [_loop(code, index, *span, RATES[arch]) for span in inner]
    return max(loops, key=lambda loop: loop.matrix_at_peak / loop.fewest, default=None)


def _loop(
    code: list[Instruction], index: dict[int, int], first: int, last: int, rates: dict[str, int]
) -> Loop:
    """The ways with the most products, counted from the end. Loops inside, without products, count as one turn."""
    # products by instruction, special functions, fewest and most instructions
    ways: dict[int, tuple[tuple[int, int], int, int, int]] = {last: ((0, 0), 0, 1, 1)}
    for i in range(last - 1, first - 1, -1):
        target = index[code[i].target] if code[i].target is not None else None
        after = [i + 1] if target is None or code[i].conditional else []
        after = [ways[j] for j in (*after, target) if j in ways]
        if after:
            products = max((way[0] for way in after), key=sum)
            after = [way for way in after if way[0] == products]
            special = max(way[1] for way in after) + code[i].code.startswith("MUFU")
            fewest, most = min(way[2] for way in after), max(way[3] for way in after)
            warp, group = products
            if code[i].code.startswith("HMMA"):
                warp += code[i].products
            else:
                group += code[i].products
            ways[i] = ((warp, group), special, 1 + fewest, 1 + most)
    products, special, fewest, most = ways[first]
    done = {name: count for name, count in zip(("HMMA", "HGMMA"), products, strict=True) if count}
    return Loop(
        sum(count / rates[name] for name, count in done.items()),
        SPECIAL_CYCLES * special,
        fewest,
        most,
        sum(products) / max(rates.values()),
        " + ".join(done),
    )
