"""The Triton kernels, compiled ahead of time for GPUs that need not be there: registers, local memory, instructions."""

import re
import subprocess

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from tp_fused import reference
from tp_fused.triton import qkv_a_proj_ag, tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
# What multiplies matrices, and what reads them from memory while others are multiplied.
INSTRUCTIONS = {
    (80, "bf16"): ("HMMA", "LDGSTS"),
    (80, "fp16"): ("HMMA", "LDGSTS"),
    (80, "fp8"): ("HMMA", "LDGSTS"),
    (90, "bf16"): ("HGMMA", "UTMALDG"),
    (90, "fp16"): ("HGMMA", "UTMALDG"),
    (90, "fp8"): ("QGMMA", "UTMALDG"),
    (100, "bf16"): ("UTCHMMA", "UTMALDG"),
    (100, "fp16"): ("UTCHMMA", "UTMALDG"),
    (100, "fp8"): ("UTCQMMA", "UTMALDG"),
}
# A block's, of the smallest GPU that the kernel for this architecture runs on.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def variants():
    """Every tile in bf16 and fp8; in fp16 the largest; the largest with edges all around, too."""
    for arch, dtype in INSTRUCTIONS:
        served = tiles.tiles(arch, dtype == "fp8")
        for tile in served[:1] if dtype == "fp16" else served:
            yield pytest.param(arch, dtype, tile, (2112, 7168), id=f"sm_{arch}-{dtype}-{tile.rows}x{tile.columns}")
        if dtype != "fp16":
            yield pytest.param(arch, dtype, served[0], (1000, 144), id=f"sm_{arch}-{dtype}-edges")


class Card:
    """What Triton asks its driver when it compiles and does not launch."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # Triton keeps what it has compiled by device

    def get_current_stream(self, device) -> int:
        return 0


@pytest.fixture
def compile_for(tmp_path, monkeypatch):
    """compile_for(arch, *arguments of prepare): as the launch compiles it, but for this architecture, and afresh."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(arch: int, *arguments):
        triton.runtime.driver.set_active(Card(arch))
        prepared, options = qkv_a_proj_ag.prepare(arch, *arguments)
        return qkv_a_proj_ag.projection_kernel.warmup(*prepared, grid=(1,), **options)

    yield compile
    if torch.cuda.is_available():  # else there is no driver to go back to
        triton.runtime.driver.reset_active()


@pytest.mark.parametrize(("arch", "dtype", "tile", "shape"), [*variants()])
def test_compiled(compile_for, tmp_path, arch, dtype, tile, shape):
    columns, hidden_size = shape
    num_rows = 300
    weight = torch.empty(columns, hidden_size, dtype=DTYPES[dtype])
    out = torch.empty(num_rows, columns, dtype=torch.bfloat16 if dtype == "fp8" else weight.dtype)
    bias, scales = out.new_empty(columns), (None, None)
    if dtype == "fp8":
        groups = -(-hidden_size // 128)
        bias = None
        scales = reference.empty_scale(num_rows, hidden_size, 128, "column", "cpu"), torch.empty(columns, groups)
    kernel = compile_for(arch, tile, out, weight.new_empty(num_rows, hidden_size), weight, bias, *scales)

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tools = triton.knobs.nvidia
    usage = subprocess.check_output([tools.cuobjdump.path, "--dump-resource-usage", cubin], text=True)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert used["REG"] <= 255 and used["STACK"] == used["LOCAL"] == 0, usage
    assert kernel.metadata.shared <= SHARED_BYTES[arch]

    sass = subprocess.check_output([tools.nvdisasm.path, cubin], text=True)
    found = set(re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)\b", sass, re.MULTILINE))
    assert found >= {*INSTRUCTIONS[arch, dtype], "STG", "EXIT"}, sorted(found)
    assert not found & {"LDL", "STL"}


def test_two_scale_layouts_are_one_kernel(compile_for):
    """Nor do the number of rows and the alignment of the scales make another one."""
    kernels = set()
    for num_rows, layout in ((1, "row"), (16, "column"), (17, "row")):
        q, weight = (torch.empty(rows, 256).to(torch.float8_e4m3fn) for rows in (num_rows, 64))
        scale = reference.empty_scale(num_rows + 1, 256, 128, layout, "cpu")[1:]
        out = torch.empty(num_rows, 64, dtype=torch.bfloat16)
        tile = tiles.tiles(90, True)[-1]
        kernels.add(compile_for(90, tile, out, q, weight, None, scale, torch.empty(1, 2)))
    assert len(kernels) == 1
