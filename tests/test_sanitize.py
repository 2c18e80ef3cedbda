"""What tools/sanitize.py makes of compute-sanitizer's reports."""

import pytest

from tools import sanitize

OURS = "void tpf::rs_rmsnorm_kernel<float, (int)1>(tpf::ReduceArgs)+0x4a0 in rs_rmsnorm.cu:12"
THEIRS = "void at::native::vectorized_elementwise_kernel<(int)4>(int, T2, T3)+0x90"
READ = (
    "========= Uninitialized __global__ memory read of size 16 bytes\n=========     at {}\n=========     by thread 0\n"
)
SUMMARY = "========= ERROR SUMMARY: {} errors\n"


HOST_COPY = """========= Host API memory access error at host access to 0x48f0a7ba00 of size 250,368 bytes
=========     Uninitialized access to 0x48f0aaeea0 on access by cudaMemcpy source
=========
"""


@pytest.mark.parametrize(
    ("tool", "output", "found"),
    [
        ("memcheck", "", None),
        ("memcheck", SUMMARY.format(0) * 2, 0),
        ("memcheck", READ.format(THEIRS) + SUMMARY.format(1) + SUMMARY.format(2), 3),
        ("racecheck", "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n", 3),
        ("initcheck", READ.format(THEIRS) * 2 + SUMMARY.format(2), 0),
        ("initcheck", READ.format(THEIRS) + READ.format(OURS) + SUMMARY.format(2), 1),
        ("initcheck", READ.format(THEIRS) + SUMMARY.format(5), 4),  # what was not printed may be ours
        ("initcheck", HOST_COPY + READ.format(OURS) + SUMMARY.format(2), 1),
    ],
)
def test_findings(tool, output, found):
    assert sanitize.findings(tool, output) == found


def test_digest():
    race = f"========= Error: Race reported between Write access at {OURS}\n=========     and Read access at {OURS}\n"
    assert sanitize.digest(READ.format(OURS) * 2 + READ.format(THEIRS) + race) == {
        "Uninitialized __global__ memory read of size 16 bytes at tpf::rs_rmsnorm_kernel": 2,
        "Uninitialized __global__ memory read of size 16 bytes at at::native::vectorized_elementwise_kernel": 1,
        "a race with a Write access at tpf::rs_rmsnorm_kernel": 1,
    }


def test_excerpt_keeps_what_is_ours():
    output = READ.format(OURS) + HOST_COPY * 1000 + SUMMARY.format(1001)
    kept = sanitize.excerpt(output)
    assert OURS in kept and SUMMARY.format(1001).strip() in kept and len(kept.splitlines()) < 80
