"""What goes wrong between ranks: who is told what, how soon, and what works afterwards. What is left in the outputs on
CUDA: test_cuda_faults.py.
"""

import concurrent.futures
import os
import pickle
import signal
import time

import pytest
import torch
import torch.distributed as dist
from programs import ALL_OPS, LATENT, OPS, Call
from ranks import BUSY_S, RankDied, names_in_shared_memory, outcome, settled, workspace

import tp_fused
from tp_fused import CollectiveFault

ODD = 1  # the rank that misbehaves
SIZES = {"hidden_size": 256, "latent_size": sum(LATENT)}
BF16 = torch.bfloat16


def call_of(op: str, device: str, **changes) -> Call:
    return Call(op, **{"num_tokens": 4, "hidden_size": 256, "residual": "full", "device": device, **changes})


def faults_of_every_op(made) -> list:
    """What each op does on the workspace as it is: the type of its error, or None."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    errors = [outcome(settled, made, call_of(op, made.device_type).run, rank, world_size)[0] for op in ALL_OPS]
    return [type(error) if isinstance(error, Exception) else None for error in errors]


# ---- ranks that call different things ----

# The op that the others call, and what the odd rank calls instead (an op, or changes), and how both are named.
DISAGREEMENTS = {
    "num_tokens": ("rs_rmsnorm", {"num_tokens": 5}, "num_tokens=5", "num_tokens=4"),
    "op": ("rs_rmsnorm", {"op": "reduce_scatter_rows"}, "reduce_scatter_rows", "rs_rmsnorm"),
    "op and num_tokens": (
        *("all_gather_rows", {"op": "rs_rmsnorm_ag", "num_tokens": 9}),
        *("rs_rmsnorm_ag, num_tokens=9", "all_gather_rows, num_tokens=4"),
    ),
    "dtype": ("rs_rmsnorm", {"dtype": BF16}, "dtype=bfloat16", "dtype=float32"),
    "hidden_size": ("reduce_scatter_rows", {"hidden_size": 128}, "hidden_size=128", "hidden_size=256"),
    "residual": ("rs_rmsnorm_ag", {"residual": None}, "no option set", "residual"),
    "complete": ("rs_rmsnorm", {"options": {"complete": True}}, "complete and residual", "residual"),
    "group_size": ("rs_rmsnorm_fp8", {"options": {"group_size": 64}}, "group_size=64", "group_size=128"),
    "bias": ("qkv_a_proj_ag", {"options": {"bias": True}}, "bias", "no option set"),
    "scale_layout": (
        *("rs_rmsnorm_fp8", {"options": {"scale_layout": "column"}}),
        *("residual and column scales", "residual"),
    ),
    "keep_output": ("rs_rmsnorm_fp8", {"options": {"keep_output": True}}, "residual and keep_output", "residual"),
    "dtype of gathered rows": ("all_gather_rows", {"dtype": BF16}, "dtype=bfloat16", "dtype=float32"),
    "num_tokens of a projection": ("qkv_a_proj_ag_norm", {"num_tokens": 7}, "num_tokens=7", "num_tokens=4"),
    "dtype of a projection": (  # and, on Hopper, the kernel
        *("qkv_a_proj_ag", {"dtype": BF16}),
        *("dtype=bfloat16(, one kernel)?", "dtype=float32(, no option set)?"),
    ),
    "eps": ("rs_rmsnorm", {"options": {"eps": 1e-6}}, "eps=1e-06", "eps=1e-05"),
    "eps of few gathered rows": ("rs_rmsnorm_ag", {"options": {"eps": 0.03}}, "eps=0.03", "eps=1e-05"),
    "eps of quantised rows": ("rs_rmsnorm_fp8", {"options": {"eps": 1e-6}}, "eps=1e-06", "eps=1e-05"),
    "eps of a projection": ("qkv_a_proj_ag_norm", {"options": {"eps": 1e-6}}, "eps=1e-06", "eps=1e-05"),
    "columns of kv_a": ("qkv_a_proj_ag_norm", {"latent": (96, 39, 9)}, "kv_columns=39", "kv_columns=40"),
    "weight_offset": ("rs_rmsnorm_ag", {"options": {"weight_offset": 1.0}}, "weight_offset=1", "weight_offset=0"),
    "q_a": ("qkv_a_proj_ag_norm_fp8", {"options": {"quantize_q_a": True}}, "a quantised q_a", "q_a in 16 bits"),
    "norms of a projection": (
        *("qkv_a_proj_ag", {"op": "qkv_a_proj_ag_norm"}),
        *("qkv_a_proj_ag_norm", "qkv_a_proj_ag"),
    ),
}


def disagree(backend: str, device: str, name: str) -> tuple:
    """Runs on a rank: a good call, one that the odd rank sees differently, every op, and a new workspace."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    op, changes, *_ = DISAGREEMENTS[name]
    with workspace(backend, device, **SIZES) as made:
        good = call_of("rs_rmsnorm", device)
        good.check(good.run(rank, world_size), rank, world_size)
        made.check()
        dist.barrier()  # a rank that was still before its check() would hear there of the others' next call
        call = call_of(**({"op": op, "device": device} | (changes if rank == ODD else {})))
        error, seconds = outcome(settled, made, call.run, rank, world_size)
        later, reported = faults_of_every_op(made), outcome(made.check)[0]
    with workspace(backend, device, **SIZES):
        good.check(good.run(rank, world_size), rank, world_size)
    return error, seconds, later, reported


@pytest.mark.parametrize("name", DISAGREEMENTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_disagree(pool, device, name, world_size):
    op, changes, theirs, mine = DISAGREEMENTS[name]
    others = rf"{op} #2: rank {ODD} called with {theirs}, rank \d with {mine}"
    odd = rf"{changes.get('op', op)} #2: rank \d called with {mine}, rank {ODD} with {theirs}"
    for rank, (error, seconds, later, reported) in enumerate(pool.run(disagree, device, device, name)):
        assert isinstance(error, CollectiveFault), repr(error)
        assert seconds < BUSY_S
        assert set(later) == {CollectiveFault}
        assert str(reported) == str(error)
        # Whoever saw it first may have told the others.
        seen = odd if rank == ODD else others
        told = rf"^{seen}$|rank \d has given up on this workspace \(({odd}|{others})\)$"
        with pytest.raises(CollectiveFault, match=told):
            raise error


@pytest.mark.parametrize("name", DISAGREEMENTS)
@pytest.mark.parametrize("world_size", [2])
def test_ranks_that_disagree_over_torch_distributed(pool, name, world_size):
    op, changes, *_ = DISAGREEMENTS[name]
    for rank, (error, _, later, reported) in enumerate(pool.run(disagree, "reference", "cpu", name)):
        assert isinstance(error, CollectiveFault), repr(error)
        assert set(later) == {CollectiveFault}
        assert str(reported) == str(error)
        mine, theirs = op, changes.get("op", op)
        mine, theirs = (mine, theirs) if rank != ODD else (theirs, mine)
        assert f"{mine} #2: rank {1 - rank} called {theirs}(num_tokens=" in str(error)


def disagree_in_a_chain(device: str):
    """Runs on a rank: rank 2 has met rank 0's other call, and left, when rank 1 comes and rank 0 looks at that one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, **SIZES) as made:
        call = call_of("reduce_scatter_rows", device, num_tokens=5 if rank == 0 else 4)
        time.sleep(0.3 * (rank == 1))
        error, _ = outcome(settled, made, call.run, rank, world_size)
        dist.barrier()
    return error


@pytest.mark.parametrize("world_size", [3])
def test_first_cause_is_told(pool, device):
    for error in pool.run(disagree_in_a_chain, device):
        with pytest.raises(CollectiveFault, match=r"rank \d called with num_tokens=\d, rank \d with num_tokens=\d"):
            raise error


# ---- ranks that do not come ----


def be_killed(made) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once(made) -> None:
    os._exit(0)


def leave_the_interpreter(made) -> None:
    raise SystemExit(0)


def close(made) -> None:
    made.close()


def come_late(made) -> None:
    dist.barrier()  # which the others come to when they have been told


# What the odd rank does instead of calling, and what the others are told.
DIED = rf"the process of rank {ODD} ended before it arrived"
CLOSED = rf"rank {ODD} closed its workspace before it arrived"
NEVER_ARRIVED = rf"rank {ODD} never arrived; rank \d waited 2(\.\d+)? s"
ABSENCES = {
    "killed": (be_killed, DIED),
    "exits": (exit_at_once, DIED),
    "ends": (leave_the_interpreter, rf"{DIED}|{CLOSED}"),
    "closes": (close, CLOSED),
    "late": (come_late, NEVER_ARRIVED),
}


def expected(device: str, name: str) -> tuple[float, str]:
    """The deadline of the others, and what they are told. On cuda they learn of a death by the deadline alone."""
    told = ABSENCES[name][1].replace(DIED, NEVER_ARRIVED if device == "cuda" else DIED)
    return 2.0 if told == NEVER_ARRIVED else 20.0, told


def be_absent(device: str, op: str, name: str) -> tuple:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, timeout_s=expected(device, name)[0], **SIZES) as made:
        call = call_of(op, device)
        for _ in range(2):
            call.check(call.run(rank, world_size), rank, world_size)
        arguments = call.arguments(rank, world_size)
        if device == "cuda":
            torch.cuda.synchronize()  # under MPS, a process that dies with work on its way takes others with it
        if rank == ODD:
            ABSENCES[name][0](made)
        result, seconds = outcome(settled, made, call.run, rank, world_size, arguments)
        if name == "late" and rank != ODD:
            dist.barrier()
        if not isinstance(result, Exception):
            call.check(result, rank, world_size)
        if made.closed:
            return result, seconds, [], None
        return result, seconds, faults_of_every_op(made), outcome(made.check)[0]


@pytest.mark.parametrize("name", ABSENCES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_rank_that_does_not_come(fresh_pool, device, name, world_size):
    _, told = expected(device, name)
    pids = [process.pid for process in fresh_pool.processes]
    outcomes = fresh_pool.outcomes(be_absent, device, "rs_rmsnorm", name)
    for rank in {*range(world_size)} - {ODD}:
        error, seconds, later, _ = outcomes[rank]
        assert seconds < BUSY_S
        assert set(later) == {CollectiveFault}
        with pytest.raises(CollectiveFault, match=rf"rs_rmsnorm #3: .*({told})"):
            raise error
    assert names_in_shared_memory(*pids) == []
    if name == "late":  # it learns on arrival what became of its call
        error, _, later, reported = outcomes[ODD]
        assert isinstance(error, CollectiveFault)
        assert "has given up on this workspace (rs_rmsnorm #3: rank 1 never arrived" in str(reported)
        assert set(later) == {CollectiveFault}
    elif name in ("killed", "exits"):
        assert isinstance(outcomes[ODD], RankDied)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [3])
def test_rank_that_dies_in_every_op(fresh_pool, device, op, world_size):
    if device == "cuda":
        pytest.skip("on cuda a rank that has died is one that never arrives: test_cuda_faults.py has that of every op")
    outcomes = fresh_pool.outcomes(be_absent, device, op, "killed")
    for rank in (0, 2):
        error, seconds, *_ = outcomes[rank]
        assert seconds < BUSY_S
        with pytest.raises(CollectiveFault, match=rf"{op} #3: .*{DIED}"):
            raise error


def fork_a_child() -> None:
    """Runs on a rank: a forked child ends as Python programs do."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace("cpu"):
        if rank == ODD:
            child = os.fork()
            if child == 0:
                tp_fused.groups._close_all()  # what runs at exit
                os._exit(0)
            os.waitpid(child, 0)
        dist.barrier()
        time.sleep(0.3 * (rank == ODD))  # long enough for the others to look whether it has closed
        call = call_of("rs_rmsnorm", "cpu")
        call.check(call.run(rank, world_size), rank, world_size)


@pytest.mark.parametrize("world_size", [2])
def test_end_of_a_forked_child_is_not_the_rank_s(pool):
    pool.run(fork_a_child)


def close_beside_a_call() -> None:
    """Runs on a rank: the odd rank closes while a thread of it is in an op, where it waits for the others."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace("cpu", timeout_s=5.0) as made, concurrent.futures.ThreadPoolExecutor(1) as executor:
        call = call_of("reduce_scatter_rows", "cpu")
        if rank != ODD:
            time.sleep(1)
        called = executor.submit(call.run, rank, world_size)
        if rank == ODD:
            time.sleep(0.3)
            made.close()
        call.check(called.result(), rank, world_size)


@pytest.mark.parametrize("world_size", [2])
def test_close_beside_a_call(fresh_pool):
    """The memory is there until the call has ended, which the others can still answer."""
    fresh_pool.run(close_beside_a_call)


def die_over_torch_distributed() -> tuple:
    """Runs on a rank."""
    with workspace("reference") as made:
        if dist.get_rank() == ODD:
            os.kill(os.getpid(), signal.SIGKILL)
        error, seconds = outcome(tp_fused.reduce_scatter_rows, torch.zeros(4, 8))
        return error, seconds, faults_of_every_op(made)


@pytest.mark.parametrize("world_size", [3])
def test_rank_that_dies_over_torch_distributed(fresh_pool, world_size):
    outcomes = fresh_pool.outcomes(die_over_torch_distributed)
    for rank in (0, 2):
        error, seconds, later = outcomes[rank]
        assert isinstance(error, CollectiveFault), repr(error)
        assert f"reduce_scatter_rows #1: rank {rank} did not hear from all peers" in str(error)
        assert seconds < BUSY_S
        assert set(later) == {CollectiveFault}


def be_late_within_the_deadline(backend: str, device: str) -> float:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of("rs_rmsnorm_ag", device)
    with workspace(backend, device, timeout_s=10.0, **SIZES) as made:
        arguments = call.arguments(rank, world_size)
        time.sleep(1.5 * (rank == ODD))
        outputs, seconds = outcome(settled, made, call.run, rank, world_size, arguments)
        call.check(outputs, rank, world_size)
        made.check()
    return seconds


@pytest.mark.parametrize("world_size", [3])
def test_late_within_the_deadline_is_no_fault(pool, backend, device, world_size):
    seconds = pool.run(be_late_within_the_deadline, backend, device)
    assert seconds[0] > 1 and seconds[2] > 1 and seconds[ODD] < min(seconds[0], seconds[2])


def be_killed_anywhere(device: str) -> Exception:
    """Runs on a rank: calls without end, until a peer is gone."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace(device, device, timeout_s=expected(device, "killed")[0], **SIZES):
        calls = [call_of(op, device) for op in ALL_OPS]
        arguments = [call.arguments(rank, world_size) for call in calls]
        if rank == ODD:
            signal.setitimer(signal.ITIMER_REAL, 0.2)  # SIGALRM, which nobody handles
        while True:
            for call, given in zip(calls, arguments, strict=True):
                result, _ = outcome(call.run, rank, world_size, given)
                if isinstance(result, Exception):
                    return result


@pytest.mark.parametrize("world_size", [3])
def test_rank_that_dies_in_the_middle(fresh_pool, device, world_size):
    if device == "cuda" and torch.cuda.device_count() < world_size:
        pytest.skip("ranks share a card: under MPS, a process that dies while its kernels run takes the others with it")
    pids = [process.pid for process in fresh_pool.processes]
    outcomes = fresh_pool.outcomes(be_killed_anywhere, device)
    for rank in (0, 2):
        with pytest.raises(CollectiveFault, match=expected(device, "killed")[1]):
            raise outcomes[rank]
    assert names_in_shared_memory(*pids) == []


def go_on_without(device: str) -> None:
    """Runs on a rank: the survivors of a dead rank make a group of their own."""
    if dist.get_rank() == ODD:
        os.kill(os.getpid(), signal.SIGKILL)
    survivors = dist.new_group([0, 2], use_local_synchronization=True)
    call, rank = call_of("rs_rmsnorm_ag", device), survivors.rank()
    sizes = {"max_num_tokens": 64, "dtype": torch.float32, "device": device, **SIZES}
    with tp_fused.init(survivors, **sizes):
        call.check(call.run(rank, 2, call.arguments(rank, 2) | {"group": survivors}), rank, 2)


@pytest.mark.parametrize("world_size", [3])
def test_survivors_go_on_in_a_new_group(fresh_pool, device, world_size):
    outcomes = fresh_pool.outcomes(be_absent, device, "rs_rmsnorm", "late")
    assert all(isinstance(outcomes[rank][0], CollectiveFault) for rank in (0, 2))
    outcomes = fresh_pool.outcomes(go_on_without, device)
    assert outcomes[0] is None and outcomes[2] is None, outcomes


# ---- the exception ----


def what_the_fault_says(device: str) -> list:
    """Runs on a rank."""
    with workspace(device, device, **SIZES) as made:
        call = call_of("rs_rmsnorm", device, num_tokens=4 + dist.get_rank())
        error, _ = outcome(settled, made, call.run, dist.get_rank(), 2)
        return [error.op, error.call_number, error.rank, error.peer, error.reason]


@pytest.mark.parametrize("world_size", [2])
def test_attributes(pool, device, world_size):
    assert pool.run(what_the_fault_says, device)[0] == ["rs_rmsnorm", 1, 0, 1, "disagrees"]


def test_fault_travels_between_processes():
    fault = CollectiveFault("rank 2 never arrived", "rs_rmsnorm", 1842, 3, 2, "never arrived")
    copy = pickle.loads(pickle.dumps(fault))
    assert str(copy) == str(fault) and vars(copy) == vars(fault)
