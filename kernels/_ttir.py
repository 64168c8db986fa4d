# SPDX-License-Identifier: Apache-2.0
"""What Triton's own intermediate form (TTIR, as text) says of a kernel: its loops, and offsets that could overflow."""

import re

_RESULT = re.compile(r"^\s*%([\w-]+)(?::\d+)? = (?:\")?([\w.]+)(?:\")?(.*)$")
_PASSES_ON = ("arith.", "tt.splat", "tt.broadcast", "tt.expand_dims")
_BOUNDS = ("arith.cmp", "arith.div", "arith.rem")  # an index taken apart by a number of blocks
_NAME = re.compile(r"%([\w-]+)(?:#\d+)?")


def loop_loads_and_multiplies(ttir: str) -> bool:
    """Whether some loop holds both a load of a tile (of two dimensions at least) and a matrix product of 16-bit tiles.

    A product of float32 tiles in a kernel of 16-bit inputs is there for its precision, not for the tensor cores.
    """
    patterns = {
        "load": re.compile(r"\btt\.descriptor_load\b|\btt\.load\b.*tensor<\d+x\d+x"),
        "dot": re.compile(r"\btt\.dot\b.*: tensor<[\dx]+x(?:bf16|f16)>"),
    }
    open_loops, found, depth = [], [], 0
    for line in ttir.splitlines():
        if re.search(r"\bscf\.(for|while)\b", line):
            open_loops.append((depth, set()))
        for word, pattern in patterns.items():
            if pattern.search(line):
                for _, inside in open_loops:
                    inside.add(word)
        depth += line.count("{") - line.count("}")
        while open_loops and depth <= open_loops[-1][0]:
            found.append(open_loops.pop()[1])
    return {"load", "dot"} in found


# A chunk, tile or row number times a tile's size stays below the number of tokens; more than that may not.
TILE = 256


def narrow_offsets(ttir: str) -> list[str]:
    """Products in 32 bits that reach an address, though a big tensor would make them overflow.

    That is a product of two values that are only known at run time (an index and a stride), or of one of those and a
    constant beyond a tile's size. What is made of `tl.arange` and constants alone is bounded by the tile, and a number
    of programs times a number of something is a size.
    """
    bounded, constants, grid, narrow, found = set(), {}, set(), {}, []

    def define(name: str, cause: str | None = None) -> None:
        """A new value. Regions that lie side by side use the same names."""
        for known in (bounded, grid):
            known.discard(name)
        constants.pop(name, None)
        narrow.pop(name, None)
        if cause:
            narrow[name] = cause

    carried = {}  # (line of a loop's head, name) -> cause: what comes there from the loop's end, in the second round
    for _ in range(2):
        regions = []  # the open ones: (line of the head, values carried around, results, depth outside)
        depth = 0
        for number, line in enumerate(ttir.splitlines()):
            line = line.split(" loc(")[0]
            opens = re.search(r"\bscf\.(for|if|while)\b", line)
            if opens:
                pairs = re.findall(r"%([\w-]+) = %([\w-]+)", line.partition("iter_args(")[2])
                for inside, before in pairs:
                    define(inside, narrow.get(before) or carried.get((number, inside)))
                result = re.match(r"\s*%([\w-]+)(?::\d+)? = ", line)
                if result:
                    define(result[1])
                regions.append((number, [inside for inside, _ in pairs], result and result[1], depth))
            elif line.strip().startswith("scf.yield") and regions:
                head, inside, result, _ = regions[-1]
                causes = [narrow.get(value) for value in _NAME.findall(line.split(":")[0])]
                carried |= {(head, name): cause for name, cause in zip(inside, causes, strict=False) if cause}
                if result and any(causes):
                    narrow[result] = next(filter(None, causes))
            depth += line.count("{") - line.count("}")
            while regions and depth <= regions[-1][3] and "{" not in line:
                regions.pop()
            match = _RESULT.match(line)
            if not match or opens:
                continue
            name, operation, rest = match.groups()
            operands = _NAME.findall(rest)
            define(name)
            if operation == "arith.constant":
                value = re.match(r"\s*(?:dense<)?(-?\d+)>? :", rest)
                if value:
                    constants[name] = int(value[1])
                bounded.add(name)
            elif operation == "tt.get_num_programs":
                grid.add(name)
            elif operation == "tt.make_range" or (operands and all(o in bounded for o in operands)):
                bounded.add(name)
                if (
                    operation in ("tt.splat", "arith.extsi", "tt.broadcast", "tt.expand_dims")
                    and operands[0] in constants
                ):
                    constants[name] = constants[operands[0]]
            elif operation == "tt.addptr" and operands[1] in narrow:
                found.append(narrow[operands[1]])
            elif operation == "arith.shrui" and constants.get(operands[1], 0) >= 24:
                continue  # at most 8 bits are left
            elif operation == "arith.muli" and re.search(r": (tensor<[\dx]+xi32>|i32)\s*$", rest):
                a, b = operands[:2]
                small = (
                    a in grid or b in grid or any(o in bounded and abs(constants.get(o, TILE)) <= TILE for o in (a, b))
                )
                if not small:
                    narrow[name] = line.strip()
            elif operation.startswith(_PASSES_ON) and not operation.startswith(_BOUNDS):
                for operand in operands:
                    if operand in narrow:
                        narrow[name] = narrow[operand]
    return list(dict.fromkeys(found))
