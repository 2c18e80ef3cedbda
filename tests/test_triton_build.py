"""The Triton kernels, compiled ahead of time for GPUs that need not be there: registers, local memory, instructions."""

import concurrent.futures
import multiprocessing
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from tp_fused import reference
from tp_fused.triton import qkv_a_proj_ag, quantize, tiles

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
    """In bf16 and fp8 every tile of Hopper, of others the largest and the smallest; in fp16 the largest; the largest,
    too, with edges all around."""
    for arch, dtype in INSTRUCTIONS:
        served = tiles.tiles(arch, dtype == "fp8")
        for tile in served[:1] if dtype == "fp16" else served if arch == 90 else (served[0], served[-1]):
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


def compile_for(folder: Path, arch: int, *arguments):
    """The kernel as a launch with these arguments of prepare compiles it, but for this architecture, and afresh."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    triton.runtime.driver.set_active(Card(arch))
    prepared, options = qkv_a_proj_ag.prepare(arch, *arguments)
    return qkv_a_proj_ag.projection_kernel.warmup(*prepared, grid=(1,), **options)


def compile_variant(folder: Path, arch: int, dtype: str, tile: tiles.Tile, shape: tuple[int, int]) -> tuple:
    """Runs in another process: the resources that the kernel uses, its shared memory in bytes, its instructions."""
    columns, hidden_size = shape
    num_rows = 300
    weight = torch.empty(columns, hidden_size, dtype=DTYPES[dtype])
    out = torch.empty(num_rows, columns, dtype=torch.bfloat16 if dtype == "fp8" else weight.dtype)
    bias, scales = out.new_empty(columns), (None, None)
    if dtype == "fp8":
        groups = -(-hidden_size // 128)
        bias = None
        scales = reference.empty_scale(num_rows, hidden_size, 128, "column", "cpu"), torch.empty(columns, groups)
    kernel = compile_for(folder, arch, tile, out, weight.new_empty(num_rows, hidden_size), weight, bias, *scales)

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tools = triton.knobs.nvidia
    usage = subprocess.check_output([tools.cuobjdump.path, "--dump-resource-usage", cubin], text=True)
    code = subprocess.check_output([tools.nvdisasm.path, "-c", "-ndf", cubin], text=True)
    found = re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)\b", code, re.MULTILINE)
    return usage, kernel.metadata.shared, set(found)


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """{test: its variant, in a future} of all that are asked for; as many at a time as there are cores."""
    asked = [item for item in request.session.items if item.function is test_compiled]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("forkserver")) as executor:
        yield {
            item.name: executor.submit(compile_variant, tmp_path_factory.mktemp("variant"), **item.callspec.params)
            for item in asked
        }
        executor.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("arch", "dtype", "tile", "shape"), [*variants()])
def test_compiled(compiled, request, arch, dtype, tile, shape):
    usage, shared_bytes, found = compiled[request.node.name].result()
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert used["REG"] <= 255 and used["STACK"] == used["LOCAL"] == 0, usage
    assert shared_bytes <= SHARED_BYTES[arch]
    assert found >= {*INSTRUCTIONS[arch, dtype], "STG", "EXIT"}, sorted(found)
    assert not found & {"LDL", "STL"}


@pytest.mark.parametrize("round_scales", [False, True])
@pytest.mark.parametrize("arch", [90, 100])
def test_rows_are_quantised(tmp_path, monkeypatch, arch, round_scales):
    """Without local memory, and divided as `reference.quantize_e4m3` divides: no approximate reciprocal of amax."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton.runtime.driver.set_active(Card(arch))
    rows, scale = torch.empty(3, 7168, dtype=torch.bfloat16), torch.empty(3, 56)
    arguments = (rows.to(torch.float8_e4m3fn), scale, rows, 7168, round_scales, quantize.GROUP, quantize.GROUPS)
    kernel = quantize.quantize_kernel.warmup(*arguments, grid=(1,), num_warps=4)
    assert kernel.asm["ptx"].count("div.rn.f32") >= 2 and "div.full" not in kernel.asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2" in kernel.asm["ptx"]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], text=True)
    assert re.search(r"STACK:0\b", usage) and re.search(r"LOCAL:0\b", usage), usage
    if torch.cuda.is_available():
        triton.runtime.driver.reset_active()


def test_two_scale_layouts_are_one_kernel(tmp_path, monkeypatch):
    """Nor do the number of rows and the alignment of the scales make another one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # put back at the end
    kernels = set()
    for num_rows, layout in ((1, "row"), (16, "column"), (17, "row")):
        q, weight = (torch.empty(rows, 256).to(torch.float8_e4m3fn) for rows in (num_rows, 64))
        scale = reference.empty_scale(num_rows + 1, 256, 128, layout, "cpu")[1:]
        out = torch.empty(num_rows, 64, dtype=torch.bfloat16)
        tile = tiles.tiles(90, True)[-1]
        kernels.add(compile_for(tmp_path, 90, tile, out, q, weight, None, scale, torch.empty(1, 2)))
    assert len(kernels) == 1
    if torch.cuda.is_available():  # else there is no driver to go back to
        triton.runtime.driver.reset_active()
