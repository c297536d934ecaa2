"""The inner loop of a kernel is found in the assembler's listing."""

from pathlib import Path

import pytest

from scripts.verify.cuda_loops import Loop, inner_loops

LISTING = """
	.section	.text.outer,"ax",@progbits
.text.outer:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
.L_x_2:
        /*0030*/                   LDS.128 R12, [R0] ;
        /*0040*/              @!P0 LDG.E.U16 R13, desc[UR4][R2.64] ;
        /*0050*/                   FFMA R14, R12, R13, R14 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/                   LDS R15, [R0] ;
        /*0080*/               @P1 BRA `(.L_x_3) ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
	.section	.text.straight,"ax",@progbits
.text.straight:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   EXIT ;
"""


@pytest.fixture
def nvdisasm(tmp_path: Path) -> str:
    """Prints the file that it is given."""
    program = tmp_path / "nvdisasm"
    program.write_text('#!/bin/sh\ncat "$2"\n')
    program.chmod(0o755)
    return str(program)


def test_of_loops_that_hold_no_other_it_is_the_one_that_loads_most(nvdisasm: str, tmp_path: Path) -> None:
    cubin = tmp_path / "cubin"
    cubin.write_text(LISTING)
    assert inner_loops(nvdisasm, cubin) == {"outer": Loop(18, 4, 1), "straight": Loop(0, 0, 0)}
