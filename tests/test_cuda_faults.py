"""Faults on CUDA, where an op returns before its peers have come: what is in its outputs, and what works afterwards."""

import dataclasses
import time

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, OPS, REDUCTIONS, Call, same_bits
from ranks import outcome, workspace

import tp_fused
from tp_fused.native import _C

pytestmark = pytest.mark.cuda

ODD = 1  # the rank that misbehaves
TIMEOUT_S = 0.7
MAX_CTAS = 4
SIZES = {"max_num_tokens": 300, "hidden_size": 256, "latent_size": sum(LATENT), "max_ctas": MAX_CTAS}
# Rows of the rank that owns most. A few: each block has one, which the threads stage. Many: each block has several
# chunks of them, which the copy engine moves where there is one; an input in place is read by the peers.
FORMS = {"few rows": MAX_CTAS - 1, "many rows": 37, "many rows in place": 37}
FORMS_OF_OPS = [(op, form) for op in OPS for form in FORMS if op in REDUCTIONS or not form.endswith("in place")]


def call_of(op: str, device: str, form: str, world_size: int) -> Call:
    options = {"keep_output": True} if op == "rs_rmsnorm_fp8" else {}
    return Call(op, FORMS[form] * world_size - 1, 256, residual="full", device=device, options=options)


def arguments_of(call: Call, form: str) -> dict:
    arguments = call.arguments(dist.get_rank(), dist.get_world_size())
    if form.endswith("in place"):
        memory = tp_fused.symm_empty((SIZES["max_num_tokens"], 256), call.dtype, device=call.device)
        arguments["input"] = memory[: call.num_tokens].copy_(arguments["input"])
    return arguments


def captured(call: Call, arguments: dict) -> tuple[torch.cuda.CUDAGraph, tuple]:
    """A graph of the call, and its outputs: they hold numbers, so that NaN in them is what the kernels have written."""
    graph = torch.cuda.CUDAGraph()
    torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, which would be a part of the graph
    try:
        with torch.cuda.graph(graph):
            outputs = call.run(dist.get_rank(), dist.get_world_size(), arguments)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    for output in outputs:
        (output.view(torch.uint8) if output.element_size() == 1 else output).fill_(42)
    return graph, outputs


def is_poisoned(output: torch.Tensor) -> torch.Tensor:
    """Which elements are NaN; of fp8 the NaN with all bits set."""
    return output.view(torch.uint8) == 0xFF if output.element_size() == 1 else output.isnan()


def assert_poisoned(outputs) -> None:
    for index, output in enumerate(outputs):
        numbers = (~is_poisoned(output)).sum().item()
        assert numbers == 0, f"{numbers} of {output.numel()} elements of output {index} are not NaN"


def assert_faulted(made, call: Call, arguments: dict) -> None:
    """The context is well, the workspace is not, and both ways to learn of it tell the same."""
    ones = torch.ones(64, 64, device=call.device)
    assert (ones @ ones == 64).all()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    errors = [outcome(made.check)[0], outcome(call.run, rank, world_size, arguments)[0]]
    assert all(isinstance(error, tp_fused.CollectiveFault) for error in errors), errors
    assert str(errors[0]) == str(errors[1])
    torch.cuda.synchronize()


def disagree(device: str, op: str, form: str) -> None:
    """Runs on a rank: a good call, one of which the odd rank has another notion, and a good one on a new workspace."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of(op, device, form, world_size)
    other = dataclasses.replace(call, num_tokens=call.num_tokens + (rank == ODD))
    with workspace(device, device, **SIZES) as made:
        arguments = arguments_of(call, form)
        call.check(call.run(rank, world_size, arguments), rank, world_size)
        graph, outputs = captured(other, arguments_of(other, form))
        graph.replay()
        torch.cuda.synchronize()
        assert_poisoned(outputs)
        assert_faulted(made, call, arguments)
        dist.barrier()
    with workspace(device, device, **SIZES):
        call.check(call.run(rank, world_size), rank, world_size)


@pytest.mark.parametrize(("op", "form"), FORMS_OF_OPS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ranks_that_disagree_have_nan(pool, device, op, form, world_size):
    pool.run(disagree, device, op, form)


def wait_in_vain(device: str, op: str, form: str) -> float | None:
    """Runs on a rank: the odd rank makes one call less; how long the others waited for it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call, seconds = call_of(op, device, form, world_size), None
    with workspace(device, device, timeout_s=TIMEOUT_S, **SIZES) as made:
        arguments = arguments_of(call, form)
        dist.barrier()
        call.check(call.run(rank, world_size, arguments), rank, world_size)
        graph, outputs = captured(call, arguments)
        dist.barrier()
        if rank != ODD:
            begin = time.monotonic()
            graph.replay()
            torch.cuda.synchronize()
            seconds = time.monotonic() - begin
            assert_poisoned(outputs)
            assert_faulted(made, call, arguments)
            with pytest.raises(
                tp_fused.CollectiveFault, match=rf"#2: rank {ODD} never arrived; rank {rank} waited 0.7"
            ):
                made.check()
        dist.barrier()
    return seconds


@pytest.mark.parametrize(("op", "form"), FORMS_OF_OPS)
@pytest.mark.parametrize("world_size", [3])
def test_ranks_that_wait_in_vain_have_nan(pool, device, op, form, world_size):
    """After one deadline, not after one for each of the chunks."""
    seconds = pool.run(wait_in_vain, device, op, form)
    assert TIMEOUT_S <= seconds[0] < 2 * TIMEOUT_S and TIMEOUT_S <= seconds[2] < 2 * TIMEOUT_S


# ---- a part of what a rank waits for has come ----


def signals(made) -> torch.Tensor:
    """The words in this rank's region, [step, block, rank that writes]."""
    memory = made._segments[0][0]
    words = memory[_C.CONTROL_BYTES : _C.region_bytes(0)].view(torch.int64)
    return words.view(-1, _C.MAX_CTAS, _C.MAX_RANKS)


def hear_from_other_blocks(device: str, op: str) -> None:
    """Runs on a rank: the peer does not come, but words of all its blocks but the first are there."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of(op, device, "many rows", world_size)
    with workspace(device, device, timeout_s=TIMEOUT_S, **SIZES) as made:
        arguments = call.arguments(rank, world_size)
        dist.barrier()
        call.check(call.run(rank, world_size, arguments), rank, world_size)
        graph, outputs = captured(call, arguments)
        dist.barrier()
        if rank == 0:
            signals(made)[:, 1:, 1] = 1000 << 32  # of a later round, whose contract is not compared
            graph.replay()
            torch.cuda.synchronize()
            for output in outputs:  # the first row of each rank's share is the first block's
                gathered = [call.rows(1, world_size).start] if len(output) == call.num_tokens else []
                reduced = [0] if op in REDUCTIONS else []
                assert_poisoned([output[row] for row in (*reduced, *gathered)])
            assert_faulted(made, call, arguments)
        dist.barrier()


@pytest.mark.parametrize("op", (*REDUCTIONS, "all_gather_rows"))
@pytest.mark.parametrize("world_size", [2])
def test_a_block_that_waits_in_vain_has_nan(pool, device, op, world_size):
    pool.run(hear_from_other_blocks, device, op)


def mistake_the_rows_of_a_peer(device: str) -> bool:
    """Runs on a rank: rank 1 has all that it reduces, but rank 0 finds words and rows of it that are not rank 1's."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of("rs_rmsnorm_ag", device, "many rows", world_size)
    with workspace(device, device, timeout_s=TIMEOUT_S, **SIZES) as made:
        arguments = call.arguments(rank, world_size)
        dist.barrier()
        right = call.run(rank, world_size, arguments)
        call.check(right, rank, world_size)
        graph, outputs = captured(call, arguments)
        dist.barrier()
        if rank == 0:
            time.sleep(0.2)  # until rank 1 waits for it
            signals(made)[:, :, 1].bitwise_xor_(1)  # another contract
            made._segments[0][0][_C.region_bytes(0) :].fill_(42)
        graph.replay()
        torch.cuda.synchronize()
        for output, wanted in zip(outputs, right, strict=True):
            poisoned = is_poisoned(output)
            assert rank == 1 or poisoned.all()
            same_bits([output.masked_fill(poisoned, 0)], [wanted.masked_fill(poisoned, 0)])
        faulted = isinstance(outcome(made.check)[0], tp_fused.CollectiveFault)
        dist.barrier()
    return faulted


@pytest.mark.parametrize("world_size", [2])
def test_a_rank_that_gave_up_passes_nothing_on(pool, device, world_size):
    assert pool.run(mistake_the_rows_of_a_peer, device)[0]


# ---- graphs, which no host looks after ----


def replay_on_a_faulted_workspace(device: str) -> None:
    """Runs on a rank: the odd rank makes a replay less."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of("rs_rmsnorm_ag", device, "many rows", world_size)
    with workspace(device, device, timeout_s=TIMEOUT_S, **SIZES) as made:
        arguments = call.arguments(rank, world_size)
        call.check(call.run(rank, world_size, arguments), rank, world_size)
        graph, outputs = captured(call, arguments)
        dist.barrier()
        for _ in range(0 if rank == ODD else 3):
            for output in outputs:
                output.fill_(42)
            graph.replay()
            torch.cuda.synchronize()
            assert_poisoned(outputs)
        if rank != ODD:
            assert_faulted(made, call, arguments)
        dist.barrier()


@pytest.mark.parametrize("world_size", [2])
def test_replays_on_a_faulted_workspace_leave_nan(pool, device, world_size):
    pool.run(replay_on_a_faulted_workspace, device)
