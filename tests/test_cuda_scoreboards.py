"""That shared memory is given back when what was read is in registers, read from the machine code without a GPU.

An mbarrier arrival does not wait for the loads that were issued before it, and a bulk copy that then overwrites the
buffer may overtake them.
"""

import re

import pytest
import sass
from test_cuda_binary import ARRIVAL, ENCODED


def arrivals(code: list) -> list[int]:
    return [i for i, item in enumerate(code) if isinstance(item, sass.Instruction) and re.match(ARRIVAL, item.text)]


def kernels(library, architecture: str, name: str) -> dict[str, list]:
    """The code of those that arrive on mbarriers."""
    if architecture not in library:
        pytest.skip(f"libtp_fused was not built for {architecture}")
    return {
        kernel: read.code
        for kernel, read in library[architecture].items()
        if re.match(name, kernel) and arrivals(read.code)
    }


@pytest.mark.parametrize("architecture", ENCODED)
def test_a_row_buffer_is_given_back_when_its_row_is_in_registers(library, architecture):
    """The next row may be on its way from shared memory meanwhile, so scoreboards alone do not tell: the arrival's
    address is computed from what the loads have brought. One arrival more passes on that there are no more rows."""
    bulk = kernels(library, architecture, r"rs_rmsnorm_kernel<.*\(tpf::Body\)2>")
    assert len(bulk) == 3 * 4 * 2  # dtypes, epilogues, widths
    wrong = {}
    for name, code in bulk.items():
        found = arrivals(code)
        waiting = [sass.hangs_on(code, index, r"LDS\.128") for index in found]
        if len(found) < 4 or sum(waiting) != len(found) - 1:
            wrong[name] = f"{sum(waiting)} of {len(found)} arrivals"
    assert not wrong


@pytest.mark.parametrize("architecture", ENCODED[:1])
def test_a_stage_is_given_back_when_its_scales_are_in_registers(library, architecture):
    """Operands are read by the products themselves, which are waited for; scales, and finished tiles on their way out,
    by loads."""
    projections = kernels(library, architecture, "qkv_a_proj_ag_kernel")
    assert projections
    early = {name: sass.outstanding_loads(code, "LDS", ARRIVAL) for name, code in projections.items()}
    assert not {name: places for name, places in early.items() if places}


def test_an_arrival_before_its_loads_is_seen():
    """On code as ptxas wrote it for an arrival that does not hang on the loads."""

    def instruction(text: str, sets: int = 7, waits: int = 0) -> str:
        upper = sets << 46 | waits << 52
        return f"        /*0000*/  {text} ;  /* 0x{0:016x} */\n  /* 0x{upper:016x} */\n"

    load = instruction("LDS.128 R12, [R3]", sets=1)
    arrival = instruction("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R0+URZ+0x100], RZ")
    waiting = instruction("IMAD.U32 R5, R12, 0x10000, RZ", waits=2)
    masked = instruction("LOP3.LUT R5, R12, UR4, RZ, 0xc0, !PT", waits=2) + instruction("IMAD.IADD R0, R5, 0x1, R0")
    early, late, dependent = (
        sass.functions(f".text.kernel:\n{code}")["kernel"]
        for code in (load + arrival, load + waiting + arrival, load + masked + arrival)
    )
    assert sass.outstanding_loads(early, "LDS", ARRIVAL) == [1]
    assert sass.outstanding_loads(late, "LDS", ARRIVAL) == []
    assert not sass.hangs_on(early, 1, "LDS") and not sass.hangs_on(late, 2, "LDS")
    assert sass.hangs_on(dependent, 3, "LDS")
