"""What a workspace takes, and what ends it: a second `init`, the end of its process group, a graph that outlives it."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
from programs import ALL_OPS, LATENT, Call
from ranks import outcome, settled, workspace

import tp_fused
from tp_fused.native import _C

GOOD = {"max_num_tokens": 64, "hidden_size": 256, "dtype": torch.float32, "timeout_s": 20.0}


def check_on(group, device: str, hidden_size: int = 256, num_tokens: int = 5) -> None:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    call = Call("rs_rmsnorm", num_tokens, hidden_size, device=device)
    call.check(call.run(rank, world_size, call.arguments(rank, world_size) | {"group": group}), rank, world_size)


# ---- bytes ----


def mapped_bytes() -> int:
    """Of this process, in nameless segments of shared memory."""
    with open("/proc/self/maps") as file:
        rows = [line.split() for line in file if "/dev/shm/tp_fused-" in line]
    return sum(int(row[0].split("-")[1], 16) - int(row[0].split("-")[0], 16) for row in rows)


def bytes_of(device: str, max_num_tokens: int, hidden_size: int) -> dict:
    """Runs on a rank."""
    with workspace(device, device):
        pass  # what an earlier test has left open is closed, and its sizes are no part of the next
    gc.collect()
    before, header = mapped_bytes(), getattr(_C, "SEGMENT_HEADER_BYTES", 0)
    with workspace(device, device, max_num_tokens=max_num_tokens, hidden_size=hidden_size) as made:
        told = [(made.nbytes, made.memory(), mapped_bytes() - before - header)]
        tensor = made.symm_empty(10, 256)
        made.symm_empty(0, 256)
        told.append((made.nbytes, made.memory(), mapped_bytes() - before - 2 * header))
        symmetric = sum(memory.numel() for memory, _ in made._symmetric)
    del tensor
    gc.collect()
    assert (made.nbytes, made.memory(), mapped_bytes()) == (0, {}, before)
    return {"told": told, "symmetric": symmetric}


@pytest.mark.parametrize(("max_num_tokens", "hidden_size"), [(64, 256), (1001, 520), (1, 8)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_those_that_were_allocated(pool, device, world_size, max_num_tokens, hidden_size):
    slot = -(-world_size * -(-max_num_tokens // world_size) * hidden_size * 4 // 4096) * 4096
    for result in pool.run(bytes_of, device, max_num_tokens, hidden_size):
        for nbytes, memory, mapped in result["told"]:
            assert nbytes == sum(memory.values())
            assert memory["control"] + memory["signals"] == _C.region_bytes(0)
            assert memory["staging slots"] == 2 * slot
            assert (memory["inboxes"] > 0) == (memory["mailbox"] > 0) == (device == "cuda")
            if device == "cpu":  # every rank maps the memory of all
                assert mapped == world_size * nbytes
        before, after = result["told"][0][1], result["told"][1][1]
        assert before["symmetric buffers"] == 0
        assert after["symmetric buffers"] == (12288 if device == "cpu" else 10240)
        if device == "cuda":
            assert result["symmetric"] == result["told"][1][0] - after["mailbox"]


def bytes_of_reference(device: str) -> tuple:
    """Runs on a rank."""
    with workspace("reference", device) as made:
        made.symm_empty(10, 256)
        return made.nbytes, made.memory()


@pytest.mark.parametrize("world_size", [2])
def test_the_reference_backend_allocates_nothing(pool, device, world_size):
    assert pool.run(bytes_of_reference, device) == [(0, {})] * 2


# ---- a second model on the group ----


def two_models(backend: str, device: str) -> list:
    """Runs on a rank: the second asks for less of one thing and more of another."""
    with workspace(backend, device) as target:
        draft = tp_fused.init(max_num_tokens=128, hidden_size=64, latent_size=32, dtype=torch.bfloat16, device=device)
        assert (draft.max_num_tokens, draft.hidden_size, draft.latent_size) == (128, 256, 256)
        assert draft.row_bytes == 1024 and draft.dtype == torch.bfloat16
        for _ in range(2):
            check_on(dist.group.WORLD, device, 256, 64)
            check_on(dist.group.WORLD, device, 64, 128)
        told = [outcome(call)[0] for call in (target.check, lambda: target.symm_empty(4, 4))]
        draft.close()
        small = tp_fused.init(max_num_tokens=16, hidden_size=64, device=device)
        assert (small.max_num_tokens, small.hidden_size, small.row_bytes) == (16, 64, 128)
        small.close()
        return told


@pytest.mark.parametrize("world_size", [2])
def test_a_second_init_keeps_room_for_the_first(pool, backend, device, world_size):
    for told in pool.run(two_models, backend, device):
        for error in told:
            assert isinstance(error, ValueError)
            assert "was replaced by tp_fused.init(max_num_tokens=128, hidden_size=64) at" in str(error)
            assert f"{os.path.basename(__file__)}:" in str(error)


# ---- the end of the group ----


def started_again(device: str, again: int) -> None:
    """Runs on a rank: the default group ends, and another one gets its name."""
    store = dist.distributed_c10d._get_default_store()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore(str(again), store), rank=rank, world_size=world_size)


def default_group_ends(backend: str, device: str) -> list:
    """Runs on a rank."""
    os.environ["TP_FUSED_BACKEND"] = backend
    made, old, input = tp_fused.init(device=device, **GOOD), dist.group.WORLD, torch.zeros(4, 256, device=device)
    check_on(old, device)
    started_again(device, 1)
    name = dist.group.WORLD.group_name
    assert name == made.group_name and dist.group.WORLD is not old and made.closed
    by_name = torch.ops.tp_fused.reduce_scatter_rows
    calls = (
        made.check,
        lambda: made.symm_empty(4, 4),
        lambda: tp_fused.reduce_scatter_rows(input),
        lambda: by_name(input, name),
        lambda: tp_fused.reduce_scatter_rows(input, old),
    )
    told = [str(outcome(call)[0]) for call in calls]
    tp_fused.init(device=device, **GOOD)
    check_on(dist.group.WORLD, device)
    return told, [
        str(outcome(tp_fused.reduce_scatter_rows, input, old)[0]),
        str(outcome(tp_fused.init, old, device=device, **GOOD)[0]),
    ]


@pytest.mark.parametrize("world_size", [2])
def test_a_workspace_ends_with_the_default_group(fresh_pool, backend, device, world_size):
    for told, (op, init) in fresh_pool.run(default_group_ends, backend, device):
        for error in told:
            assert "was destroyed; call tp_fused.init on the new one" in error, told
        assert "was destroyed; the workspace of that name is of a later group" in op
        assert "was destroyed" in init


def subgroup_ends(backend: str, device: str) -> str:
    """Runs on a rank: the workspace of a subgroup ends with it, and no other does."""
    os.environ["TP_FUSED_BACKEND"] = backend
    pair = dist.new_group([0, 1])
    with tp_fused.init(device=device, **GOOD), tp_fused.init(pair, device=device, **GOOD) as made:
        check_on(pair, device)
        dist.destroy_process_group(pair)
        check_on(dist.group.WORLD, device)
        return str(outcome(made.check)[0])


@pytest.mark.parametrize("world_size", [2])
def test_a_workspace_ends_with_its_subgroup(fresh_pool, backend, device, world_size):
    for error in fresh_pool.run(subgroup_ends, backend, device):
        assert "its process group was destroyed" in error


def same_ranks_twice(backend: str, device: str) -> None:
    """Runs on a rank."""
    os.environ["TP_FUSED_BACKEND"] = backend
    groups = [dist.new_group() for _ in range(2)]
    made = [tp_fused.init(group, device=device, **GOOD) for group in groups]
    for order in (groups, groups[::-1]) * 3:
        for group in order:
            check_on(group, device)
    made[0].close()
    check_on(groups[1], device)
    made[1].close()


@pytest.mark.parametrize("world_size", [2])
def test_groups_of_the_same_ranks_do_not_share(fresh_pool, backend, device, world_size):
    fresh_pool.run(same_ranks_twice, backend, device)


# ---- a CUDA graph that outlives its workspace ----


def captured(device: str):
    """A graph of one op on the group's workspace, and what it leaves."""
    input, weight = torch.ones(8, 256, device=device), torch.ones(256, device=device)
    tp_fused.rs_rmsnorm(input, None, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = tp_fused.rs_rmsnorm(input, None, weight)
    return graph, outputs


def replayed(graph, outputs) -> bool:
    """Whether a replay leaves numbers, and no NaN."""
    for output in outputs:
        output.fill_(42)
    graph.replay()
    torch.cuda.synchronize()
    return all(bool(torch.isfinite(output).all()) for output in outputs)


def replay_after(end: str, device: str) -> tuple:
    """Runs on a rank: a graph, captured on a workspace that is then closed or replaced, is replayed."""
    os.environ["TP_FUSED_BACKEND"] = device
    first = tp_fused.init(device=device, **GOOD)
    graph, outputs = captured(device)
    assert replayed(graph, outputs)
    first.check()
    dist.barrier()
    if end == "closed":
        first.close()
    elif end == "faulted":  # and then replaced
        odd = torch.ones(8 + dist.get_rank(), 256, device=device)
        fault, _ = outcome(settled, first, tp_fused.rs_rmsnorm, odd, None, torch.ones(256, device=device))
        assert fault.reason in ("disagrees", "gave up")
        dist.barrier()
    with tp_fused.init(device=device, **GOOD) as second:
        assert first.closed and first.nbytes == second.nbytes  # a graph may still read that memory
        healthy = replayed(graph, outputs)
        fault, _ = outcome(second.check)
        second.check()  # told once
        check_on(dist.group.WORLD, device)
        again = captured(device)
        for _ in range(3):
            assert replayed(*again)
        second.check()
        dist.barrier()
        return healthy, fault


@pytest.mark.cuda
@pytest.mark.parametrize("end", ["closed", "replaced", "faulted"])
@pytest.mark.parametrize("world_size", [2])
def test_a_graph_of_a_closed_workspace_faults_by_name(fresh_pool, device, world_size, end):
    for rank, (healthy, fault) in enumerate(fresh_pool.run(replay_after, end, device)):
        assert not healthy
        assert isinstance(fault, tp_fused.CollectiveFault) and fault.reason == "closed"
        call = 4 if end == "faulted" else 3
        assert f"rs_rmsnorm #{call}: rank {rank} replayed a CUDA graph that was captured on a workspace" in str(fault)


def not_captured(device: str) -> int:
    """Runs on a rank: memory of a workspace that no graph knows is given back."""
    torch.cuda.synchronize()
    with workspace(device, device, max_num_tokens=16384, hidden_size=1024):
        check_on(dist.group.WORLD, device)
        inside = torch.cuda.mem_get_info()[0]
        dist.barrier()
    dist.barrier()
    gc.collect()
    torch.cuda.synchronize()
    dist.barrier()
    return torch.cuda.mem_get_info()[0] - inside


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2])
def test_memory_that_no_graph_knows_is_given_back(fresh_pool, device, world_size):
    for given_back in fresh_pool.run(not_captured, device):
        assert given_back > 64 << 20


# ---- what else the process has set ----


def call_under_a_default_device(device: str, backend: str) -> None:
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for op in ALL_OPS:
        call = Call(op, 5, 256, device=device)
        arguments = call.arguments(rank, world_size)
        with torch.device("cuda" if device == "cuda" else "meta"), workspace(backend, device, latent_size=sum(LATENT)):
            outputs = call.run(rank, world_size, arguments)
        call.check(outputs, rank, world_size)


@pytest.mark.parametrize("world_size", [2])
def test_torchs_default_device_is_not_where_the_library_keeps_its_own(pool, device, world_size):
    for backend in dict.fromkeys((device, "reference")):
        pool.run(call_under_a_default_device, device, backend)
