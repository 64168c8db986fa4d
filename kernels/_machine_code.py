# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel consists of: registers, spills, shared memory, and the instructions that decide its speed."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import triton

# NVIDIA's opcodes without their suffixes. Matrix products: per warp (HMMA, DMMA), per warp group (HGMMA, sm_90) and by
# the tensor memory's unit (UTCHMMA, sm_100).
MATRIX = ("HMMA", "DMMA", "HGMMA", "UTCHMMA")
ASYNCHRONOUS_LOADS = ("LDGSTS", "UTMALDG")  # cp.async, and the tensor memory accelerator (TMA)
SPILLS = ("LDL", "STL")


@dataclass(frozen=True)
class MachineCode:
    registers: int  # a thread
    spill_bytes: int  # a thread
    spills_in_loops: int  # loads and stores of spilled registers that lie inside of a loop; AMD: not told apart
    shared: int  # bytes a program
    matrix: dict[str, int]  # matrix instructions by name
    fma: int  # scalar float32 multiply-adds
    asynchronous_loads: dict[str, int]


def inspect(compiled) -> MachineCode:
    """The machine code of what `triton.compile` returned."""
    if "cubin" in compiled.asm:
        return _nvidia(compiled.asm["cubin"], compiled.metadata.shared)
    return _amd(compiled.asm["amdgcn"], compiled.metadata.shared)


def _nvidia(cubin: bytes, shared: int) -> MachineCode:
    code = parse_sass(_cuobjdump(cubin, "-sass"))
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _cuobjdump(cubin, "-res-usage")))
    loops = in_loops(code)
    count = Counter(instruction.opcode for instruction in code)
    return MachineCode(
        registers=int(usage["REG"]),
        spill_bytes=int(usage["STACK"]),  # Triton keeps nothing else there
        spills_in_loops=sum(i.opcode in SPILLS and i.address in loops for i in code),
        shared=shared,
        matrix={name: count[name] for name in MATRIX if count[name]},
        fma=count["FFMA"] + 2 * count["FFMA2"],
        asynchronous_loads={name: count[name] for name in ASYNCHRONOUS_LOADS if count[name]},
    )


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # without suffixes
    conditional: bool
    operands: str

    @property
    def target(self) -> int | None:
        """The address that a branch, call or barrier names last."""
        found = re.findall(r"0x[0-9a-f]+", self.operands)
        return int(found[-1], 16) if found else None


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)([^;]*);", re.MULTILINE)


def parse_sass(text: str) -> list[Instruction]:
    found = []
    for address, predicate, opcode, operands in _LINE.findall(text):
        # BRA.U UP0, 0x1a0 and BRA P0, 0x1a0 carry their condition as an operand.
        conditional = bool(predicate) or bool(re.search(r"\bU?P\d", operands))
        found.append(Instruction(int(address, 16), opcode, conditional, operands))
    return found


def _successors(code: list[Instruction]) -> dict[int, list[int]]:
    """The control flow: for each address, those that may run next. A call goes on behind itself."""
    flow, meeting = {}, {}  # meeting: where the threads that a barrier register collects go on
    for i, following in zip(code, [*code[1:], None], strict=True):
        onward = [] if following is None else [following.address]
        barrier = re.search(r"\bB\d+\b", i.operands)
        if i.opcode in ("BRA", "JMP"):
            flow[i.address] = [i.target, *(onward if i.conditional else [])]
        elif i.opcode == "BSYNC" and barrier and barrier[0] in meeting:
            flow[i.address] = [meeting[barrier[0]], *onward]
        elif i.opcode in ("EXIT", "RET", "BRX"):
            flow[i.address] = onward if i.conditional else []
        else:
            flow[i.address] = onward
        if i.opcode == "BSSY" and barrier:
            meeting[barrier[0]] = i.target
    return flow


def in_loops(code: list[Instruction]) -> set[int]:
    """Addresses of the instructions inside of a loop: those that control flow can lead back to.

    A backward branch is no proof of a loop, since waits for a barrier are placed behind the end of the kernel and jump
    back into it. So these are the strongly connected components of the control flow (Tarjan, without recursion), and
    what is called from inside of one.
    """
    flow = _successors(code)
    index, low, stack, on_stack, loops = {}, {}, [], set(), set()
    for root in flow:
        work = [] if root in index else [(root, iter(flow[root]))]
        while work:
            at, rest = work[-1]
            if at not in index:
                index[at] = low[at] = len(index)
                stack.append(at)
                on_stack.add(at)
            for to in rest:
                if to not in index:
                    work.append((to, iter(flow[to])))
                    break
                if to in on_stack:
                    low[at] = min(low[at], index[to])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[at])
                if low[at] == index[at]:
                    component = set()
                    while at not in component:
                        component.add(stack.pop())
                    on_stack -= component
                    if len(component) > 1 or at in flow[at]:
                        loops |= component
    called = [i.target for i in code if i.opcode == "CALL" and i.address in loops]
    while called:
        at = called.pop()
        if at in flow and at not in loops:
            loops.add(at)
            called += flow[at]
    return loops


def _amd(text: str, shared: int) -> MachineCode:
    numbers = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    products = Counter(re.findall(r"^\s+(v_s?mfma)_", text, re.MULTILINE))
    return MachineCode(
        registers=numbers["vgpr_count"],
        spill_bytes=numbers["private_segment_fixed_size"],
        spills_in_loops=0,
        shared=shared,
        matrix={"MFMA": products.total()} if products else {},
        fma=len(re.findall(r"^\s+v_(?:fma|fmac)_f32", text, re.MULTILINE))
        + 2 * len(re.findall(r"^\s+v_pk_fma_f32", text, re.MULTILINE)),
        asynchronous_loads={},
    )
