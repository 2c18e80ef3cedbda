"""Ranks that share a card: a rank that is late finds SMs for what it runs first, while its peers wait."""

import dataclasses
import functools
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs import Call
from ranks import workspace

import tp_fused
from tp_fused import native, planning

pytestmark = pytest.mark.cuda

TIMEOUT_S = 6.0
SIZES = {"max_num_tokens": 12345, "hidden_size": 1024, "latent_size": 2112, "timeout_s": TIMEOUT_S}
# Of all ranks: calls whose grids are as large as they may be.
CALLS = (
    Call("rs_rmsnorm", 12345, 1024, torch.float16, residual="full"),
    Call("reduce_scatter_rows", 12345, 1024, torch.float32),
    Call("qkv_a_proj_ag", 4131, 1440, torch.bfloat16, latent=(1536, 512, 64)),
)
# cuBLAS chooses kernels for them whose blocks come in clusters, of up to eight.
PRODUCTS = ((3315, 64, 576), (256, 8, 1344), (8, 8, 1344), (64, 4096, 576), (512, 7168, 2112), (2048, 1024, 2112))


def run_late(made: tp_fused.Workspace, device: str, late: tuple[int, ...], work) -> None:
    """Runs on a rank: all ranks make every call, the late ones after work(), which the others give time to begin."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for call in CALLS:
        call = dataclasses.replace(call, device=device)
        arguments = call.arguments(rank, world_size)
        for begins_late in (False, True):  # the first time loads all kernels
            torch.cuda.synchronize()
            dist.barrier()
            if not begins_late or rank in late:
                if begins_late:
                    time.sleep(0.2)
                work()
                torch.cuda.synchronize()
            if not begins_late:
                dist.barrier()
            outputs = call.run(rank, world_size, arguments)
            torch.cuda.synchronize()
            made.check()
        call.check(outputs, rank, world_size)


def multiply(operands) -> None:
    for left, right in operands:
        torch.mm(left, right)


def late_products(device: str, late: int) -> None:
    """Runs on a rank."""
    operands = [
        (
            torch.ones(m, k, dtype=torch.bfloat16, device=device),
            torch.ones(n, k, dtype=torch.bfloat16, device=device).t(),
        )
        for m, k, n in PRODUCTS
    ]
    with workspace("cuda", device, **SIZES) as made:
        run_late(made, device, (late,), functools.partial(multiply, operands))


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8])
def test_products_of_a_late_rank(pool, device, world_size):
    pool.run(late_products, device, world_size - 1)


def late_pair(device: str) -> None:
    """Runs on a rank: the first two have calls of their own to make, one of them in clusters."""
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    with workspace("cuda", device, **SIZES) as made:
        own = [
            Call("qkv_a_proj_ag_norm", 59, 5120, torch.bfloat16, latent=(768, 512, 64), device=device),
            Call("rs_rmsnorm", 2, 8192, torch.bfloat16, residual="full", device=device),
        ]

        def work() -> None:
            if rank > 1:
                return
            for call, arguments in given:
                call.check(call.run(rank, 2, arguments), rank, 2)

        if rank < 2:
            options = {"max_num_tokens": 100, "hidden_size": 8192, "device": device, "timeout_s": TIMEOUT_S}
            with tp_fused.init(pair, **options) as small:
                assert small.max_ctas == made.max_ctas
                given = [(call, call.arguments(rank, 2) | {"group": pair}) for call in own]
                run_late(made, device, (0, 1), work)
        else:
            run_late(made, device, (0, 1), work)


@pytest.mark.parametrize("world_size", [4, 8])
def test_calls_of_a_late_pair(pool, device, world_size):
    pool.run(late_pair, device)


def test_a_cluster_finds_room_beside_what_peers_may_hold(tmp_path):
    """Wherever the SMs lie that other ranks hold, in processes of their own: limits_of_ranks's rule about this card."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    card = native._C.card(0)
    if nvcc is None or card["cluster_sms"] == 0:
        pytest.skip("there is no nvcc" if nvcc is None else "the card has no clusters")
    program, source = tmp_path / "cluster_room", Path(__file__).parent / "cuda" / "cluster_room.cu"
    subprocess.run([nvcc, "-std=c++20", "-arch=native", "-o", program, source], check=True, timeout=120)
    all_limits = {ranks: planning.limits_of(0, ranks) for ranks in range(2, 9)}
    held = sorted({(ranks - 1) * limits.max_ctas for ranks, limits in all_limits.items()})
    run = subprocess.run([program, *map(str, held)], check=True, capture_output=True, text=True, timeout=60)
    found = [line.split() for line in run.stdout.splitlines()]
    assert len(found) >= len(held) and all(stuck == "0" for *_, stuck in found), run.stdout
