"""`tp_fused.init` and `symm_empty` when ranks do not come, come late, or come with other histories; on real groups."""

import datetime
import os
import signal
import socket

import pytest
import torch
import torch.distributed as dist
from programs import Call
from ranks import BUSY_S, RankDied, outcome, workspace

import tp_fused

TIMEOUT_S = 1.5
GOOD = {"max_num_tokens": 64, "hidden_size": 256, "dtype": torch.float32, "timeout_s": 20.0}


def impatient_group():
    """A group of all ranks with a time-out of its own: the deadline of `init`."""
    return dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT_S))


def check_on(group, device: str) -> None:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    call = Call("rs_rmsnorm", 5, device=device)
    call.check(call.run(rank, world_size, call.arguments(rank, world_size) | {"group": group}), rank, world_size)


def without_the_last(device: str) -> tuple:
    """Runs on a rank: the last one comes when the others have given up; then all call again."""
    last = dist.get_rank() == dist.get_world_size() - 1
    group = impatient_group()
    if last:
        dist.barrier()
    first = outcome(tp_fused.init, group, device=device, **GOOD)
    if not last:
        dist.barrier()
    dist.barrier()
    with tp_fused.init(group, device=device, **GOOD) as made:
        check_on(group, device)
        assert not made.closed
    return first


@pytest.mark.parametrize("world_size", [3])
def test_a_rank_that_does_not_call_init_is_named(fresh_pool, device, world_size):
    results = fresh_pool.run(without_the_last, device)
    for error, _ in results[:2]:
        assert isinstance(error, tp_fused.CollectiveFault) and error.peer == 2
        assert "did not call init within 1.5 s; call tp_fused.init again on all ranks" in str(error)
        assert "tp_fused.init: rank 2 of group" in str(error)
    # The rank that called first gives up first, and tells the other.
    assert TIMEOUT_S <= max(seconds for _, seconds in results[:2]) < TIMEOUT_S + BUSY_S
    error, _ = results[2]
    assert isinstance(error, tp_fused.CollectiveFault)
    assert "had given up before this rank came: rank 2 of group" in str(error)


def symm_empty_without_the_last(backend: str, device: str) -> tuple:
    """Runs on a rank."""
    group, rank = impatient_group(), dist.get_rank()
    os.environ["TP_FUSED_BACKEND"] = backend
    with tp_fused.init(group, device=device, **GOOD) as made:
        first = outcome(made.symm_empty, 8, 8) if rank != 1 else None
        dist.barrier()
        late = outcome(made.symm_empty, 8, 8) if rank == 1 else None
        dist.barrier()
        assert made.symm_empty(8, 8).shape == (8, 8)
        check_on(group, device)
        return first or late


@pytest.mark.parametrize("world_size", [3])
def test_a_rank_that_does_not_call_symm_empty_is_named(fresh_pool, backend, device, world_size):
    results = fresh_pool.run(symm_empty_without_the_last, backend, device)
    for error, seconds in results:
        assert isinstance(error, tp_fused.CollectiveFault) and error.peer == 1
        assert "rank 1 of group" in str(error) and "did not call symm_empty within 1.5 s" in str(error)
        assert seconds < TIMEOUT_S + BUSY_S


def with_a_closed_one(backend: str, device: str) -> tuple:
    """Runs on a rank: rank 1 has closed its workspace, and raises; the others hear it without waiting."""
    with workspace(backend, device) as made:
        dist.barrier()
        if dist.get_rank() == 1:
            made.close()
        return outcome(made.symm_empty, 8, 8)


@pytest.mark.parametrize("world_size", [3])
def test_a_rank_that_raises_alone_tells_the_others(pool, backend, device, world_size):
    results = pool.run(with_a_closed_one, backend, device)
    assert isinstance(results[1][0], ValueError)
    for rank in (0, 2):
        error, seconds = results[rank]
        assert isinstance(error, tp_fused.CollectiveFault) and seconds < BUSY_S
        assert "symm_empty: rank 1 gave up: ValueError: the workspace of group '0' is closed" in str(error)


def with_a_dead_one(device: str) -> tuple:
    """Runs on a rank."""
    group = impatient_group()
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome(tp_fused.init, group, device=device, **GOOD)


@pytest.mark.parametrize("world_size", [3])
def test_a_rank_that_died_is_named(fresh_pool, device, world_size):
    results = fresh_pool.outcomes(with_a_dead_one, device)
    assert isinstance(results[1], RankDied)
    for rank in (0, 2):
        error, seconds = results[rank]
        assert isinstance(error, tp_fused.CollectiveFault) and error.peer == 1
        assert seconds < TIMEOUT_S + BUSY_S


def overlapping_groups(device: str, members: list[list[int]]) -> None:
    """Runs on a rank: groups one after another, so that ranks come to each with another history."""
    for ranks in members:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            with tp_fused.init(group, device=device, **GOOD) as made:
                memory = made.symm_empty(8, 256)
                check_on(group, device)
                memory.zero_()
        dist.barrier()


@pytest.mark.parametrize(
    ("world_size", "members"),
    [
        (3, [[1, 2], [0, 1], [0, 1, 2]]),
        (3, [[0, 1, 2], [0, 2], [1, 2], [0, 1, 2]]),
        (8, [list(range(7)), list(range(8))]),
        (8, [list(range(1, 8)), [0, 3, 5], list(range(8))]),
    ],
    ids=str,
)
def test_ranks_with_other_histories(fresh_pool, device, world_size, members):
    fresh_pool.run(overlapping_groups, device, members)


def after_an_engine(device: str) -> None:
    """Runs on a rank: ranks 1 and 2 have torch's symmetric memory for themselves, and so rank 2 twice."""
    import torch.distributed._symmetric_memory as symm_mem

    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    kept = []
    for ranks in ([1, 2], [2]):
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            tensor = symm_mem.empty(1024, dtype=torch.uint8, device=f"cuda:{torch.cuda.current_device()}")
            kept.append((tensor, symm_mem.rendezvous(tensor, group.group_name)))
    dist.barrier()
    overlapping_groups(device, [[0, 1, 2], [0, 1]])


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [3])
def test_an_engine_had_symmetric_memory_before(fresh_pool, device, world_size):
    fresh_pool.run(after_an_engine, device)


def in_a_child(backend: str, device: str) -> list[str]:
    """Runs on a rank: what a forked child of it is told."""
    with workspace(backend, device) as made:
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            calls = (
                lambda: tp_fused.reduce_scatter_rows(torch.zeros(4, 256)),
                lambda: tp_fused.groups.get_workspace(made.group_name, torch.device("cpu")),
                made.check,
                lambda: made.symm_empty(8, 8),
                lambda: tp_fused.init(device=device, **GOOD),
            )[backend != "reference" :]  # csrc answers for the first
            told = [str(outcome(call)[0]) for call in calls]
            theirs.sendall("\n".join(told).encode() + b"\n")
            os._exit(0)
        theirs.close()
        told = b"".join(iter(lambda: ours.recv(4096), b"")).decode()
        os.waitpid(child, 0)
        expected = f"belongs to process {os.getpid()}, which is its rank {made.rank}; this is process {child}, forked"
        dist.barrier()
        check_on(dist.group.WORLD, device)
        return [line for line in told.splitlines() if expected not in line] or [f"{len(told.splitlines())} told"]


@pytest.mark.parametrize("world_size", [2])
def test_a_forked_child_is_no_rank(pool, backend, device, world_size):
    if device == "cuda":
        backend = "reference"  # a child of a process that uses CUDA must not touch it
    count = 5 if backend == "reference" else 4
    assert pool.run(in_a_child, backend, "cpu") == [[f"{count} told"]] * world_size
