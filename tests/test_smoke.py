"""What a torch that was not tried before has to pass: every op, eager and compiled; the pass; how errors come through.

    python -m pytest tests/test_smoke.py

In a minute, with torch and pytest alone. The hosted workflow runs it on every torch from 2.10 to the newest tested one.
"""

import time
import traceback

import pytest
import torch
import torch.distributed as dist
from compile_pass_ranks import FrontEnd, calls, rank_of_its_own, reduced
from programs import LATENT, OPS, Call
from ranks import outcome, workspace

import tp_fused
from tp_fused import compile_pass, ops, projections

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {"max_num_tokens": 64, "hidden_size": 256, "latent_size": sum(LATENT)}


def every_op(device: str, op: str) -> None:
    """Runs on a rank: without Python, by the names of groups and of traced graphs."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, **SIZES), pytest.MonkeyPatch.context() as patch:
        patch.delattr(ops, "get_workspace")
        patch.delattr(projections, "get_workspace")
        for dtype in DTYPES:
            for num_tokens in (0, 1, 13):
                call = Call(op, num_tokens, 256, dtype, "full", device=device)
                call.check(call.run(rank, world_size), rank, world_size)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_op(pool, device, op):
    pool.run(every_op, device, op)


def compiled(device: str, op: str) -> None:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch._dynamo.reset()
    with workspace(device, device, timeout_s=60.0, **SIZES):
        call = Call(op, 13, 256, residual="full", device=device)
        function = torch.compile(getattr(tp_fused, op), backend="aot_eager", fullgraph=True)
        outputs = function(**call.arguments(rank, world_size))
        call.check(outputs if isinstance(outputs, tuple) else (outputs,), rank, world_size)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [2])
def test_every_op_compiled(pool, device, op):
    pool.run(compiled, device, op)


def rewritten(device: str) -> list[str]:
    """Runs on a rank: the pass, among Inductor's, of a layer for inference and for training."""
    rows, residual = torch.ones(13, 256, device=device), torch.ones(13, 256, device=device)
    seen = []

    def layer(weight):
        total = residual + reduced(rows * 2)
        return torch.nn.functional.rms_norm(total, (256,), weight, 1e-5)

    with workspace(device, device, timeout_s=60.0, **SIZES), rank_of_its_own():
        compile_pass.install()
        for training in (False, True):
            weight = torch.ones(256, device=device, requires_grad=training)
            front = FrontEnd()
            with torch.set_grad_enabled(training):
                output = torch.compile(layer, fullgraph=True, backend=front)(weight)
                torch.testing.assert_close(output, layer(weight), rtol=1e-5, atol=1e-5)
            seen += [name.strip("_") for name in calls(front.graphs[0])]
        compile_pass.uninstall()
    return seen


@pytest.mark.parametrize("world_size", [2])
def test_compile_pass(pool, device):
    assert pool.run(rewritten, device, timeout_s=280) == [["rs_rmsnorm_ag", "all_reduce"]] * 2


def errors(device: str) -> list:
    """Runs on a rank: of arguments, from Python, and from a peer that does not come."""
    rows = torch.ones(4, 256, device=device)
    with workspace(device, device, timeout_s=1.0, **SIZES) as made:
        told = [outcome(tp_fused.rs_rmsnorm, rows, rows[:3].contiguous(), rows[0])[0]]
        with pytest.MonkeyPatch.context() as patch:
            error = KeyError("as it was raised")
            patch.setattr(ops, "get_workspace", lambda *_: (_ for _ in ()).throw(error))
            told.append(outcome(tp_fused.reduce_scatter_rows, rows.double())[0])
            assert told[-1] is error
            assert "_reduce_scatter_rows" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        tp_fused.reduce_scatter_rows(rows)  # and nothing has been launched
        if dist.get_rank() == 0:
            begin = time.monotonic()
            told.append(outcome(lambda: (tp_fused.reduce_scatter_rows(rows), synchronize(device), made.check()))[0])
            assert time.monotonic() - begin < 20
        dist.barrier()
    return told


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("world_size", [2])
def test_how_an_error_comes_through(pool, device):
    (refused, _, fault), (of_the_peer, _) = pool.run(errors, device)
    for rank, error in enumerate((refused, of_the_peer)):
        assert type(error) is ValueError
        slice_ = f"rank {rank}'s slice [2, 256]"
        assert str(error) == f"residual must be the full [4, 256] or {slice_}, got (3, 256)"
    assert type(fault) is tp_fused.CollectiveFault and "rank 1 never arrived" in str(fault)
