"""Reading machine code: descriptors of matrix products that some way to them leaves unset, and the steps of a loop."""

from __future__ import annotations

from tests.codegen.sass import parsed, rounds, unset_descriptors

FAULTY = """
        /*0000*/                   S2UR UR4, SR_CgaCtaId ;
        /*0010*/              @P1  BRA 0x40 ;
        /*0020*/                   UMOV UR5, 0x40 ;
        /*0030*/                   UIADD3.64 UR6, UR8, 0x2, URZ ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR4].tnspB, R88 ;
        /*0060*/                   EXIT ;
"""


def test_unset_descriptors_are_found() -> None:
    assert [line.split()[0] for line in unset_descriptors(parsed(FAULTY))] == ["0x40", "0x50"]
    assert not unset_descriptors(parsed(FAULTY.replace("@P1  BRA 0x40", "UMOV UR9, URZ")))

NESTED = """
        /*0000*/                   S2UR UR4, SR_CgaCtaId ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0020*/                   PRMT R3, R4, 0x5410, R5 ;
        /*0030*/              @P1  BRA 0x10 ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64 P0, [UR4], R0 ;
        /*0050*/             @!P0  BRA 0x40 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR4], R88 ;
        /*0070*/              @P2  BRA 0x0 ;
        /*0080*/                   EXIT ;
"""


def test_rounds_are_the_innermost_loops_with_products() -> None:
    """Neither the loop around them nor one that only waits."""
    (step,) = rounds(parsed(NESTED))
    assert [each.operation for each in step] == ["HGMMA.64x128x16.F32.BF16", "PRMT", "BRA"]
