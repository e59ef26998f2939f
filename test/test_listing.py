"""Inner loops from a disassembler's listing, made up here: what is jumped over, what only waits, and which loop is inner."""
from collections import Counter

import pytest

from statekv_ros.bench.listing import inner_loops, kind_of
from statekv_ros.bench.loops import loop_rows

HEAD = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
"""
# Blocks as the assembler lays them out: a part that most iterations jump over, and a wait whose repetition stands at the end.
BRANCHED = HEAD + """
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 BRA `(.L_x_1) ;
        /*0030*/                   FMUL R8, R8, R9 ;
        /*0040*/                   FMUL R10, R10, R9 ;
.L_x_1:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR5], R7 ;
        /*0060*/              @!P3 BRA `(.L_x_3) ;
.L_x_4:
        /*0070*/                   FFMA R8, R4, R5, R8 ;
        /*0080*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0090*/                   BRA.U !UP0, `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR5], R7 ;
        /*00c0*/              @!P3 BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_4) ;
.L_x_9:
        /*00e0*/                   BRA `(.L_x_9) ;
"""
NESTED = HEAD + """
.L_x_0:
        /*0010*/                   LDS.128 R4, [R2] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/                   LDSM.16.M88.4 R4, [R2+0x10] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/              @!P2 CALL.REL.NOINC `(.L_x_2) ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0070*/                   EXIT ;
"""


def test_an_iteration_is_the_shortest_way_through_the_loop_and_the_rest_stands_aside():
    (loop,) = inner_loops(BRANCHED)
    assert loop.common == Counter(control=3 + 1, integer=1, fp32=1) + Counter({'global': 1})
    assert loop.aside == Counter(fp32=2, control=3)
    assert loop.flops == 0 and not loop.tensor


def test_of_nested_loops_the_inner_one_is_told_with_what_it_multiplies_and_moves():
    (loop,) = inner_loops(NESTED)
    assert loop.common == Counter(tensor=1, shared=1, control=1)
    assert loop.tensor == Counter({'HMMA.16816.F32.BF16': 1})
    assert loop.flops == 2 * 16 * 8 * 16 and loop.shared_bytes == 4 * 128


@pytest.mark.parametrize('operands, flops, shared', [
    ('R24, gdesc[UR8], R24', 2 * 64 * 128 * 16 / 4, 2 * 16 * (64 + 128) / 4),
    ('R24, R4, gdesc[UR8], R24', 2 * 64 * 128 * 16 / 4, 2 * 16 * 128 / 4),      # rows from registers
])
def test_an_instruction_of_four_warps_counts_a_quarter_for_each(operands, flops, shared):
    listing = HEAD + f"""
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 {operands}, gsb0 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
"""
    (loop,) = inner_loops(listing)
    assert (loop.flops, loop.shared_bytes) == (flops, shared)


@pytest.mark.parametrize('name, kind', [
    ('IMAD.WIDE', 'integer'), ('UIADD3.64', 'integer'), ('ULDC.64', 'move'), ('R2UR', 'move'), ('UTCHMMA', 'tensor'),
    ('MUFU.EX2', 'mufu'), ('LDGSTS.E.BYPASS.128', 'global'), ('WARPGROUP.ARRIVE', 'control'), ('BAR.SYNC', 'control')])
def test_instructions_have_kinds(name, kind):
    assert kind_of(name) == kind


def test_a_pipe_needs_its_instructions_over_its_lanes_and_the_slowest_is_the_bound():
    (row,) = loop_rows(NESTED, capability=90, warps=8, tile_flops=0)
    assert row['cycles'] == {'issue': 3 * 8 / 4, 'tensor': 8 * 4096 / 4096, 'fp32': 0, 'mufu': 0, 'integer': 0,
                             'shared': 8 * 512 / 128}
    assert row['bound'] == 'shared'


def test_products_that_one_warp_issues_for_all_are_the_tiles():
    listing = BRANCHED.replace('FMUL R10, R10, R9', 'UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR6], tmem[UR4], idesc[UR5], UP1')
    (row,) = loop_rows(listing, capability=100, warps=4, tile_flops=81920.0)
    assert row['tensor'] == {} and row['cycles']['tensor'] == 10
