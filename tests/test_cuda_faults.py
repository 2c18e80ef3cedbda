"""Faults on CUDA, where an op returns before its peers have come: what is in its outputs, and what works afterwards."""

import dataclasses
import re
import time

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, OPS, REDUCTIONS, Call, same_bits
from ranks import outcome, settled, workspace

import tp_fused
from tp_fused.native import _C

pytestmark = pytest.mark.cuda

ODD = 1  # the rank that misbehaves
ALL = " and rows gathered"  # what ranks say, besides, that quantise all rows
TIMEOUT_S = 0.7
LATER_S = 0.03  # that a rank begins after another
MAX_CTAS = 4
SIZES = {"max_num_tokens": 300, "hidden_size": 8192, "latent_size": sum(LATENT), "max_ctas": MAX_CTAS}
# Rows of the rank that owns most, and columns. A few: each block has one. One: on sm_90 and newer a cluster of blocks
# shares it. Many: each block has several chunks of them, which TMA moves where there is one; wide rows are shared by a
# cluster.
FORMS = {"few rows": (3, 256), "a row": (1, 2048), "many rows": (37, 256), "many rows in place": (37, 256)}
FORMS |= {"rows of clusters": (9, 8192), "rows of clusters in place": (9, 8192)}
GATHERING = ("rs_rmsnorm_ag", "rs_rmsnorm_ag_fp8")
FORMS_OF_OPS = [(op, form) for op in OPS for form in FORMS if op in REDUCTIONS or form in ("few rows", "many rows")]
# What is gathered goes in chunks of at least 16 KB.
FORMS["many wide rows"] = (37, 2048)
FORMS_OF_OPS.append(("all_gather_rows", "many wide rows"))
# Of so few that all ranks quantise all, also where there are eight: many for a block.
FORMS["some rows"] = (11, 256)
FORMS_OF_OPS += [("rs_rmsnorm_ag_fp8", form) for form in ("few rows", "a row", "some rows")]
# Whose q_a is quantised on the way: its own rows, gathered, or the columns of all rows.
FORMS["rows of all ranks"] = (3, 256)
FORMS_OF_OPS += [("qkv_a_proj_ag_norm_fp8", form) for form in ("few rows", "many rows", "rows of all ranks")]
QUANTIZED = (512, 40, 8)  # columns of the latent


def call_of(op: str, device: str, form: str, world_size: int) -> Call:
    options = {"keep_output": True} if op in ("rs_rmsnorm_fp8", "rs_rmsnorm_ag_fp8") else {}
    largest, hidden_size = FORMS[form]
    num_tokens = max(world_size, (largest - 1) * world_size + 1)
    latent = LATENT
    if op == "qkv_a_proj_ag_norm_fp8":
        options, latent = {"quantize_q_a": True, "complete": form == "rows of all ranks"}, QUANTIZED
    return Call(op, num_tokens, hidden_size, residual="full", device=device, latent=latent, options=options)


def arguments_of(call: Call, form: str) -> dict:
    arguments = call.arguments(dist.get_rank(), dist.get_world_size())
    if form.endswith("in place"):
        memory = tp_fused.symm_empty((SIZES["max_num_tokens"], call.hidden_size), call.dtype, device=call.device)
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


def called_and_captured(call: Call, form: str) -> tuple[dict, torch.cuda.CUDAGraph, tuple]:
    """The call's arguments, a graph of it and that graph's outputs, after one good call by all ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    arguments = arguments_of(call, form)
    dist.barrier()
    call.check(call.run(rank, world_size, arguments), rank, world_size)
    graph, outputs = captured(call, arguments)
    dist.barrier()
    return arguments, graph, outputs


def assert_poisoned(outputs) -> None:
    for index, output in enumerate(outputs):
        numbers = (~output.float().isnan()).sum().item()
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
    """Runs on a rank: the odd rank makes one call less; how long the others waited for it, of whom one began later."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call, seconds = call_of(op, device, form, world_size), None
    with workspace(device, device, timeout_s=TIMEOUT_S, **SIZES) as made:
        arguments, graph, outputs = called_and_captured(call, form)
        if rank != ODD:
            time.sleep(LATER_S if rank == 2 else 0.0)
            begin = time.monotonic()
            graph.replay()
            torch.cuda.synchronize()
            seconds = time.monotonic() - begin
            assert_poisoned(outputs)
            assert_faulted(made, call, arguments)
            # The first to give up tells the other, whose own deadline may not have passed yet.
            never = rf"#2: .*rank {ODD} never arrived; rank [02] waited 0.7"
            with pytest.raises(tp_fused.CollectiveFault, match=never):
                made.check()
        dist.barrier()
    return seconds


@pytest.mark.parametrize(("op", "form"), FORMS_OF_OPS)
@pytest.mark.parametrize("world_size", [3])
def test_ranks_that_wait_in_vain_have_nan(pool, device, op, form, world_size):
    """After one deadline, not after one for each of the chunks."""
    seconds = pool.run(wait_in_vain, device, op, form)
    assert TIMEOUT_S <= seconds[0] < 2 * TIMEOUT_S and TIMEOUT_S - 2 * LATER_S <= seconds[2] < 2 * TIMEOUT_S


# ---- a part of what a rank waits for has come ----


def signals(made) -> torch.Tensor:
    """The words in this rank's region, [step, block, rank that writes]."""
    memory = made._symmetric[0][0]
    words = memory[_C.CONTROL_BYTES : _C.region_bytes(0)].view(torch.int64)
    return words.view(-1, _C.MAX_CTAS, _C.MAX_RANKS)


def hear_from_other_blocks(device: str, op: str, form: str) -> None:
    """Runs on a rank: the peers do not come, but words of all their blocks but the first are there."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of(op, device, form, world_size)
    with workspace(device, device, timeout_s=TIMEOUT_S, **SIZES) as made:
        arguments, graph, outputs = called_and_captured(call, form)
        if rank == 0:
            signals(made)[:, 1:, 1:] = 10 << 32  # of a later round, whose fingerprint is not compared
            graph.replay()
            torch.cuda.synchronize()
            # The first row of each rank's share is the first block's, or begins with its part of it; what is normalised
            # hangs on the whole row.
            normed = {"rs_rmsnorm": [0], "rs_rmsnorm_ag": [0], "rs_rmsnorm_fp8": [0, 3], "rs_rmsnorm_ag_fp8": [0, 3]}
            for index, output in enumerate(outputs):
                if op in (*REDUCTIONS, "rs_rmsnorm_ag_fp8"):
                    assert_poisoned([output[0] if index in normed.get(op, []) else output[0, :1]])
                if len(output) == call.num_tokens:
                    assert_poisoned([output[call.rows(peer, world_size).start, :1] for peer in range(1, world_size)])
            assert_faulted(made, call, arguments)
        dist.barrier()


@pytest.mark.parametrize(("op", "form"), FORMS_OF_OPS)
@pytest.mark.parametrize("world_size", [3])
def test_a_block_that_waits_in_vain_has_nan(pool, device, op, form, world_size):
    pool.run(hear_from_other_blocks, device, op, form)


def mistake_the_rows_of_a_peer(device: str, op: str, form: str) -> bool:
    """Runs on a rank: the peers of rank 0 have all that they add up, but rank 0 finds words and rows that are wrong."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of(op, device, form, world_size)
    with workspace(device, device, timeout_s=TIMEOUT_S, **SIZES) as made:
        arguments = call.arguments(rank, world_size)
        dist.barrier()
        right = call.run(rank, world_size, arguments)
        call.check(right, rank, world_size)
        graph, outputs = captured(call, arguments)
        dist.barrier()
        if rank == 0:
            time.sleep(0.2)  # until the others wait for it
            signals(made)[:, :, ODD].bitwise_xor_(1)  # another fingerprint
            made._symmetric[0][0][_C.region_bytes(0) :].fill_(42)
        graph.replay()
        torch.cuda.synchronize()
        for output, wanted in zip(outputs, right, strict=True):
            poisoned = output.float().isnan()
            assert rank != 0 or poisoned.all()
            same_bits(*([x.float().masked_fill(poisoned, 0)] for x in (output, wanted)))
        faulted = isinstance(outcome(made.check)[0], tp_fused.CollectiveFault)
        dist.barrier()
    return faulted


@pytest.mark.parametrize("form", ["few rows", "a row", "many rows"])
@pytest.mark.parametrize("op", GATHERING)
@pytest.mark.parametrize("world_size", [3])
def test_a_rank_that_gave_up_passes_nothing_on(pool, device, op, form, world_size):
    assert pool.run(mistake_the_rows_of_a_peer, device, op, form)[0]


def gather_on_all_ranks_but_one(device: str) -> str | None:
    """Runs on a rank: all ranks but one want all rows quantised. None on cards that have no kernel for it."""
    if torch.cuda.get_device_capability()[0] >= 10:
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of("rs_rmsnorm_fp8" if rank == ODD else "rs_rmsnorm_ag_fp8", device, "few rows", world_size)
    with workspace(device, device, timeout_s=10.0, **SIZES) as made:
        error = outcome(settled, made, call.run, rank, world_size)[0]
        dist.barrier()
    return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("world_size", [2])
def test_whose_rows_are_quantised_is_agreed(pool, device, world_size):
    own = "residual and keep_output"
    said = [rf"rank \d called with {own}{one}, rank \d with {own}{other}" for one, other in (("", ALL), (ALL, ""))]
    for error in pool.run(gather_on_all_ranks_but_one, device):
        assert error is None or re.match(f"CollectiveFault: .*({'|'.join(said)})", error), error


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
