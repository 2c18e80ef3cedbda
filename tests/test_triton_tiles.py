"""Which tiles a projection is cut into, and that they cover it: the kernel's indices, in Triton's interpreter.

The interpreter multiplies in numpy, so that it proves nothing about matrix instructions; on whole numbers in fp32 it
shows which elements meet which.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tp_fused import reference
from tp_fused.triton import tiles

ARCHS = (80, 89, 90, 100)


def interpret(arch: int, tile: tiles.Tile, num_rows: int, columns: int, hidden_size: int, layout: str | None) -> None:
    """Raises AssertionError where the kernel's result is not the product, or where it writes anything else."""
    from tp_fused.triton import qkv_a_proj_ag

    def whole(*shape):
        return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(sum(shape))).float()

    rows, weight, bias = whole(num_rows, hidden_size), whole(columns, hidden_size), whole(columns)
    scale = weight_scale = None
    expected = rows @ weight.t()
    if layout is None:
        expected += bias
    else:
        bias = None
        scale = reference.empty_scale(num_rows, hidden_size, 128, layout, "cpu")
        scale.copy_(whole(*scale.shape))
        weight_scale = whole(-(-columns // 128), scale.shape[1])
        expected = (
            reference.dequantize(rows, scale, (1, 128)) @ reference.dequantize(weight, weight_scale, (128, 128)).t()
        )
    memory = torch.full((num_rows + 2, columns), 42.0)
    out = memory[1:-1].fill_(float("nan"))
    arguments, options = qkv_a_proj_ag.prepare(arch, tile, out, rows, weight, bias, scale, weight_scale)
    qkv_a_proj_ag.projection_kernel[(3,)](*arguments, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert (memory[[0, -1]] == 42.0).all(), "the rows around the output were written to"


def interpret_all() -> None:
    """Edges all around; a strip of 8 columns (136 = 128 + 8, 264 = 256 + 8), in tiles that are cut off."""
    for arch in (89, 90):
        for num_rows, columns, hidden_size in ((1, 8, 16), (50, 136, 144), (70, 264, 48)):
            for tile_columns in (16, 128, 256) if arch == 90 else (256,):
                interpret(arch, tiles.Tile(16, tile_columns, 64, 1.0), num_rows, columns, hidden_size, None)
        for layout, columns, hidden_size in (("row", 136, 272), ("column", 200, 144)):
            for tile_columns in (32, 128):
                interpret(arch, tiles.Tile(16, tile_columns, 128, 1.0), 50, columns, hidden_size, layout)


def test_tiles_cover_the_output(device):
    if device == "cuda":
        pytest.skip("test_triton_projection.py runs the kernel itself")
    folders = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(folders)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "covered\n"), done.stdout + done.stderr


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_tile_that_needs_the_fewest_rounds_is_chosen(arch, fp8):
    served = tiles.tiles(arch, fp8)
    small, large = tiles.choose(1, 2112, 132, arch, fp8), tiles.choose(100_000, 2112, 132, arch, fp8)
    assert (small, large) == (served[-1], served[0])
    for num_rows in (1, 64, 65, 500, 2048, 5000):
        for num_ctas in (1, 16, 132):
            chosen = tiles.choose(num_rows, 2112, num_ctas, arch, fp8)
            rounds = {tile: -(-tile.count(num_rows, 2112) // num_ctas) for tile in served}
            assert all(rounds[chosen] * chosen.cost <= rounds[tile] * tile.cost for tile in served)


@pytest.mark.parametrize(
    ("rows", "columns", "num_rows", "count"),
    [(128, 256, 2048, 132), (128, 128, 1024, 132), (128, 64, 512, 132), (64, 16, 64, 132), (128, 256, 1, 9)],
)
def test_a_strip_is_cut_into_tiles_of_the_same_size(rows, columns, num_rows, count):
    # 2112 columns are 33 x 64: cut this way, powers of two are whole waves on an H100's 132 SMs.
    assert tiles.Tile(rows, columns, 64, 1.0).count(num_rows, 2112) == count


@pytest.mark.parametrize(
    ("tile_columns", "columns", "strip"),
    [(256, 2112, 64), (256, 2624, 64), (128, 1344, 64), (128, 8, 0), (128, 128, 0), (128, 200, 0), (64, 72, 0)],
)
def test_strip(tile_columns, columns, strip):
    assert tiles.Tile(128, tile_columns, 64, 1.0).strip(columns) == strip


if __name__ == "__main__":
    interpret_all()
    print("covered")
