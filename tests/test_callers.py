"""Who calls: threads, forked children, streams, signals. Calls of a workspace have one order, the same on all ranks."""

import concurrent.futures
import datetime
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, OPS, Call
from ranks import BUSY_S, outcome, settled, workspace

import tp_fused
from tp_fused import CollectiveFault

SIZES = {"max_num_tokens": 300, "hidden_size": 256, "latent_size": sum(LATENT)}
OTHER_THREAD = r"the workspace of group '.+' is used by thread \d+, this is thread \d+"


def in_thread(function, *arguments):
    """What the call returns or raises in a thread of its own, which ends with it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(outcome(function, *arguments)[0]))
    thread.start()
    thread.join()
    return results[0]


# ---- threads ----


def call_from_threads(backend: str, device: str, op: str) -> list:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    current = torch.cuda.current_device if device == "cuda" else int
    call = Call(op, 5, residual="full", device=f"cuda:{current()}" if device == "cuda" else device)

    def used() -> set[int]:
        """The cards that this process has a context on."""
        cards = range(torch.cuda.device_count() if device == "cuda" else 0)
        return {card for card in cards if torch._C._cuda_hasPrimaryContext(card)}

    with workspace(backend, device, **SIZES) as made:
        arguments = call.arguments(rank, world_size)

        def checked():
            # A new thread's current card is the first. Ops run on their tensors' card and leave the thread its own; but
            # none makes a context on a card that is not its tensors'.
            before, cards = current(), used()
            outputs = call.run(rank, world_size, arguments)
            assert used() == cards and (current() == before or before not in cards)
            call.check(outputs, rank, world_size)
            return "right"

        def attached():
            made.attach_thread()
            return checked()

        # A thread that has ended is no caller any more; one that lives is, until another takes over.
        return [in_thread(checked), checked(), in_thread(checked), in_thread(attached), checked()]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [2])
def test_one_thread_calls(pool, backend, device, op, world_size):
    for first, second, other, attached, after in pool.run(call_from_threads, backend, device, op):
        assert [first, second, attached, after] == ["right"] * 4
        with pytest.raises(ValueError, match=OTHER_THREAD):
            raise other


# ---- forked children ----


def call_from_a_child(backend: str, op: str) -> list:
    """Runs on a rank: a child of it calls, then the rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = Call(op, 5, residual="full")
    with workspace(backend, "cpu", **SIZES):
        read, write = os.pipe()
        if os.fork() == 0:
            error, _ = outcome(call.run, rank, world_size)
            os.write(write, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.close(write)
        told = os.read(read, 4096).decode()
        os.close(read)
        os.wait()
        call.check(call.run(rank, world_size), rank, world_size)
    return [told, os.getpid()]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("served_by", ["cpu", "reference"])
@pytest.mark.parametrize("world_size", [2])
def test_a_forked_child_is_no_rank(pool, served_by, op, world_size):
    for told, pid in pool.run(call_from_a_child, served_by, op):
        assert told.startswith("ValueError: the workspace of group") and f"belongs to process {pid}," in told


def leave_a_child_behind() -> tuple:
    """Runs on a rank: the odd rank dies, a child of it lives on."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = Call("rs_rmsnorm", 5)
    with workspace("cpu", "cpu", timeout_s=20.0, **SIZES):
        call.check(call.run(rank, world_size), rank, world_size)
        child = os.fork() if rank == 1 else None
        if child == 0:
            time.sleep(60)
            os._exit(0)
        children = [None] * world_size
        dist.all_gather_object(children, child)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        told = outcome(call.run, rank, world_size)
        os.kill(children[1], signal.SIGKILL)
        return told


@pytest.mark.parametrize("world_size", [2])
def test_a_death_is_noticed_while_a_child_lives(fresh_pool, world_size):
    error, seconds = fresh_pool.outcomes(leave_a_child_behind)[0]
    assert seconds < BUSY_S
    with pytest.raises(CollectiveFault, match="the process of rank 1 ended before it arrived"):
        raise error


# ---- signals ----


def be_interrupted(op: str) -> tuple:
    """Runs on a rank: the last rank comes late, a signal reaches rank 0, which waits for it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = Call(op, 5, residual="full")
    with workspace("cpu", "cpu", timeout_s=20.0, **SIZES) as made:
        arguments = call.arguments(rank, world_size)
        dist.barrier()
        if rank == world_size - 1:
            dist.barrier()  # it hears on arrival
        if rank == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        begin, name = time.monotonic(), ""
        try:
            call.run(rank, world_size, arguments)
        except KeyboardInterrupt as error:
            name = type(error).__name__
        except CollectiveFault as error:
            name = str(error)
        seconds = time.monotonic() - begin
        if rank < world_size - 1:
            dist.barrier()
        return name, seconds, str(outcome(made.check)[0])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [3])
def test_ctrl_c_ends_a_wait(pool, op, world_size):
    outcomes = pool.run(be_interrupted, op)
    assert outcomes[0][0] == "KeyboardInterrupt" and outcomes[0][1] < BUSY_S
    for rank, (name, seconds, reported) in enumerate(outcomes):
        if rank > 0:
            assert "rank 0 has given up on this workspace" in name and seconds < BUSY_S
        assert f"{op} #1: a signal ended rank 0's wait for rank" in reported


def be_interrupted_between_exchanges() -> tuple:
    """Runs on a rank: a signal reaches rank 0 in the reference backend's first exchange, which the last rank is late
    to; it leaves the call there, and the others go on to the next exchange."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ["TP_FUSED_BACKEND"] = "reference"
    group, name = dist.new_group(range(world_size), timeout=datetime.timedelta(seconds=2)), ""
    with tp_fused.init(group, dtype=torch.float32, **SIZES) as made:
        if rank == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(0.8 * (rank == world_size - 1))
        try:
            tp_fused.reduce_scatter_rows(torch.ones(6, 8), group)
        except (KeyboardInterrupt, RuntimeError) as error:
            name = type(error).__name__
        return name, str(outcome(made.check)[0]), str(outcome(tp_fused.reduce_scatter_rows, torch.ones(6, 8), group)[0])


@pytest.mark.parametrize("world_size", [3])
def test_ctrl_c_over_torch_distributed(fresh_pool, world_size):
    for rank, (name, reported, later) in enumerate(fresh_pool.run(be_interrupted_between_exchanges)):
        assert name == ("KeyboardInterrupt" if rank == 0 else "CollectiveFault")
        told = "KeyboardInterrupt ended it on rank 0" if rank == 0 else f"rank {rank} did not hear from all peers"
        assert f"reduce_scatter_rows #1: {told}" in reported
        assert later == reported


# ---- streams ----


def call_on_two_streams(device: str, op: str) -> None:
    """Runs on a rank: calls that alternate between two streams, without an event."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    calls = [Call(op, 257, residual="full", seed=seed, device=device) for seed in range(2)]
    with workspace(device, device, **SIZES) as made:
        arguments = [call.arguments(rank, world_size) for call in calls]
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
        for i in range(48):
            with torch.cuda.stream(streams[i % 2]):
                results.append(calls[i % 2].run(rank, world_size, arguments[i % 2]))
        torch.cuda.synchronize()
        made.check()
        for i, outputs in enumerate(results):
            calls[i % 2].check(outputs, rank, world_size)


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [4, 8])
def test_two_streams_have_one_order(pool, device, op, world_size):
    pool.run(call_on_two_streams, device, op)


def replay_on_two_streams(device: str, op: str) -> tuple[int, str]:
    """Runs on a rank: how many results of graphs that overlap are wrong, and what check() says."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    calls = [Call(op, 257, residual="full", seed=seed, device=device) for seed in range(2)]
    with workspace(device, device, timeout_s=3.0, **SIZES) as made:
        graphs, outputs = [], []
        for call in calls:
            arguments = call.arguments(rank, world_size)
            call.check(call.run(rank, world_size, arguments), rank, world_size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs.append([call.run(rank, world_size, arguments) for _ in range(16)])
            graphs.append(graph)
        dist.barrier()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        wrong = sum(
            isinstance(outcome(call.check, result, rank, world_size)[0], AssertionError)
            for call, results in zip(calls, outputs, strict=True)
            for result in results
        )
        dist.barrier()
        return wrong, str(outcome(made.check)[0])


@pytest.mark.cuda
@pytest.mark.parametrize("op", ["rs_rmsnorm", "rs_rmsnorm_ag", "all_gather_rows", "qkv_a_proj_ag"])
@pytest.mark.parametrize("world_size", [2, 8])
def test_graphs_that_overlap_fault(pool, device, op, world_size):
    outcomes = pool.run(replay_on_two_streams, device, op)
    for _, reported in outcomes:
        assert "before the workspace's call before it had ended" in reported, outcomes


# ---- late ----


def come_when_the_others_gave_up(device: str, num_tokens: int, calls_again: bool) -> dict[str, list[str]]:
    """Runs on a rank: the last one comes, or only asks, after the others' deadline, for which all ops wait at once."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    late = rank == world_size - 1
    os.environ["TP_FUSED_BACKEND"] = device
    calls = {op: Call(op, num_tokens, residual="full", device=device) for op in OPS}
    groups, made, given = {}, {}, {}
    for op, call in calls.items():
        groups[op] = dist.new_group(range(world_size))
        made[op] = tp_fused.init(groups[op], dtype=torch.float32, timeout_s=0.5, device=device, **SIZES)
        given[op] = (rank, world_size, call.arguments(rank, world_size) | {"group": groups[op]})
        call.check(settled(made[op], call.run, *given[op]), rank, world_size)

    def ask(op: str) -> list[str]:
        made[op].attach_thread()
        told = []
        if calls_again or not late:
            told.append(str(outcome(settled, made[op], calls[op].run, *given[op])[0]))
        return [*told, str(outcome(made[op].check)[0])]

    dist.barrier()
    if late:
        dist.barrier()  # which the others come to when they have given up
    with concurrent.futures.ThreadPoolExecutor(len(OPS)) as executor:
        # A card's kernels wait one after the other.
        told = dict(zip(OPS, (map if device == "cuda" else executor.map)(ask, OPS), strict=True))
    if not late:
        dist.barrier()
    dist.barrier()
    for op in OPS:
        made[op].close()
        dist.destroy_process_group(groups[op])
    return told


@pytest.mark.parametrize("calls_again", [True, False])
@pytest.mark.parametrize("num_tokens", [3, 257])
@pytest.mark.parametrize("world_size", [3])
def test_who_comes_late_hears_that_the_others_gave_up(pool, device, num_tokens, calls_again, world_size):
    late = pool.run(come_when_the_others_gave_up, device, num_tokens, calls_again)[-1]
    for op, all_told in late.items():
        for told in all_told:
            assert "has given up on this workspace" in told and f"{op} #2: rank 2 never arrived; rank" in told, op


# ---- groups ----


def call_by_name(device: str) -> str:
    """Runs on a rank: a group that has no workspace is told so."""
    group = dist.new_group([0, 1])
    with workspace(device, device, **SIZES):
        call = Call("reduce_scatter_rows", 4, device=device)
        given = call.arguments(dist.get_rank(), 2)
        return str(outcome(tp_fused.reduce_scatter_rows, given["input"], group)[0])


@pytest.mark.parametrize("world_size", [2])
def test_another_group_has_no_workspace(pool, device, world_size):
    for told in pool.run(call_by_name, device):
        assert "has no workspace" in told
