"""Gathers of many rows in few blocks: several chunks a block, which TMA moves where there is one and rows
begin at multiples of 16 bytes. The latents are sums of few integers, so that a product has the same bits everywhere.
"""

import zlib

import pytest
import torch
import torch.distributed as dist
from programs import EPS, Call, same_bits, within_one_rounding
from ranks import workspace

import tp_fused
from tp_fused import partition, reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Columns of q_a, kv_a and k_pe: DeepSeek-V3's, without q_lora, and not of whole vectors.
WIDTHS = [(1536, 512, 64), (0, 512, 64), (1001, 515, 7)]
COUNTS = (300, 3, 299, 17)
HIDDEN_SIZE = 64


def integers(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(-1, 2, shape, generator=generator).float()


def project(device: str, dtype: torch.dtype, widths: tuple[int, int, int]) -> list[int]:
    """Runs on a rank: a checksum of every call's results."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    weight = integers("weight", sum(widths), HIDDEN_SIZE)
    norms = [1 + integers("norm", width).to(dtype) / 8 for width in widths[:2]]
    sums = []
    sizes = {"max_num_tokens": max(COUNTS), "hidden_size": HIDDEN_SIZE, "latent_size": sum(widths), "max_ctas": 2}
    with workspace(device, device, dtype=dtype, **sizes):
        for num_tokens in COUNTS:
            rows = integers(f"rows {num_tokens}", num_tokens, HIDDEN_SIZE)
            latent = (rows @ weight.t()).to(dtype)
            own = rows[partition.row_slice(num_tokens, rank, world_size)].to(device, dtype)
            arguments = own, weight.to(device, dtype)
            outputs = [tp_fused.qkv_a_proj_ag(*arguments, num_tokens).cpu()]
            same_bits(outputs, (latent,))
            normed = tp_fused.qkv_a_proj_ag_norm(*arguments, *(norm.to(device) for norm in norms), num_tokens, EPS)
            normed = [output.cpu() for output in normed]
            expected = reference.split_and_norm(latent, *norms, EPS)
            within_one_rounding(normed, expected, dtype)
            same_bits(normed[2:], expected[2:])
            outputs += normed
            sums += [zlib.crc32(output.view(torch.uint8).numpy().tobytes()) for output in outputs]
    return sums


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_latents_have_the_same_bits_on_all_ranks(pool, device, dtype, widths, world_size):
    sums = pool.run(project, device, DTYPES[dtype], widths)
    assert sums == [sums[0]] * world_size


def gather(device: str, counts: list[int], columns: int, shift: int, max_ctas: int | None) -> None:
    """Runs on a rank: six rounds. shift: bytes by which this rank's rows miss a multiple of 16."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, max_num_tokens=max(counts), hidden_size=columns, max_ctas=max_ctas):
        for i in range(6):
            call = Call("all_gather_rows", counts[i % len(counts)], columns, torch.uint8, seed=i, device=device)
            arguments = call.arguments(rank, world_size)
            rows = arguments["input"]
            memory = torch.empty(rows.numel() + shift, dtype=rows.dtype, device=device)
            arguments["input"] = memory[shift:].view(rows.shape).copy_(rows)
            call.check(call.run(rank, world_size, arguments), rank, world_size)


@pytest.mark.parametrize(("columns", "shift"), [(4096, 0), (4096, 1), (1001, 0)])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_rows_of_any_width_and_place(pool, device, columns, shift, world_size):
    pool.run(gather, device, [300, 299], columns, shift, 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_rows_in_many_blocks(pool, device, world_size):
    """Several chunks a block of all that there may be: where ranks have cards of their own, not by TMA."""
    pool.run(gather, device, [1300 * world_size, 1300 * world_size - 1], 4096, 0, None)
