# SPDX-License-Identifier: Apache-2.0
"""The ahead-of-time report: its rules hold for the short list of cases, and its parts see what they should."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from fla_ops.kernels import _machine_code, _ttir, report  # noqa: E402 - needs triton


@pytest.mark.slow
def test_the_rules_hold_for_the_short_list():
    """`make report` is the whole list, with other versions of Triton too."""
    command = [sys.executable, "-m", "fla_ops.kernels.report", "--short", "--check", "--target", "sm_90"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--processes", "2"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def row(**changes):
    """A row that breaks no rule."""
    code = {
        "registers": 168,
        "spill_bytes": 0,
        "spills_in_loops": 0,
        "shared": 1024,
        "matrix": {"HGMMA": 8},
        "fma": 0,
        "asynchronous_loads": {"LDGSTS": 48},
    }
    code |= {name: changes.pop(name) for name in list(changes) if name in code}
    values = {"stem": "op", "target": "sm_90", "kernel": "a_kernel", "config": "BT=64", "cases": ["some case"]}
    values |= {"passes": ["forward"], "dtype": "bfloat16", "ieee": False, "aligned": True, "code": code}
    return report.Row(**values | {"loads_and_multiplies": True} | changes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"error": "no luck"}, "does not compile: no luck"),
        ({"shared": 228 * 1024}, "takes 233472 bytes of shared memory; sm_90 has 232448"),
        ({"shared": 100 * 1024, "target": "sm_120"}, "takes 102400 bytes of shared memory; sm_120 has 101376"),
        ({"shared": 65 * 1024, "target": "gfx942"}, "takes 66560 bytes of shared memory; gfx942 has 65536"),
        ({"spills_in_loops": 3, "spill_bytes": 8}, "has 3 loads and stores of spilled registers in its loop"),
        ({"matrix": {}}, "multiplies in a loop without tensor cores"),
        ({"asynchronous_loads": {}}, "multiplies in a loop whose loads are not asynchronous"),
        ({"dtype": "float32", "ieee": True, "matrix": {"HMMA": 4}}, "promises IEEE float32 and multiplies on tensor"),
        ({"narrow": ["%a = arith.muli %b, %c : i32"]}, "computes offsets in 32 bits: %a = arith.muli %b, %c : i32"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_each_rule_fails_with_a_sentence(changes, sentence):
    (found,) = report.broken_rules(row(**changes))
    assert found.startswith("a_kernel (BT=64) for some case on ") and sentence in found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float32", "spills_in_loops": 3},
        {"target": "sm_80", "spills_in_loops": 3},
        {"aligned": False, "asynchronous_loads": {}},
        {"loads_and_multiplies": False, "matrix": {}, "asynchronous_loads": {}},
        {"target": "gfx942", "dtype": "float32", "ieee": True, "matrix": {"MFMA": 4}},
    ],
    ids=str,
)
def test_what_no_rule_forbids(changes):
    assert report.broken_rules(row(**changes)) == []


# A loop (0x20 to 0x50) with a call; a wait that is placed behind the end and jumps back; the called function.
SASS = """
        /*0000*/                   STL [R1], R2 ;                /* 0x000 */
        /*0010*/               @P0 BRA 0x80 ;                    /* 0x000 */
        /*0020*/                   HGMMA.64x64x16.F32 R4, gdesc[UR4], R4 ;
        /*0030*/                   CALL.REL.NOINC 0xb0 ;
        /*0040*/                   LDGSTS.E.128 [R3], desc[UR6][R8.64] ;
        /*0050*/              @!P1 BRA 0x20 ;
        /*0060*/                   LDL R2, [R1] ;
        /*0070*/                   EXIT ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0090*/              @!P0 BRA 0x80 ;
        /*00a0*/                   BRA 0x20 ;
        /*00b0*/                   LDL.64 R2, [R1+0x8] ;
        /*00c0*/                   RET.REL.NODEC R2 0x0 ;
        /*00d0*/                   BRA 0xd0;
"""


def test_loops_are_found_in_machine_code():
    code = _machine_code.parse_sass(SASS)
    assert [i.opcode for i in code][:4] == ["STL", "BRA", "HGMMA", "CALL"] and len(code) == 14
    assert sorted(_machine_code.in_loops(code)) == [0x20, 0x30, 0x40, 0x50, 0x80, 0x90, 0xB0, 0xC0, 0xD0]


TTIR = """
    %c64 = arith.constant 64 : i32
    %cols = arith.constant dense<256> : tensor<128x1xi32>
    %pid = tt.get_program_id x : i32
    %rows = tt.make_range {end = 128 : i32, start = 0 : i32} : tensor<128xi32>
    %rows_0 = tt.expand_dims %rows {axis = 1 : i32} : tensor<128xi32> -> tensor<128x1xi32>
    %small = arith.muli %rows_0, %cols : tensor<128x1xi32>
    %p0 = tt.addptr %x, %small : tensor<128x1x!tt.ptr<f32>>, tensor<128x1xi32>
    %first = arith.muli %pid, %c64 : i32
    %p1 = tt.addptr %x, %first : !tt.ptr<f32>, i32
    %wide = arith.extsi %pid : i32 to i64
    %right = arith.muli %wide, %stride_wide : i64
    %p2 = tt.addptr %x, %right : !tt.ptr<f32>, i64
"""
NARROW = """
    %bad = arith.muli %pid, %stride : i32
    %late = arith.extsi %bad : i32 to i64
    %sum = arith.addi %late, %right : i64
    %p3 = tt.addptr %x, %sum : !tt.ptr<f32>, i64
"""
IN_A_LOOP = """
    %end:2 = scf.for %i = %a to %b step %c64 iter_args(%at = %zero, %acc = %nought) -> (i32, f32)  : i32 {
      %p4 = tt.addptr %x, %at : !tt.ptr<f32>, i32
      %step = arith.muli %c64, %stride : i32
      %far = arith.muli %i, %stride : i32
      %next = arith.addi %at, %far : i32
      scf.yield %next, %acc : i32, f32
    }
"""


# Regions side by side name their values alike: what one says of a name is not so in the next.
ONCE_A_CONSTANT = """
    scf.if %here {
      %at = arith.constant 64 : i32
    }
    scf.if %there {
      %at = arith.addi %pid, %stride : i32
      %far = arith.muli %at, %stride : i32
      %p5 = tt.addptr %x, %far : !tt.ptr<f32>, i32
    }
"""
ONCE_NARROW = """
    scf.if %here {
      %at = arith.muli %pid, %stride : i32
      %within = arith.cmpi slt, %at, %stride : i32
    }
    scf.if %there {
      %at = arith.muli %wide, %stride_wide : i64
      %p5 = tt.addptr %x, %at : !tt.ptr<f32>, i64
    }
"""
NESTED = """
    %out:2 = scf.for %i = %a to %b step %c64 iter_args(%at = %zero, %acc = %nought) -> (i32, f32)  : i32 {
      %sum = scf.for %j = %a to %b step %c64 iter_args(%inner = %nought) -> (f32)  : i32 {
        %p5 = tt.addptr %x, %at : !tt.ptr<f32>, i32
        scf.yield %inner : f32
      }
      %far = arith.muli %i, %stride : i32
      scf.yield %far, %sum : i32, f32
    }
"""


def test_narrow_offsets_are_found():
    assert _ttir.narrow_offsets(TTIR) == []
    assert _ttir.narrow_offsets(TTIR + NARROW) == ["%bad = arith.muli %pid, %stride : i32"]
    assert _ttir.narrow_offsets(TTIR + IN_A_LOOP) == ["%far = arith.muli %i, %stride : i32"]
    assert _ttir.narrow_offsets(TTIR + NESTED) == ["%far = arith.muli %i, %stride : i32"]
    assert _ttir.narrow_offsets(TTIR + ONCE_A_CONSTANT) == ["%far = arith.muli %at, %stride : i32"]
    assert _ttir.narrow_offsets(TTIR + ONCE_NARROW) == []


def test_loops_with_loads_and_products_are_found():
    load = "  %t = tt.load %p, %m, %z : tensor<64x128x!tt.ptr<bf16>>\n"
    dot = "  %d = tt.dot %a, %b, %c : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>\n"
    loop, end = "scf.for %i = %a to %b step %c : i32 {\n", "}\n"
    found = _ttir.loop_loads_and_multiplies
    assert found(loop + load + dot + end)
    assert found(loop + loop + load + end + dot + end)
    assert not found(load + loop + dot + end)
    assert not found(loop + load + end + loop + dot + end)
    assert not found(loop + dot + "  %t = tt.load %p, %m : tensor<64x!tt.ptr<f32>>\n" + end)
    assert not found(loop + load + dot.replace("bf16", "f32") + end)


def test_a_table_of_some_ops_keeps_the_others():
    def table(versions, *sections):
        return "\n\n## ".join([report.HEADER.format(versions=versions), *sections]) + "\n"

    before = table("3.6.0, 3.7.1", "delta_rule, sm_90\n\n| a |", "selective_scan, sm_90\n\n| b |")
    new = table("3.6.0, 3.7.1", "causal_conv1d, sm_80\n\n| c |", "selective_scan, sm_90\n\n| d |")
    both = table("3.6.0, 3.7.1", "delta_rule, sm_90\n\n| a |", *new.rstrip("\n").split("\n\n## ")[1:])
    assert report.with_kept_sections(new, before) == both
    with pytest.raises(SystemExit, match="other versions"):
        report.with_kept_sections(new, table("3.7.1", "delta_rule, sm_90\n\n| a |"))
