"""The Triton projection on a GPU: how exact it is, and on what a row's result does not depend."""

import pytest
import torch
from programs import random, same_bits

from tp_fused import reference
from tp_fused.triton import qkv_a_proj_ag, tiles

K = 7168
BF16, FP16 = torch.bfloat16, torch.float16
# A row's result is compared over these token counts and grids: all tiles there are.
ROW_COUNTS = (1, 5, 64, 200, 1000, 2500)
SHAPES = [(columns, K) for columns in (2112, 2624, 1344, 576, 8, 24)] + [(2112, depth) for depth in (2048, 16, 48, 144)]


@pytest.fixture(autouse=True)
def _gpu(device):
    if device != "cuda":
        pytest.skip("needs a GPU: --device cuda")


class Projection:
    """Rows, weight and scales of one call, and the unfused program."""

    def __init__(self, num_rows, columns=2112, hidden_size=K, dtype=BF16, layout=None, bias=False):
        self.rows = random("rows", (num_rows, hidden_size), dtype).cuda()
        self.weight = random("weight", (columns, hidden_size), dtype, hidden_size**-0.5).cuda()
        self.bias = random("bias", (columns,), dtype).cuda() if bias else None
        self.layout = layout
        if layout is not None:
            self.rows, self.scale = reference.quantize_e4m3(self.rows, layout=layout)
            blocks = [-(-size // 128) for size in self.weight.shape]
            self.weight_scale = (random("weight scale", blocks, torch.float32).abs() + 0.1).cuda()
            # Values of the weight between 2 and 4 or so: well inside e4m3.
            self.weight = (self.weight * hidden_size**0.5).to(torch.float8_e4m3fn)

    def empty(self, num_rows: int) -> torch.Tensor:
        """Rows to write to: NaN, between two rows of 42 which `check_around` looks at."""
        self.memory = torch.full((num_rows + 2, len(self.weight)), 42.0, device="cuda", dtype=self.output_dtype)
        return self.memory[1:-1].fill_(float("nan"))

    @property
    def output_dtype(self) -> torch.dtype:
        return BF16 if self.layout is not None else self.rows.dtype

    def run(self, count: int | None = None, max_ctas: int | None = None) -> torch.Tensor:
        """The projection of the first `count` rows."""
        rows = self.rows[:count]
        out = self.empty(len(rows))
        if self.layout is None:
            returned = qkv_a_proj_ag.project(rows, self.weight, self.bias, out=out, max_ctas=max_ctas)
        else:
            scale = reference.empty_scale(len(rows), rows.shape[1], 128, self.layout, "cuda").copy_(self.scale[:count])
            operands = (rows, scale, self.weight, self.weight_scale)
            returned = qkv_a_proj_ag.project_fp8(*operands, out=out, max_ctas=max_ctas)
        assert returned is out
        return self.check_around(out)

    def run_tile(self, tile: tiles.Tile, arch: int) -> torch.Tensor:
        """All rows in this tile, as an sm_`arch` does it."""
        out = self.empty(len(self.rows))
        scales = (None, None) if self.layout is None else (self.scale, self.weight_scale)
        arguments, options = qkv_a_proj_ag.prepare(arch, tile, out, self.rows, self.weight, self.bias, *scales)
        qkv_a_proj_ag.projection_kernel[(7,)](*arguments, **options)
        return self.check_around(out)

    def check_around(self, out: torch.Tensor) -> torch.Tensor:
        assert (self.memory[[0, -1]] == 42.0).all(), "the rows around the output were written to"
        return out

    def unfused(self, dtype: torch.dtype) -> torch.Tensor:
        """torch's product, in fp8 of what has been dequantised, with every step in `dtype`."""
        rows, weight = self.rows, self.weight
        if self.layout is not None:
            rows = reference.dequantize(rows, self.scale, (1, 128))
            weight = reference.dequantize(weight, self.weight_scale, (128, 128))
        product = torch.matmul(rows.to(dtype), weight.to(dtype).t())
        return product if self.bias is None else product + self.bias.to(dtype)

    def check(self, actual: torch.Tensor) -> None:
        """At most 1.1 times the largest error of the unfused program."""
        exact, unfused = self.unfused(torch.float64), self.unfused(self.output_dtype)
        error, bound = ((value.double() - exact).abs().max().item() for value in (actual, unfused))
        assert bound > 0 and error <= 1.1 * bound, f"off by {error:.3g}, torch by {bound:.3g}"


@pytest.mark.parametrize(("columns", "hidden_size"), SHAPES)
def test_error(columns, hidden_size):
    projection = Projection(1000, columns, hidden_size, bias=columns % 3 == 0)
    projection.check(projection.run())


@pytest.mark.parametrize("num_rows", [1, 64, 1000])
def test_error_fp16(num_rows):
    projection = Projection(num_rows, dtype=FP16, bias=True)
    projection.check(projection.run())


@pytest.mark.parametrize(("columns", "hidden_size"), SHAPES)
@pytest.mark.parametrize("layout", ["row", "column"])
def test_error_fp8(columns, hidden_size, layout):
    projection = Projection(1000, columns, hidden_size, layout=layout)
    projection.check(projection.run())


@pytest.mark.parametrize("layout", [None, "row"], ids=["bf16", "fp8"])
@pytest.mark.parametrize("arch", ["own", 80])
def test_every_tile_has_the_same_bits(arch, layout):
    """Also the way of an sm_80: with cp.async, and e4m3 converted to fp16."""
    arch = qkv_a_proj_ag._card(torch.cuda.current_device())[0] if arch == "own" else arch
    projection = Projection(200, layout=layout)
    results = [projection.run_tile(tile, arch) for tile in tiles.tiles(arch, layout is not None)]
    projection.check(results[0])
    for result in results[1:]:
        same_bits([result], results[:1])


@pytest.mark.parametrize("layout", [None, "row", "column"], ids=["bf16", "row scales", "column scales"])
def test_rows_do_not_depend_on_the_others(layout):
    projection = Projection(max(ROW_COUNTS), layout=layout)
    expected = projection.run()
    for count in ROW_COUNTS:
        for max_ctas in (None, 16, 1):
            same_bits([projection.run(count, max_ctas)], [expected[:count]])


@pytest.mark.parametrize("layout", [None, "row"], ids=["bf16", "fp8"])
def test_runs_are_equal(layout):
    projection = Projection(1500, layout=layout)
    expected = projection.run()
    for _ in range(20):
        same_bits([projection.run()], [expected])


@pytest.mark.parametrize("layout", [None, "row", "column"])
def test_no_rows(layout):
    assert Projection(0, layout=layout).run().shape == (0, 2112)


@pytest.mark.parametrize("arch", ["own", 80])
def test_every_e4m3_value(arch):
    arch = qkv_a_proj_ag._card(torch.cuda.current_device())[0] if arch == "own" else arch
    projection = Projection(256, 64, 16, layout="row")
    projection.scale.fill_(1.0)
    projection.weight_scale.fill_(1.0)
    projection.weight.copy_(torch.eye(64, 16))
    projection.rows.zero_()
    values = torch.arange(256, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    projection.rows.view(torch.uint8)[:, 3] = values.view(torch.uint8)
    result = projection.run_tile(tiles.tiles(arch, True)[-1], arch)
    torch.testing.assert_close(result[:, 3], values.to(BF16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", [None, "row"], ids=["bf16", "fp8"])
def test_graph_replay(layout):
    projection = Projection(300, layout=layout)
    expected = projection.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = projection.empty(300)
        if layout is None:
            qkv_a_proj_ag.project(projection.rows, projection.weight, out=out)
        else:
            operands = (projection.rows, projection.scale, projection.weight, projection.weight_scale)
            qkv_a_proj_ag.project_fp8(*operands, out=out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        same_bits([out], [expected])
