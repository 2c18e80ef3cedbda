"""tp_fused.diagnose: one verdict, from whatever ranks can still tell."""

import contextlib
import io
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from programs import LATENT, Call
from ranks import BUSY_S, outcome, settled, workspace

import tp_fused

ODD = 1  # the rank that misbehaves
SIZES = {"hidden_size": 256, "latent_size": sum(LATENT)}
TIMEOUT_S = 1.0  # of the ops, where the deadline ends them
PATIENCE_S = 2.0  # of the diagnosis
CALL = r"rs_rmsnorm\(num_tokens=4, hidden_size=256, dtype=float32, residual, eps=1e-05\)"


def call_of(op: str, device: str, **changes) -> Call:
    return Call(op, **{"num_tokens": 4, "hidden_size": 256, "residual": "full", "device": device, **changes})


def diagnosed(timeout_s: float = PATIENCE_S, group=None) -> tuple:
    """The diagnosis, how long it took, and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        diagnosis, seconds = outcome(tp_fused.diagnose, group, timeout_s)
    if isinstance(diagnosis, Exception):
        raise diagnosis
    return diagnosis, seconds, printed.getvalue()


def good_calls(made, device: str) -> Call:
    """Two calls that all ranks make; a third one is to go wrong."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    call = call_of("rs_rmsnorm", device)
    for _ in range(2):
        call.check(settled(made, call.run, rank, world_size), rank, world_size)
    dist.barrier()
    return call


# ---- what the odd rank does instead of the third call; whether it takes part in the diagnosis ----


def wait_elsewhere(made, device: str) -> bool:
    return False  # and so comes to the barrier, where the others are when all is over


def be_killed(made, device: str) -> bool:
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
    return False


def raise_and_diagnose(made, device: str) -> bool:
    time.sleep(TIMEOUT_S + 0.2)
    return True


def come_late(made, device: str) -> bool:
    time.sleep(TIMEOUT_S + 0.3)
    for _ in range(2):  # on cuda the next call raises at the latest
        outcome(settled, made, call_of("rs_rmsnorm", device).run, dist.get_rank(), dist.get_world_size())
    return True


def close(made, device: str) -> bool:
    time.sleep(0.3)
    made.close()
    return True


def call_another(made, device: str) -> bool:
    other = call_of("reduce_scatter_rows", device, num_tokens=7)
    outcome(settled, made, other.run, dist.get_rank(), dist.get_world_size())
    return True


WAITED = r"; ranks 0, 2 and 3 waited 1\.\d s"
SITUATIONS = {
    "blocked elsewhere": (wait_elsewhere, rf"rank 1 never entered call #3 {CALL}{WAITED}"),
    "killed": (
        be_killed,
        rf"the process of rank 1 ended before it entered call #3 {CALL}; ranks 0, 2 and 3 waited \d+\.\d s",
    ),
    "skips the call": (raise_and_diagnose, rf"rank 1 never entered call #3 {CALL}{WAITED}"),
    "late": (come_late, rf"rank 1 came too late to call #3 {CALL}{WAITED}"),
    "closed": (
        close,
        rf"rank 1 closed the workspace before it entered call #3 {CALL}; ranks 0, 2 and 3 waited \d+\.\d s",
    ),
    "calls another": (
        call_another,
        r"call #3: rank 1 called reduce_scatter_rows\(num_tokens=7, hidden_size=256, dtype=float32, residual\); "
        rf"ranks 0, 2 and 3 called {CALL}",
    ),
}


def go_wrong(device: str, name: str):
    """Runs on a rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    noticed = name in ("closed", "calls another") or (name == "killed" and device == "cpu")  # before the deadline
    with workspace(device, device, timeout_s=BUSY_S if noticed else TIMEOUT_S, **SIZES) as made:
        call = good_calls(made, device)
        takes_part = True
        if rank == ODD:
            takes_part = SITUATIONS[name][0](made, device)
        else:
            error, seconds = outcome(settled, made, call.run, rank, world_size)
            assert isinstance(error, tp_fused.CollectiveFault), repr(error)
            assert seconds < BUSY_S or not noticed
        told = diagnosed() if takes_part else None
        if name != "killed":
            dist.barrier()
        return told


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("world_size", [4])
def test_first_cause_is_told(pool, device, name, world_size):
    outcomes = pool.outcomes(go_wrong, device, name)
    expected = SITUATIONS[name][1]
    if device == "cuda" and name == "killed":  # of which the deadline tells
        expected = SITUATIONS["blocked elsewhere"][1]
    answers = name not in ("killed", "blocked elsewhere")
    for rank, told in enumerate(outcomes):
        if rank == ODD and not answers:
            continue
        diagnosis, seconds, printed = told
        with pytest.raises(AssertionError, match=f"^{expected}$"):
            raise AssertionError(str(diagnosis))
        assert diagnosis.verdict == str(diagnosis) and diagnosis.culprits == (ODD,)
        assert (diagnosis.op, diagnosis.call_number) == ("rs_rmsnorm", 3) or name == "calls another"
        assert printed == (f"{diagnosis}\n" if rank == 0 else "")
        # Who has closed the workspace cannot say of which one it speaks: a better answer might come.
        assert seconds < PATIENCE_S + 0.5 if name == "closed" or not answers else seconds < PATIENCE_S - 0.5
        assert [state.answered for state in diagnosis.ranks] == [answers or peer != ODD for peer in range(world_size)]
        if name == "blocked elsewhere":
            last = "" if device == "cuda" else f"; last made call #2 {CALL}"
            with pytest.raises(AssertionError, match=f"^rank 1: did not answer{last}$"):
                raise AssertionError(str(diagnosis.ranks[ODD]))


# ---- without a fault ----


def diagnose_a_healthy_group(backend: str, device: str) -> list:
    """Runs on a rank."""
    with workspace(backend, device, **SIZES) as made:
        before = diagnosed()
        good_calls(made, device)
        return [before, diagnosed()]


@pytest.mark.parametrize("world_size", [3])
def test_no_fault(pool, backend, device, world_size):
    for rank, (before, after) in enumerate(pool.run(diagnose_a_healthy_group, backend, device)):
        for diagnosis, seconds, printed in (before, after):
            assert str(diagnosis) == "no rank has met a fault" and diagnosis.culprits == ()
            assert printed == ("no rank has met a fault\n" if rank == 0 else "")
            assert seconds < PATIENCE_S
        if backend == "cpu":
            assert str(before[0].ranks[2]) == "rank 2: has called nothing yet"
            assert str(after[0].ranks[2]).startswith("rank 2: last made call #2 rs_rmsnorm(num_tokens=4")


def look_on_from_a_thread() -> str:
    """Runs on a rank: while the others wait in an op for the odd one, a watchdog's thread asks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    told = []
    with workspace("cpu", timeout_s=20.0, **SIZES) as made:
        call = good_calls(made, "cpu")
        if rank == ODD:
            time.sleep(2)
        else:
            thread = threading.Timer(0.5, lambda: told.append(str(diagnosed(1.0)[0])))
            thread.start()
        call.check(call.run(rank, world_size), rank, world_size)
        if rank != ODD:
            thread.join()
        dist.barrier()
    return told


@pytest.mark.parametrize("world_size", [4])
def test_during_a_wait(pool, world_size):
    expected = f"no fault yet: rank 1 is not in call #3 {CALL}, in which ranks 0, 2 and 3 wait; rank 1 did not answer"
    for rank, told in enumerate(pool.run(look_on_from_a_thread)):
        if rank != ODD:
            with pytest.raises(AssertionError, match=f"^{expected} within 1.0 s$"):
                raise AssertionError(told[0])


def interrupt_a_wait() -> str | None:
    """Runs on a rank: Ctrl-C on rank 0, which waits for the odd one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    told = None
    with workspace("cpu", timeout_s=5.0, **SIZES) as made:
        call = good_calls(made, "cpu")
        if rank == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        if rank != ODD:
            with pytest.raises(KeyboardInterrupt if rank == 0 else tp_fused.CollectiveFault):
                call.run(rank, world_size)
            told = str(diagnosed(1.0)[0])
        dist.barrier()
    return told


@pytest.mark.parametrize("world_size", [3])
def test_after_ctrl_c(fresh_pool, world_size):
    told = fresh_pool.run(interrupt_a_wait)
    expected = (
        rf"^rank 1 had not entered call #3 {CALL} when a signal ended the wait; ranks? 0( and 2)? waited \d.\d s$"
    )
    for rank in (0, 2):
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(told[rank])


# ---- other groups, other backends, other times ----


def go_wrong_in_a_subgroup(device: str) -> tuple | None:
    """Runs on a rank: ranks 1, 2 and 3 of 4 are ranks 0, 1 and 2 of the group."""
    group = dist.new_group([1, 2, 3])
    if dist.get_rank() == 0:
        return None
    sizes = {"max_num_tokens": 64, "dtype": torch.float32, "timeout_s": TIMEOUT_S, "device": device, **SIZES}
    os.environ["TP_FUSED_BACKEND"] = device
    with tp_fused.init(group, **sizes) as made:
        call = call_of("rs_rmsnorm", device)
        if group.rank() != ODD:
            arguments = call.arguments(group.rank(), 3) | {"group": group}
            outcome(settled, made, call.run, group.rank(), 3, arguments)
        else:
            time.sleep(TIMEOUT_S + 0.2)
        told = diagnosed(group=group)
        dist.barrier(group=group)
    return told


@pytest.mark.parametrize("world_size", [4])
def test_subgroup(pool, device, world_size):
    told = pool.run(go_wrong_in_a_subgroup, device)
    for rank in (1, 2, 3):
        with pytest.raises(
            AssertionError, match=rf"^rank 1 never entered call #1 {CALL}; ranks 0 and 2 waited 1\.\d s$"
        ):
            raise AssertionError(told[rank][0].verdict)


def disagree_in_a_subgroup(backend: str) -> str | None:
    """Runs on a rank: ranks 1 and 2 of 3 are ranks 0 and 1 of the group."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    os.environ["TP_FUSED_BACKEND"] = backend
    with tp_fused.init(group, max_num_tokens=8, dtype=torch.float32, timeout_s=5.0, device="cpu", **SIZES):
        rows = torch.ones(4 + group.rank(), 256)
        return str(outcome(tp_fused.reduce_scatter_rows, rows, group)[0])


@pytest.mark.parametrize("world_size", [3])
@pytest.mark.parametrize("of_backend", ["cpu", "reference"])
def test_a_fault_in_a_subgroup_names_global_ranks(pool, of_backend):
    for told in pool.run(disagree_in_a_subgroup, of_backend)[1:]:
        assert told.startswith("reduce_scatter_rows #1: rank ") and "num_tokens=5" in told
        assert told.endswith(" (ranks of a group, whose global ranks are 1, 2)")


def go_wrong_over_torch_distributed() -> list:
    """Runs on a rank: the ranks disagree; in a new workspace one of them dies."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with workspace("reference", **SIZES) as made:
        good_calls(made, "cpu")
        call = call_of("rs_rmsnorm", "cpu", num_tokens=5 if rank == ODD else 4)
        assert isinstance(outcome(call.run, rank, world_size)[0], tp_fused.CollectiveFault)
        disagreed = diagnosed()
    with workspace("reference", **SIZES) as made:
        healthy = diagnosed()
        good_calls(made, "cpu")
        if rank == ODD:
            be_killed(made, "cpu")
        time.sleep(0.5)
        assert isinstance(outcome(call.run, rank, world_size)[0], tp_fused.CollectiveFault)
        return [disagreed, healthy, diagnosed()]


@pytest.mark.parametrize("world_size", [3])
def test_torch_distributed(fresh_pool, world_size):
    outcomes = fresh_pool.outcomes(go_wrong_over_torch_distributed)
    for rank in (0, 2):
        disagreed, healthy, died = (str(diagnosis) for diagnosis, *_ in outcomes[rank])
        assert "rs_rmsnorm #3: rank 1 called rs_rmsnorm(num_tokens=5" in disagreed
        assert healthy == "no rank has met a fault"  # the first workspace's posts are no longer counted
        assert died.startswith(f"rank 1 did not answer; rs_rmsnorm #3: rank {0} did not hear from all peers")


def diagnose_twice(device: str) -> list:
    """Runs on a rank: a fault, a diagnosis, a new workspace, another fault and another diagnosis."""
    rank, world_size, told = dist.get_rank(), dist.get_world_size(), []
    for odd in (1, 0):
        with workspace(device, device, timeout_s=10.0, **SIZES) as made:
            call = call_of("rs_rmsnorm", device, num_tokens=5 if rank == odd else 4)
            outcome(settled, made, call.run, rank, world_size)
            time.sleep(0.3 * rank)  # so that what was posted last time is what is found first
            told.append(diagnosed()[0])
            dist.barrier()
    return told


@pytest.mark.parametrize("world_size", [3])
def test_again_in_a_new_workspace(pool, device, world_size):
    for told in pool.run(diagnose_twice, device):
        assert [diagnosis.culprits for diagnosis in told] == [(1,), (0,)]
        assert all(diagnosis.call_number == 1 for diagnosis in told)


class SilentStore:
    """As of a server that is stopped: no request returns."""

    def set(self, key, value):
        time.sleep(60)


class BrokenStore:
    """As of a server that has died."""

    def set(self, key, value):
        raise dist.DistNetworkError("Broken pipe\nand a stack")


STORES = {"silent": (SilentStore, "it does not answer"), "broken": (BrokenStore, "Broken pipe")}


def diagnose_without_a_store(name: str) -> tuple:
    """Runs on a rank."""
    rank = dist.get_rank()
    with workspace("cpu", timeout_s=10.0, **SIZES) as made:
        call = call_of("rs_rmsnorm", "cpu", num_tokens=5 if rank == ODD else 4)
        outcome(call.run, rank, 2)
        groups = dist.distributed_c10d._world.pg_map
        kept = groups[dist.group.WORLD]
        groups[dist.group.WORLD] = (kept[0], STORES[name][0]())
        try:
            return diagnosed(1.0)
        finally:
            groups[dist.group.WORLD] = kept
            dist.barrier()
            made.close()


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("world_size", [2])
def test_a_store_that_cannot_be_read(fresh_pool, name, world_size):
    """The records of the cpu backend are in shared memory."""
    for diagnosis, seconds, _ in fresh_pool.run(diagnose_without_a_store, name):
        assert seconds < BUSY_S
        assert "call #1: rank 1 called rs_rmsnorm(num_tokens=5" in str(diagnosis)
        assert str(diagnosis).endswith(f"(the group's store cannot be read: {STORES[name][1]})")


def diagnose_in_a_forked_child() -> str:
    """Runs on a rank."""
    with workspace("cpu"):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, repr(outcome(tp_fused.diagnose, timeout_s=0.5)[0]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        dist.barrier()
        return os.read(reader, 1000).decode()


@pytest.mark.parametrize("world_size", [2])
def test_a_forked_child_is_refused(pool, world_size):
    for told in pool.run(diagnose_in_a_forked_child):
        assert told.startswith("ValueError") and "forked" in told


def test_outside_of_a_group():
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="init_process_group"):
        tp_fused.diagnose()
