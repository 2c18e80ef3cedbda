"""The projection of this rank's rows by a replicated weight: what `qkv_a_proj_ag` gathers afterwards.

A persistent grid: the tiles are dealt out to at most `max_ctas` blocks. Hopper and the large Blackwell read operands
by TMA, other GPUs with cp.async. Nothing is chosen by measuring at run time (tiles.py). A kernel is compiled, at its
first call, for the weight's shape, the dtype, with or without bias, and the tile: at most six for a model.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles


@triton.jit
def _fp16_of_e4m3(bytes):
    """e4m3 values, given as bytes, as fp16 times 2^-8: exact, subnormal or not; NaN stays NaN.

    The exponent's 4 bits are put into fp16's 5, whose bias is 8 more. Four bytes at a time, into two registers.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 wide, magnitude, carry;
        prmt.b32 wide, $2, 0, 0x1404;
        shr.b32 magnitude, wide, 1;
        and.b32 magnitude, magnitude, 0x3f803f80;
        add.u32 carry, magnitude, 0x00800080;
        lop3.b32 magnitude, carry, 0x40004000, magnitude, 0xea;
        lop3.b32 $0, wide, 0x80008000, magnitude, 0xea;
        prmt.b32 wide, $2, 0, 0x3424;
        shr.b32 magnitude, wide, 1;
        and.b32 magnitude, magnitude, 0x3f803f80;
        add.u32 carry, magnitude, 0x00800080;
        lop3.b32 magnitude, carry, 0x40004000, magnitude, 0xea;
        lop3.b32 $1, wide, 0x80008000, magnitude, 0xea;
        }
        """,
        "=&r,=&r,r",
        [bytes],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _load(
    source, row, column, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """[ROWS, COLUMNS] of a contiguous [num_rows, WIDTH] from (row, column) on; zeros beyond its edges."""
    if TMA:
        return source.load([row, column])
    else:
        rows = tl.arange(0, ROWS)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        inside = rows < num_rows - row
        if WIDTH % COLUMNS:
            inside = inside & (columns < WIDTH)
        return tl.load(source + tl.cast(row, tl.int64) * WIDTH + (rows * WIDTH + columns), mask=inside, other=0.0)


@triton.jit
def _multiply(
    input, weight, num_rows, row, column,
    COLUMNS: tl.constexpr, HIDDEN_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for k in range(0, HIDDEN_SIZE, BLOCK_DEPTH):
        a = _load(input, row, k, num_rows, HIDDEN_SIZE, BLOCK_ROWS, BLOCK_DEPTH, TMA)
        b = _load(weight, column, k, COLUMNS, HIDDEN_SIZE, BLOCK_COLUMNS, BLOCK_DEPTH, TMA)
        total = tl.dot(a, b.T, total)
    return total


@triton.jit
def _multiply_scaled(
    input, scale, weight, weight_scale, num_rows, row_stride, group_stride, row, column,
    COLUMNS: tl.constexpr, HIDDEN_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, AS_FP16: tl.constexpr,
):  # fmt: skip
    """The sum of every GROUP columns is multiplied by its two scales and added to the total, both in fp32."""
    groups: tl.constexpr = (HIDDEN_SIZE + GROUP - 1) // GROUP
    rows = row + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    row_scale = scale + rows.to(tl.int64) * row_stride
    block_scale = weight_scale + column // GROUP * groups
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    factor = tl.load(row_scale, mask=inside, other=0.0) * tl.load(block_scale)
    for group in range(0, groups):
        a = _load(input, row, group * GROUP, num_rows, HIDDEN_SIZE, BLOCK_ROWS, GROUP, TMA)
        b = _load(weight, column, group * GROUP, COLUMNS, HIDDEN_SIZE, BLOCK_COLUMNS, GROUP, TMA)
        product = tl.dot(_fp16_of_e4m3(a), _fp16_of_e4m3(b).T) if AS_FP16 else tl.dot(a, b.T)
        # The next scales, a step ahead: nothing below waits for them.
        next = tl.minimum(group + 1, groups - 1)
        next_row_scale = tl.load(row_scale + next.to(tl.int64) * group_stride, mask=inside, other=0.0)
        next_factor = next_row_scale * tl.load(block_scale + next)
        total += product * factor[:, None]
        factor = next_factor
    if AS_FP16:
        total *= 65536.0  # 2^8 for each operand
    return total


@triton.jit
def _project_tile(
    output, input, weight, bias, scale, weight_scale, num_rows, row_stride, group_stride, row, column,
    COLUMNS: tl.constexpr, HIDDEN_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, TMA: tl.constexpr, AS_FP16: tl.constexpr,
):  # fmt: skip
    if scale is None:
        total = _multiply(
            input, weight, num_rows, row, column, COLUMNS, HIDDEN_SIZE, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, TMA
        )
    else:
        total = _multiply_scaled(
            input, scale, weight, weight_scale, num_rows, row_stride, group_stride, row, column, COLUMNS, HIDDEN_SIZE,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, TMA, AS_FP16,
        )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    inside = (rows < num_rows) & (columns < COLUMNS)
    tl.store(output + rows.to(tl.int64) * COLUMNS + columns, total.to(output.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_rows", "row_stride", "group_stride"],
    do_not_specialize_on_alignment=["bias", "scale", "weight_scale"],
)
def projection_kernel(
    output, input, weight, strip, bias, scale, weight_scale, num_rows, row_stride, group_stride,
    COLUMNS: tl.constexpr, HIDDEN_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, STRIP: tl.constexpr, TMA: tl.constexpr, AS_FP16: tl.constexpr,
):  # fmt: skip
    """output [num_rows, COLUMNS] = input [num_rows, HIDDEN_SIZE] @ weight [COLUMNS, HIDDEN_SIZE].T + bias

    With `scale`, in fp8: scale [num_rows, groups] with the strides given, weight_scale [ceil(COLUMNS / 128), groups].
    input and weight are tensor descriptors with TMA, pointers without; `strip` is the weight in blocks of STRIP
    columns. Row blocks are finished in order, all tiles of a row block at about the same time, so that it is read from
    memory once; the strip of STRIP columns comes last, in tiles of as many elements as the others have.
    """
    across: tl.constexpr = COLUMNS // BLOCK_COLUMNS if STRIP else (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    blocks_of_strip: tl.constexpr = BLOCK_COLUMNS // STRIP if STRIP else 1
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    num_full = row_blocks * across
    num_tiles = num_full
    if STRIP:
        num_tiles += tl.cdiv(row_blocks, blocks_of_strip)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        if tile < num_full:
            _project_tile(
                output, input, weight, bias, scale, weight_scale, num_rows, row_stride, group_stride,
                tile // across * BLOCK_ROWS, tile % across * BLOCK_COLUMNS, COLUMNS, HIDDEN_SIZE, BLOCK_ROWS,
                BLOCK_COLUMNS, BLOCK_DEPTH, TMA, AS_FP16,
            )  # fmt: skip
        elif STRIP:
            first = (tile - num_full) * blocks_of_strip
            for block in range(first, tl.minimum(first + blocks_of_strip, row_blocks)):
                _project_tile(
                    output, input, strip, bias, scale, weight_scale, num_rows, row_stride, group_stride,
                    block * BLOCK_ROWS, across * BLOCK_COLUMNS, COLUMNS, HIDDEN_SIZE, BLOCK_ROWS, STRIP, BLOCK_DEPTH,
                    TMA, AS_FP16,
                )  # fmt: skip


def prepare(arch: int, tile: tiles.Tile, out, input, weight, bias=None, scale=None, weight_scale=None):
    """The arguments of projection_kernel and the options it is compiled with, for an sm_`arch`."""
    columns, hidden_size = weight.shape
    tma, as_fp16 = tiles.is_large(arch), scale is not None and not tiles.has_fp8(arch)
    strip = tile.strip(columns)

    def blocks(operand: torch.Tensor, rows: int):
        if as_fp16:
            operand = operand.view(torch.uint8)
        return TensorDescriptor(operand, operand.shape, operand.stride(), [rows, tile.depth]) if tma else operand

    weight_blocks = blocks(weight, tile.columns)
    strip_blocks = blocks(weight, strip) if strip else weight_blocks
    tensors = (out, blocks(input, tile.rows), weight_blocks, strip_blocks, bias, scale, weight_scale)
    strides = (0, 0) if scale is None else scale.stride()
    constants = (columns, hidden_size, tile.rows, tile.columns, tile.depth, strip, tma, as_fp16)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages(arch, input.element_size())}
    # The scaled sums are added by fused multiply-adds, whatever Triton's default becomes.
    return (*tensors, input.shape[0], *strides, *constants), options | {"enable_fp_fusion": True}


@functools.lru_cache
def _card(index: int) -> tuple[int, int]:
    """Architecture (90 for sm_90) and number of SMs."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


_compiled = {}


def _launch(out, input, weight, bias, scale, weight_scale, max_ctas: int | None) -> torch.Tensor:
    num_rows, columns = out.shape
    if num_rows == 0:
        return out
    index = input.device.index
    arch, num_sms = _card(index)
    num_ctas = max_ctas or num_sms
    tile = tiles.choose(num_rows, columns, num_ctas, arch, scale is not None)
    arguments, options = prepare(arch, tile, out, input, weight, bias, scale, weight_scale)
    key = (index, tile, weight.shape, input.dtype, bias is None)
    with torch.cuda.device(index):
        if key not in _compiled:
            _compiled[key] = projection_kernel.warmup(*arguments, grid=(1,), **options)
        # Without the look at every argument that Triton's own launch takes to find what it has compiled.
        _compiled[key][min(tile.count(num_rows, columns), num_ctas), 1, 1](*arguments)
    return out


def project(input, weight, bias=None, *, out: torch.Tensor, max_ctas: int | None = None) -> torch.Tensor:
    """out = input @ weight.T + bias, added up in fp32 and rounded once.

    input [num_rows, hidden_size], weight [columns, hidden_size] and bias [columns] or None are of one dtype, bf16 or
    fp16; out [num_rows, columns] is of the same. All are contiguous; input, weight and out begin at multiples of 16
    bytes, columns is a multiple of 8, hidden_size of 16. Any num_rows. Runs on the current stream, on at most
    `max_ctas` blocks (default: one for each SM). Returns out.
    """
    return _launch(out, input, weight, bias, None, None, max_ctas)


def project_fp8(q, scale, weight, weight_scale, *, out: torch.Tensor, max_ctas: int | None = None) -> torch.Tensor:
    """out = dequantised q @ dequantised weight.T, every 128 products added up, scaled and added up again in fp32.

    q [num_rows, hidden_size] and weight [columns, hidden_size] are e4m3; scale fp32 [num_rows, ceil(hidden_size / 128)]
    of any strides; weight_scale fp32 [ceil(columns / 128), ceil(hidden_size / 128)], contiguous; out bf16. The rest is
    as in `project`.
    """
    return _launch(out, q, weight, None, scale, weight_scale, max_ctas)
