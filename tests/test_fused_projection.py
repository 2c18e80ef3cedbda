"""Projections, which on Hopper multiply and gather in one kernel: against the fp32 product of the same inputs, with the
error of torch's own product as the measure. The CPU runs the same program on few rows.
"""

import re
import zlib

import pytest
import torch
import torch.distributed as dist
from programs import EPS, random, within_one_rounding
from ranks import workspace
from torch.nn.functional import linear

import tp_fused
from tp_fused import partition, reference

FP8 = torch.float8_e4m3fn
# q_a, kv_a and k_pe of DeepSeek-V3, GLM-5, GLM-4.7-Flash and DeepSeek-V2-Lite: all 64 mod 128.
WIDTHS = [(1536, 512, 64), (2048, 512, 64), (768, 512, 64), (0, 512, 64)]


def worst(value: torch.Tensor, exact: torch.Tensor) -> float:
    return (value.float() - exact).abs().max().item()


def checksum(tensors) -> int:
    return zlib.crc32(b"".join(tensor.cpu().view(torch.uint8).numpy().tobytes() for tensor in tensors))


def project(device: str, dtype: torch.dtype, num_tokens: int, hidden_size: int, widths: tuple[int, int, int]) -> int:
    """Runs on a rank: a checksum of all results."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = partition.row_slice(num_tokens, rank, world_size)
    columns = sum(widths)
    rows = random(f"rows {num_tokens}", (num_tokens, hidden_size), torch.float32).to(device)
    weight = random("weight", (columns, hidden_size), torch.float32, hidden_size**-0.5).to(device)
    bias = random("bias", (columns,), torch.bfloat16).to(device)
    norms = [(1 + random("norm", (width,), torch.float32) / 8).to(device, torch.bfloat16) for width in widths[:2]]
    sizes = {"max_num_tokens": num_tokens, "hidden_size": hidden_size, "latent_size": columns}
    if device == "cuda" and 1 < world_size <= torch.cuda.device_count():
        sizes["max_ctas"] = 44  # with most of a card, torch multiplies few rows
    with workspace(device, device, dtype=torch.bfloat16, **sizes):
        if dtype == FP8:
            q, scale = reference.quantize_e4m3(rows.bfloat16())
            blocks = tuple(-(-size // 128) for size in weight.shape)
            q_weight = (weight * hidden_size**0.5 * 16).to(FP8)
            weight_scale = (1 + random("scale", blocks, torch.float32).abs()).to(device) / 16
            exact = linear(
                reference.dequantize(q, scale, (1, 128)), reference.dequantize(q_weight, weight_scale, (128, 128))
            )
            plain = reference.project_fp8(q, scale, q_weight, weight_scale)

            def call():
                given = q[own].contiguous(), scale[own].contiguous(), q_weight, weight_scale
                return [tp_fused.qkv_a_proj_ag_fp8(*given, num_tokens)]
        else:
            input, kernel_weight = rows.to(dtype), weight.to(dtype)
            exact = linear(input.float(), kernel_weight.float(), bias.float())
            plain = linear(input, kernel_weight, bias.to(dtype))

            def call():
                given = input[own].contiguous(), kernel_weight
                latent = tp_fused.qkv_a_proj_ag(*given, num_tokens, bias=bias.to(dtype))
                weights = [norm.to(dtype) for norm in norms]
                return [latent, *tp_fused.qkv_a_proj_ag_norm(*given, *weights, num_tokens, EPS)]

        # Where ranks share a card, torch's product on a late one may not fit beside kernels that wait for it.
        if device == "cuda":
            torch.cuda.synchronize()
            dist.barrier()
        outputs = call()
        # Two slots: the third call finds what the first has left.
        for _ in range(3):
            assert checksum(call()) == checksum(outputs)
        assert worst(outputs[0], exact) <= 1.1 * worst(plain, exact)
        if dtype != FP8:
            latent = tp_fused.qkv_a_proj_ag(input[own].contiguous(), kernel_weight, num_tokens)
            expected = reference.split_and_norm(latent, *(norm.to(dtype) for norm in norms), EPS)
            within_one_rounding(outputs[1:], expected, dtype)
        if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
            op = "qkv_a_proj_ag_fp8" if dtype == FP8 else "qkv_a_proj_ag"
            assert "one kernel multiplies" in tp_fused.explain(op, num_tokens)
    return checksum(outputs)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_many_rows(pool, device, dtype, widths, world_size):
    # 33 blocks of 64 along K, the last of them a quarter.
    num_tokens, hidden_size = (21, 144) if device == "cpu" else (256 * world_size + 77, 2064)
    sums = pool.run(project, device, dtype, num_tokens, hidden_size, widths)
    assert sums == [sums[0]] * world_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("widths", [WIDTHS[0], (2048, 512, 1024), (2048, 512, 2048)], ids=str)
@pytest.mark.parametrize("world_size", [1, 8])
def test_several_turns_of_tiles(pool, device, dtype, widths, world_size):
    """Rows are copied while later ones are multiplied. Wide ones: where normed rows need other tiles, or another
    kernel than the rest."""
    num_tokens, hidden_size = (21, 144) if device == "cpu" else (700 * world_size + 5, 1040)
    sums = pool.run(project, device, dtype, num_tokens, hidden_size, widths)
    assert sums == [sums[0]] * world_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("rows", [1, 9, 40, 64, 100, 130])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_few_rows(pool, device, dtype, rows, world_size):
    """Fewer rows go through other tiles; some ranks own one row less."""
    num_tokens = max(1, rows * world_size - 1) if device == "cuda" else rows
    sums = pool.run(project, device, dtype, num_tokens, 272 if device == "cpu" else 2064, WIDTHS[0])
    assert sums == [sums[0]] * world_size


@pytest.mark.parametrize("world_size", [1, 3])
def test_scales_of_four_blocks(pool, device, world_size):
    """Of 2048 columns fp8 rows have 16 scales, side by side at a multiple of 16 bytes: four are fetched at a time."""
    num_tokens = (300 if device == "cuda" else 7) * world_size
    sums = pool.run(project, device, FP8, num_tokens, 2048, WIDTHS[0])
    assert sums == [sums[0]] * world_size


def rows_alone(device: str, dtype: torch.dtype) -> None:
    """Runs on a rank: a row has the same bits among any number of rows. Of fp8, 2000 go through the widest tiles."""
    weight = random("weight", (2112, 1024), torch.float32, 1 / 32).to(device)
    rows = random("rows", (2500, 1024), torch.float32).to(device, torch.bfloat16)
    if dtype == FP8:
        q, scale = reference.quantize_e4m3(rows)
        given = (weight * 512).to(FP8), (1 + random("scale", (17, 8), torch.float32).abs()).to(device) / 512
    with workspace(device, device, max_num_tokens=2500, hidden_size=1024, latent_size=2112, dtype=torch.bfloat16):

        def call(count):
            if dtype == FP8:
                return tp_fused.qkv_a_proj_ag_fp8(q[:count], scale[:count], *given, count)
            return tp_fused.qkv_a_proj_ag(rows[:count], weight.to(dtype), count)

        many = call(2500)
        for count in (1, 64, 100, 250, 500, 600, 1000, 1500, 2000):
            assert (many[:count].view(torch.int16) == call(count).view(torch.int16)).all(), count


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("world_size", [1])
def test_a_row_does_not_depend_on_the_others(pool, device, world_size, dtype):
    pool.run(rows_alone, device, dtype)


def tiles(device: str, num_tokens: int) -> dict[str, str]:
    """Runs on a rank: what 16 blocks would multiply in, by op."""
    sizes = {"max_num_tokens": num_tokens, "hidden_size": 7168, "latent_size": 2112, "max_ctas": 16}
    with workspace(device, device, dtype=torch.bfloat16, **sizes):
        told = {op: tp_fused.explain(op, num_tokens) for op in ("qkv_a_proj_ag", "qkv_a_proj_ag_fp8")}
        return {op: re.search(r"tiles of (\d+ x \d+)", text)[1] for op, text in told.items()}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("num_tokens", "bf16", "fp8"),
    [(2048, "128 x 264", "128 x 264"), (4096, "128 x 264", "128 x 264"), (16384, "128 x 264", "128 x 264")],
)
@pytest.mark.parametrize("world_size", [8])
def test_tiles_are_the_fastest_ones(pool, device, world_size, num_tokens, bf16, fp8):
    """As measured with eight ranks on an H100, each kind forced."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("those of Hopper's kernel")
    for chosen in pool.run(tiles, device, num_tokens):
        assert chosen["qkv_a_proj_ag"] == bf16
        assert chosen["qkv_a_proj_ag_fp8"] == fp8
