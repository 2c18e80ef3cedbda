"""mla_prologue: the bits of the two ops that it is made of, whichever two these are; else as for every op."""

import re

import pytest
import torch
import torch.distributed as dist
from programs import EPS, prologue_inputs, random, same_bits
from ranks import outcome, settled, workspace

import tp_fused
from tp_fused.native import _C

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LATENT = (96, 40, 8)  # of which these are few tokens of two ranks, and of more
FEW = (sum(LATENT) // 10, sum(LATENT) // 20)
HIDDEN = 208
SIZES = {"max_num_tokens": 64, "hidden_size": HIDDEN, "latent_size": sum(LATENT)}


def arguments(num_tokens: int, dtype: torch.dtype, residual: str | None, device: str, complete: bool = False) -> list:
    """Of this rank, up to eps."""
    place = (dist.get_rank(), dist.get_world_size())
    made = prologue_inputs(num_tokens, HIDDEN, dtype, residual, *place, complete)
    made.append(random("projection", (sum(LATENT), HIDDEN), dtype, HIDDEN**-0.5))
    made += [random(f"latent norm {size}", (size,), dtype) + 1 for size in LATENT[:2]]
    return [x if x is None else x.to(device) for x in made]


def two_ops(input, residual, norm_weight, weight, q_a_weight, kv_a_weight, complete: bool) -> tuple:
    """What it promises to be."""
    num_tokens, latent = len(input), (weight, q_a_weight, kv_a_weight)
    if _C.gathers_normed_rows(num_tokens, len(weight), dist.get_world_size()) and not complete:
        rows, residual_out = tp_fused.rs_rmsnorm_ag(input, residual, norm_weight, EPS)
        return *tp_fused.qkv_a_proj_ag_norm(rows, *latent, num_tokens, EPS, complete=True), residual_out
    rows, residual_out = tp_fused.rs_rmsnorm(input, residual, norm_weight, EPS, complete=complete)
    return *tp_fused.qkv_a_proj_ag_norm(rows, *latent, num_tokens, EPS), residual_out


def check_calls(backend: str, device: str) -> None:
    """Runs on a rank."""
    with workspace(backend, device, **SIZES):
        for dtype in DTYPES:
            for i, num_tokens in enumerate((0, 1, 2, FEW[1], FEW[1] + 1, FEW[0], FEW[0] + 1, 64)):
                for complete in (False, True):
                    given = arguments(num_tokens, dtype, (None, "full", "slice")[i % 3], device, complete)
                    outputs = tp_fused.mla_prologue(*given, EPS, complete=complete)
                    same_bits(outputs, two_ops(*given, complete))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_has_the_bits_of_its_two_ops(pool, backend, device, world_size):
    pool.run(check_calls, backend, device)


def check_columns(device: str) -> None:
    """Runs on a rank: K shared out among the blocks of a cluster, and columns in several passes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, max_num_tokens=64, hidden_size=7168, latent_size=2112, dtype=torch.bfloat16):
        for num_tokens in (1, 9, 32, 64):
            rows = random("rows", (num_tokens, 7168), torch.bfloat16).to(device)
            weight = random("weight", (2112, 7168), torch.bfloat16, 7168**-0.5).to(device)
            exact = rows.float() @ weight.float().T
            for _ in range(20):
                latent = tp_fused.qkv_a_proj_ag(rows, weight, num_tokens, complete=True)
                error = (latent.float() - exact).abs().max().item()
                assert error < 2**-7 * exact.abs().max().item(), (rank, world_size, num_tokens, error)


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_columns_of_deepseek_v3(pool, device, world_size):
    pool.run(check_columns, device)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_which_way(world_size):
    few = [tokens for tokens in range(1000) if _C.gathers_normed_rows(tokens, 2112, world_size)]
    assert few == list(range(151))


def test_one_rank_gathers_nothing():
    assert not _C.gathers_normed_rows(1, 2112, 1)


def test_explain_tells_the_way():
    few, many = (tp_fused.explain("mla_prologue", tokens, gpu="H200") for tokens in (16, 4096))
    assert "rs_rmsnorm_ag" in few and "share of the weight" in few
    assert "rs_rmsnorm:" in many and "own rows" in many and "rs_rmsnorm_ag" not in many


def check_op(backend: str, device: str, num_tokens: int) -> None:
    """Runs on a rank."""
    with workspace(backend, device, **SIZES):
        op, name = torch.ops.tp_fused.mla_prologue.default, dist.group.WORLD.group_name
        given = arguments(num_tokens, torch.float32, "slice", device)
        torch.library.opcheck(op, (*given, EPS, name), {})


@pytest.mark.parametrize("num_tokens", [1, max(FEW) + 1])
@pytest.mark.parametrize("world_size", [2])
def test_opcheck(pool, backend, device, num_tokens, world_size):
    pool.run(check_op, backend, device, num_tokens)


def compiled(backend: str, device: str) -> None:
    """Runs on a rank."""
    torch._dynamo.reset()
    with workspace(backend, device, **SIZES):
        function = torch.compile(lambda *given: tp_fused.mla_prologue(*given, EPS), fullgraph=True, dynamic=True)
        for num_tokens in (FEW[0] - 1, FEW[0] + 3, 40):  # one graph for both ways
            given = arguments(num_tokens, torch.float32, "slice", device)
            same_bits(function(*given), two_ops(*given, False))


@pytest.mark.parametrize("world_size", [2])
def test_compiled(pool, backend, device, world_size):
    pool.run(compiled, backend, device, timeout_s=240)


def refusals(device: str) -> list[str]:
    """Runs on a rank: bad arguments of the second op; the last call is right, and nothing was launched before."""
    with workspace(device, device, timeout_s=10.0, **SIZES):
        given, told = arguments(3, torch.float32, "full", device), []
        for index, wrong in ((3, given[3][:, :8].contiguous()), (4, given[4].half()), (5, given[3][:, 0].contiguous())):
            if dist.get_rank() == 0:
                bad = [*given[:index], wrong, *given[index + 1 :]]
                told.append(str(outcome(tp_fused.mla_prologue, *bad, EPS)[0]))
        same_bits(tp_fused.mla_prologue(*given, EPS), two_ops(*given, False))
        return told


@pytest.mark.parametrize("world_size", [2])
def test_bad_arguments_are_told_before_anything_is_launched(pool, device, world_size):
    told = pool.run(refusals, device)[0]
    expected = [
        "qkv_a_weight is (144, 8), but the input has 208 columns",
        "q_a_norm_weight is torch.float16, expected torch.float32",
        "q_a_norm_weight (96) and kv_a_norm_weight (144) are longer than the projection's 144 columns",
    ]
    assert told == expected


def late_peer(device: str) -> str:
    """Runs on a rank: the fault names the op that the peer did not come to."""
    with workspace(device, device, timeout_s=1.0, **SIZES) as made:
        if dist.get_rank() == 1:
            dist.barrier()
            return ""
        given = arguments(3, torch.float32, None, device)
        error = outcome(lambda: settled(made, tp_fused.mla_prologue, *given, EPS))[0]
        dist.barrier()
        return str(error)


@pytest.mark.parametrize("world_size", [2])
def test_a_peer_that_never_comes(pool, device, world_size):
    told = pool.run(late_peer, device)[0]
    assert re.fullmatch(r"rs_rmsnorm_ag #1: rank 1 never arrived; rank 0 waited 1(\.\d+)? s", told), told
