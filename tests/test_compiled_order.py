"""Calls of a workspace keep their program order in compiled graphs, on every rank: random graphs against eager ones."""

import random

import pytest
import torch
import torch.distributed as dist
from ranks import workspace

import tp_fused

pytestmark = pytest.mark.preload("warm_compiler")

NUM_TOKENS, HIDDEN = 5, 64  # shares of two ranks: 3 and 2 rows, which compilers weigh differently
WIDTHS = (8, 16, 64)


def random_program(seed: int) -> list[tuple]:
    """Steps of two or three branches, interleaved: (branch, op or "mm", width of a product)."""
    choose = random.Random(seed)
    branches = []
    for branch in range(choose.choice((2, 2, 3))):
        steps = []
        for _ in range(choose.choice((1, 1, 2))):
            steps.append((branch, choose.choice(("rs_rmsnorm", "rs_rmsnorm", "reduce_scatter_rows")), 0))
            steps += [(branch, "mm", choose.choice(WIDTHS)) for _ in range(choose.randint(0, 5))]
            steps += [(branch, "mm", HIDDEN), (branch, "all_gather_rows", 0)]
        # A last reduction, so that rows of every size are alive at the end.
        steps += [(branch, "rs_rmsnorm", 0), (branch, "mm", choose.choice(WIDTHS))]
        branches.append(steps)
    program = []
    while any(branches):
        steps = choose.choice([steps for steps in branches if steps])
        count = choose.randint(1, len(steps))
        program += steps[:count]
        del steps[:count]
    return program


def run(program: list[tuple], sums: list[torch.Tensor], norm: torch.Tensor, weights: dict) -> list[torch.Tensor]:
    values = [torch.mm(rows, weights[HIDDEN, HIDDEN]) for rows in sums]
    kept = []
    for branch, step, width in program:
        value = values[branch]
        if step == "mm":
            value = torch.mm(value, weights[value.shape[1], width])
        elif step == "rs_rmsnorm":
            value, residual = tp_fused.rs_rmsnorm(value, None, norm)
            kept.append(torch.mm(residual, weights[HIDDEN, 8]))
        elif step == "reduce_scatter_rows":
            value = tp_fused.reduce_scatter_rows(value)
        else:
            value = tp_fused.all_gather_rows(value, NUM_TOKENS)
        values[branch] = value
    return values + kept


def compare(backend: str, device: str, seed: int) -> float:
    """Runs on a rank: how far the compiled graph is from the eager one."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(dist.get_rank())

    def normal(*shape) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device)

    sums = [normal(NUM_TOKENS, HIDDEN) for _ in range(3)]
    weights = {(rows, columns): normal(rows, columns) for rows in WIDTHS for columns in WIDTHS}
    program, norm = random_program(seed), torch.ones(HIDDEN, device=device)
    patched = torch._inductor.config.patch(force_disable_caches=True)
    with workspace(backend, device, hidden_size=HIDDEN, timeout_s=100.0), patched:
        expected = run(program, sums, norm, weights)
        outputs = torch.compile(run, fullgraph=True)(program, sums, norm, weights)
    return max((a - b).abs().max().item() for a, b in zip(outputs, expected, strict=True) if a.numel())


@pytest.mark.parametrize("seed", [0, 1, 3, 4])
@pytest.mark.parametrize("world_size", [2])
def test_calls_keep_their_order(pool, backend, device, seed):
    off = pool.run(compare, backend, device, seed, timeout_s=240)
    assert max(off) < 1e-3
