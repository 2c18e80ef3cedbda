"""Every op on every backend, dtype, world size and token count, against the unfused program in one process."""

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, OPS, Call, same_bits
from ranks import workspace

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Once a multiple of 128, once a partial group of 128, once below it.
HIDDEN = {"bf16": 256, "fp16": 208, "fp32": 96}


def token_counts(world_size: int) -> list[int]:
    return sorted({0, 1, world_size - 1, world_size, world_size + 1, 257, 1023})


def check_calls(backend: str, device: str, calls: list[Call]) -> None:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hidden_size = max(call.hidden_size for call in calls)
    sizes = {"max_num_tokens": max(call.num_tokens for call in calls) or 1, "hidden_size": hidden_size}
    with workspace(backend, device, latent_size=sum(LATENT), **sizes):
        for call in calls:
            arguments = call.arguments(rank, world_size)
            before = {key: value.clone() for key, value in arguments.items() if torch.is_tensor(value)}
            try:
                call.check(call.run(rank, world_size, arguments), rank, world_size)
                same_bits([arguments[key] for key in before], list(before.values()))
            except AssertionError as error:
                raise AssertionError(f"{call}: {error}") from error


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_op(pool, backend, device, op, dtype, world_size):
    residuals = [None, "full", "slice"]
    calls = [
        Call(op, count, HIDDEN[dtype], DTYPES[dtype], residuals[i % 3], seed=i, device=device)
        for i, count in enumerate(token_counts(world_size))
    ]
    pool.run(check_calls, backend, device, calls)


@pytest.mark.parametrize("op", ["rs_rmsnorm", "rs_rmsnorm_fp8", "rs_rmsnorm_ag"])
@pytest.mark.parametrize("residual", [None, "full", "slice"])
@pytest.mark.parametrize("world_size", [3])
def test_residual_forms(pool, backend, device, op, residual, world_size):
    # 1 token on 3 ranks: full and slice have the same shape on one rank and differ on the others.
    calls = [Call(op, count, residual=residual, device=device) for count in (1, 2, 3, 50)]
    pool.run(check_calls, backend, device, calls)


@pytest.mark.parametrize("op", ["rs_rmsnorm", "rs_rmsnorm_fp8"])
@pytest.mark.parametrize("residual", [None, "full", "slice"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_complete_input_is_not_summed(pool, backend, device, op, residual, world_size):
    options = {"complete": True}
    calls = [Call(op, count, residual=residual, device=device, options=options) for count in (0, 1, 50)]
    pool.run(check_calls, backend, device, calls)


@pytest.mark.parametrize("scale_layout", ["row", "column"])
@pytest.mark.parametrize("keep_output", [False, True])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("world_size", [2])
def test_fp8_options(pool, backend, device, scale_layout, keep_output, group_size, world_size):
    options = {"scale_layout": scale_layout, "keep_output": keep_output, "group_size": group_size}
    calls = [Call("rs_rmsnorm_fp8", count, device=device, options=options) for count in (0, 1, 2, 3, 51)]
    pool.run(check_calls, backend, device, calls)


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
    pool.run(check_calls, backend, device, calls)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("world_size", [3])
def test_all_gather_of_bytes(pool, backend, device, dtype, world_size):
    pool.run(check_calls, backend, device, [Call("all_gather_rows", n, dtype=dtype, device=device) for n in (2, 51)])
