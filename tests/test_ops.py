"""Every op on every backend, dtype, world size and token count, against the unfused program in one process."""

import zlib

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, NORMS, OPS, PROJECTIONS, Call, same_bits
from ranks import workspace

import tp_fused

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Once a multiple of 128, once a partial group of 128, once below it.
HIDDEN = {"bf16": 256, "fp16": 208, "fp32": 96}
GATHERS = ("all_gather_rows", *PROJECTIONS)  # all ranks get the same bits


def token_counts(world_size: int) -> list[int]:
    return sorted({0, 1, world_size - 1, world_size, world_size + 1, 257, 1023})


def digest(tensor: torch.Tensor) -> tuple:
    """What tells a tensor's bits from others."""
    bits = zlib.crc32(tensor.cpu().view(torch.uint8).numpy().tobytes()) if tensor.numel() else 0
    return tensor.shape, tensor.dtype, bits


def check_calls(backend: str, device: str, calls: list[Call]) -> list[tuple]:
    """Runs on a rank. What all ranks get is checked on one of them: returns what tells it from another result."""
    digests = []
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hidden_size = max(call.hidden_size for call in calls)
    sizes = {"max_num_tokens": max(call.num_tokens for call in calls) or 1, "hidden_size": hidden_size}
    latent_size = max(sum(call.latent) for call in calls)
    with workspace(backend, device, latent_size=latent_size, **sizes):
        for index, call in enumerate(calls):
            arguments = call.arguments(rank, world_size)
            before = {key: value.clone() for key, value in arguments.items() if torch.is_tensor(value)}
            try:
                outputs = call.run(rank, world_size, arguments)
                if call.op in GATHERS:
                    digests.append((str(call), *map(digest, outputs)))
                if call.op not in GATHERS or index % world_size == rank:
                    call.check(outputs, rank, world_size)
                same_bits([arguments[key] for key in before], list(before.values()))
            except AssertionError as error:
                raise AssertionError(f"{call}: {error}") from error
    return digests


def check(pool, backend: str, device: str, calls: list[Call]) -> None:
    digests = pool.run(check_calls, backend, device, calls)
    assert digests == [digests[0]] * len(digests)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_op(pool, backend, device, op, dtype, world_size):
    residuals = [None, "full", "slice"]
    calls = [
        Call(op, count, HIDDEN[dtype], DTYPES[dtype], residuals[i % 3], seed=i, device=device)
        for i, count in enumerate(token_counts(world_size))
    ]
    check(pool, backend, device, calls)


@pytest.mark.parametrize("op", ["rs_rmsnorm", "rs_rmsnorm_fp8", "rs_rmsnorm_ag"])
@pytest.mark.parametrize("residual", [None, "full", "slice"])
@pytest.mark.parametrize("world_size", [3])
def test_residual_forms(pool, backend, device, op, residual, world_size):
    # 1 token on 3 ranks: full and slice have the same shape on one rank and differ on the others.
    calls = [Call(op, count, residual=residual, device=device) for count in (1, 2, 3, 50)]
    check(pool, backend, device, calls)


@pytest.mark.parametrize("op", ["rs_rmsnorm", "rs_rmsnorm_fp8"])
@pytest.mark.parametrize("residual", [None, "full", "slice"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_complete_input_is_not_summed(pool, backend, device, op, residual, world_size):
    options = {"complete": True}
    calls = [Call(op, count, residual=residual, device=device, options=options) for count in (0, 1, 50)]
    check(pool, backend, device, calls)


# Latents of whole vectors, of 15 columns, and wider than a lane holds; rows of 1 KB and of 16 KB, which other bodies
# take.
@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize(
    "options", [{"weight_offset": 1.0}, {"float_weight": True}, {"weight_offset": -0.3, "float_weight": True}]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [3])
def test_norm_weights(pool, backend, device, op, options, dtype, world_size):
    latents = [LATENT, (15, 1024, 3), (2200, 40, 8)] if op == "qkv_a_proj_ag_norm" else [LATENT]
    many = 300 if device == "cuda" else 20  # on the CPU all wide rows go the same way
    sizes = [(1, 512), (7, 8192), (300, 512), (many, 16384)] if op != "qkv_a_proj_ag_norm" else [(2, 512), (300, 512)]
    calls = [
        Call(op, count, hidden, DTYPES[dtype], "full", i, device, latent, options)
        for latent in latents
        for i, (count, hidden) in enumerate(sizes)
    ]
    check(pool, backend, device, calls)


def check_complete_projections(backend: str, device: str, op: str) -> list[tuple]:
    """Runs on a rank. As `check_calls`: all ranks get all rows."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    narrow = [(8, 8, 0)] if op.endswith("fp8") else [(15, 9, 3), (2, 1, 1)]
    digests = []
    with workspace(backend, device, max_num_tokens=70, hidden_size=1600):
        sizes = ((0, 16, 0), (1, 208, 0), (world_size - 1, 512, 1), (33, 1024, 2), (70, 208, 1))
        for latent in (LATENT, (768, 512, 64), *narrow):
            for i, (count, hidden, dtype) in enumerate(sizes):
                options = {"complete": True}
                if op == "qkv_a_proj_ag":
                    options["bias"] = i % 2 == 1
                elif op == "qkv_a_proj_ag_norm":
                    options |= {"weight_offset": 1.0 * (i % 2), "float_weight": i > 2}
                dtype = list(DTYPES.values())[dtype]
                call = Call(op, count, hidden, dtype, seed=i, device=device, latent=latent, options=options)
                outputs = call.run(rank, world_size)
                if rank == world_size - 1:
                    call.check(outputs, rank, world_size)
                digests += map(digest, outputs)
    return digests


@pytest.mark.parametrize("op", PROJECTIONS)
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_projections_of_rows_that_every_rank_has(pool, backend, device, op, world_size):
    """Each rank multiplies a share of the columns, and all have the same bits of all of them."""
    digests = pool.run(check_complete_projections, backend, device, op)
    assert digests[0] and digests == [digests[0]] * len(digests)


def signs_of_negative_zeros(backend: str, device: str) -> list[bool]:
    """Runs on a rank: whether all outputs of a weight of -0 are negative, by offset."""
    rows, weight = torch.ones(3, 256, device=device), torch.full((256,), -0.0, device=device)
    with workspace(backend, device):
        outputs = [
            output
            for offset in (0.0, -0.0, 1e-50)
            for output in (
                tp_fused.rs_rmsnorm(rows, None, weight, weight_offset=offset)[0],
                *tp_fused.qkv_a_proj_ag_norm(rows, rows[:2], weight[:1], weight[:1], 3, weight_offset=offset)[:2],
            )
        ]
        return [bool(torch.signbit(output).all()) for output in outputs]


@pytest.mark.parametrize("world_size", [1])
def test_an_offset_of_zero_leaves_every_weight_as_it_is(pool, backend, device, world_size):
    assert pool.run(signs_of_negative_zeros, backend, device) == [[True] * 9]


@pytest.mark.parametrize("scale_layout", ["row", "column"])
@pytest.mark.parametrize("keep_output", [False, True])
@pytest.mark.parametrize("group_size", [64, 128, 208])
@pytest.mark.parametrize("round_scales", [False, True])
@pytest.mark.parametrize("world_size", [2])
def test_fp8_options(pool, backend, device, scale_layout, keep_output, group_size, round_scales, world_size):
    options = {"scale_layout": scale_layout, "keep_output": keep_output, "group_size": group_size}
    options["round_scales"] = round_scales
    calls = [Call("rs_rmsnorm_fp8", count, device=device, options=options) for count in (0, 1, 2, 3, 51)]
    check(pool, backend, device, calls)


def column_strides(backend: str, device: str) -> tuple[int, int]:
    """Runs on a rank."""
    with workspace(backend, device):
        call = Call("rs_rmsnorm_fp8", 13, hidden_size=256, device=device, options={"scale_layout": "column"})
        return call.run(dist.get_rank(), dist.get_world_size())[1].stride()


@pytest.mark.parametrize("world_size", [2])
def test_column_scales_are_padded_to_four_rows(pool, backend, device, world_size):
    assert pool.run(column_strides, backend, device) == [(1, 8), (1, 8)]  # of 7 and of 6 rows


@pytest.mark.parametrize(
    ("op", "options"), [("qkv_a_proj_ag", {"bias": True}), ("qkv_a_proj_ag_fp8", {"scale_layout": "column"})]
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_projection_options(pool, backend, device, op, options, world_size):
    dtype = torch.float32 if op.endswith("fp8") else torch.bfloat16
    calls = [Call(op, count, dtype=dtype, device=device, options=options) for count in (0, 1, 51)]
    check(pool, backend, device, calls)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("world_size", [3])
def test_all_gather_of_bytes(pool, backend, device, dtype, world_size):
    check(pool, backend, device, [Call("all_gather_rows", n, dtype=dtype, device=device) for n in (2, 51)])
