"""Many rounds on one workspace: slots are used again, ranks come late, ranks stop in the middle."""

import contextlib
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, OPS, REDUCTIONS, Call, same_bits
from ranks import workspace

SIZES = {"max_num_tokens": 300, "hidden_size": 208, "latent_size": sum(LATENT)}


def rounds(backend: str, device: str, calls: list[Call], late: int, seconds: float) -> None:
    """Runs on a rank: the calls one after the other, rank `late` coming late to each."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(backend, device, **SIZES):
        arguments = [call.arguments(rank, world_size) for call in calls]
        outputs = []
        for call, given in zip(calls, arguments, strict=True):
            time.sleep(seconds * (rank == late))
            outputs.append(call.run(rank, world_size, given))
        # Checked at the end: a check takes long and would keep the ranks apart, or together.
        for call, output in zip(calls, outputs, strict=True):
            call.check(output, rank, world_size)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [3])
def test_six_rounds_with_a_late_rank(pool, backend, device, op, world_size):
    calls = [Call(op, 65, seed=i, device=device) for i in range(6)]
    pool.run(rounds, backend, device, calls, 1, 0.03)


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("world_size", [3])
def test_mixed_ops_with_a_late_rank(pool, backend, device, late, world_size):
    """Rounds of different ops share the slots, the signals and the epochs."""
    counts = (5, 257, 0, 1, 64)
    calls = [Call(OPS[i % len(OPS)], counts[i % len(counts)], seed=i, device=device) for i in range(24)]
    pool.run(rounds, backend, device, calls, late, 0.01)


@contextlib.contextmanager
def interruptions(pids: list[int]):
    """Stops and resumes each of the processes in turn, again and again."""
    over = threading.Event()

    def interrupt():
        while not over.is_set():
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
                over.wait(0.005)
                os.kill(pid, signal.SIGCONT)
                over.wait(0.001)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_stop_anywhere(fresh_pool, device, world_size):
    """Not only late to a call: stopped while staging, while waiting, while reading a peer's slot."""
    counts = (257, 300, 31)
    calls = [Call(REDUCTIONS[i % 4], counts[i % 3], seed=i % 5, device=device) for i in range(60)]
    with interruptions([process.pid for process in fresh_pool.processes]):
        fresh_pool.run(rounds, device, device, calls, 0, 0.0)


def leave_at_once(backend: str, device: str, calls: list[Call]) -> None:
    """Runs on a rank: the last rank is late to every call, the others close right after their last one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for call in calls:
        with workspace(backend, device, **SIZES):
            given = call.arguments(rank, world_size)
            time.sleep(0.05 * (rank == world_size - 1))
            output = call.run(rank, world_size, given)
        call.check(output, rank, world_size)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [2])
def test_closing_after_the_last_call_disturbs_nobody(pool, backend, device, op, world_size):
    pool.run(leave_at_once, backend, device, [Call(op, 65, device=device)] * 3)


def some_rows(backend: str, device: str, op: str, dtype: torch.dtype, num_tokens: int, of: int) -> tuple:
    """Runs on a rank: `op` on the first num_tokens of `of` rows; this rank's row numbers, and its outputs for them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    arguments = Call(op, of, dtype=dtype, residual="full", device=device).arguments(rank, world_size)
    cut = {key: arguments[key][:num_tokens].contiguous() for key in ("input", "residual") if key in arguments}
    call = Call(op, num_tokens, dtype=dtype, device=device)
    with workspace(backend, device, **SIZES):
        outputs = call.run(rank, world_size, arguments | cut)
    own = call.rows(rank, world_size)
    return own, [output[own] if len(output) == num_tokens else output for output in (o.cpu() for o in outputs)]


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 4, 256])
@pytest.mark.parametrize("world_size", [3])
def test_a_row_does_not_depend_on_the_others(pool, backend, device, op, dtype, num_tokens, world_size):
    every, few = (pool.run(some_rows, backend, device, op, dtype, count, 257) for count in (257, num_tokens))
    for index in range(len(every[0][1])):
        rows_of_every = torch.cat([outputs[index] for _, outputs in every])
        for own, outputs in few:
            if len(outputs[index]):
                same_bits([outputs[index]], [rows_of_every[own]])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [2])
def test_runs_repeat(pool, backend, device, op, world_size):
    first, second = (pool.run(some_rows, backend, device, op, torch.float32, 65, 65) for _ in range(2))
    for (_, a), (_, b) in zip(first, second, strict=True):
        same_bits(a, b)


def memory_in_use(device: str) -> tuple[int, ...]:
    """Bytes of this process, and on cuda those that torch holds there, used and reserved."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if device == "cpu":
        return (resident,)
    torch.cuda.synchronize()
    return resident, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def grow(device: str) -> tuple[int, ...]:
    """Runs on a rank: what 10,000 calls add to the memory in use."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, **SIZES):
        calls = [Call(op, 33, device=device) for op in OPS]
        arguments = [call.arguments(rank, world_size) for call in calls]

        def run(rounds: int) -> tuple[int, ...]:
            for _ in range(rounds):
                for call, given in zip(calls, arguments, strict=True):
                    call.run(rank, world_size, given)
            return memory_in_use(device)

        before = run(100)
        after = run(10_000 // len(OPS))
    return tuple(b - a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("world_size", [2])
def test_memory_does_not_grow(pool, device, world_size):
    for resident, *on_the_card in pool.run(grow, device):
        assert resident < 2 << 20  # two hundred bytes a call
        assert not any(on_the_card)
