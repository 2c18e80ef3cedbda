"""Rows of every size that the kernels take, read in place and staged, one a block and several: what a block holds of
them in registers and in shared memory depends on it.
"""

import pytest
import torch
import torch.distributed as dist
from programs import EPS, random, same_bits, within_one_rounding
from ranks import workspace

import tp_fused
from tp_fused import partition, reference

LARGEST = 16384
MAX_CTAS = {torch.bfloat16: 4, torch.float16: 1, torch.float32: 8}  # which may share a row
COUNTS = {2: (2, 13), 5: (4, 31)}  # tokens, by world size: of the first at most one a rank


def rows(sample: torch.Tensor, *shape: int) -> torch.Tensor:
    return sample[: shape[0] * shape[1]].view(shape)


def reduce_rows(device: str, dtype: torch.dtype, step: int) -> None:
    """Runs on a rank: rows of 8, 8 + step, ... columns."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    most = max(COUNTS[world_size])
    samples = [random(f"rank {peer}", (most * LARGEST,), dtype).to(device) for peer in range(world_size)]
    residual, weight = samples[0].flip(0), 1 + samples[0][:LARGEST] / 8
    sizes = {"max_num_tokens": most, "hidden_size": LARGEST, "max_ctas": MAX_CTAS[dtype]}
    with workspace(device, device, dtype=dtype, **sizes):
        memory = tp_fused.symm_empty((most * LARGEST,), dtype=dtype, device=device).copy_(samples[rank])
        for hidden_size in range(8, LARGEST + 1, step):
            for num_tokens in COUNTS[world_size]:
                shape = num_tokens, hidden_size
                parts = [rows(sample, *shape) for sample in samples]
                stored = reference.sum_in_rank_order(parts, rows(residual, *shape))
                normed = reference.rms_norm(stored, weight[:hidden_size], EPS)
                own = partition.row_slice(num_tokens, rank, world_size)
                for input in (samples[rank], memory):
                    arguments = rows(input, *shape), rows(residual, *shape), weight[:hidden_size], EPS
                    try:
                        outputs = [*tp_fused.rs_rmsnorm(*arguments), *tp_fused.rs_rmsnorm_ag(*arguments)]
                        within_one_rounding(outputs[::2], (normed[own], normed), dtype)
                        same_bits(outputs[1::2], (stored[own], stored[own]))
                    except Exception as error:
                        where = "in place" if input is memory else "staged"
                        raise AssertionError(f"{num_tokens} rows of {hidden_size}, {where}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("world_size", [2, 5])
def test_rows_of_any_size(pool, device, dtype, world_size):
    pool.run(reduce_rows, device, dtype, 8 if device == "cuda" and dtype == torch.bfloat16 else 616)


def gather_either_way(backend: str, device: str) -> None:
    """Runs on a rank: few tokens, which all ranks add up on CUDA, and more, which their owners do."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = {"max_num_tokens": 300, "hidden_size": 1792, "dtype": torch.float32}
    counts = (1, 7, 16, 33, 64, 120, 300) if device == "cuda" else (1, 33)
    with workspace(backend, device, **sizes):
        for dtype in (torch.bfloat16, torch.float32):
            weight = random("weight", (1792,), dtype).to(device)
            for num_tokens in counts:
                input = random(f"rank {rank}", (num_tokens, 1792), dtype).to(device)
                memory = tp_fused.symm_empty(input.shape, dtype=dtype, device=device).copy_(input)
                own = partition.row_slice(num_tokens, rank, world_size)
                residual = random("residual", (num_tokens, 1792), dtype)[own].to(device)
                for given in ((input, None), (input, residual), (memory, residual)):
                    normed, stored = tp_fused.rs_rmsnorm(*given, weight, EPS)
                    expected = tp_fused.all_gather_rows(normed, num_tokens), stored
                    same_bits(tp_fused.rs_rmsnorm_ag(*given, weight, EPS), expected)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_gathered_rows_have_the_bits_of_two_ops(pool, backend, device, world_size):
    pool.run(gather_either_way, backend, device)
