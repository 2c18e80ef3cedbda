"""How ranks meet over a store: exchanges, deadlines, and the store that torch's symmetric memory gets.

Ranks are threads.
"""

import concurrent.futures
import os
import socket
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from ranks import BUSY_S

from tp_fused import rendezvous
from tp_fused.faults import CollectiveFault
from tp_fused.rendezvous import Meeting, TorchStore

SHORT_S = 0.5
STORES = {
    "hash": dist.HashStore,
    "file": lambda: dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), -1),
    "tcp": lambda: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
}


@pytest.fixture(params=STORES)
def store(request):
    return STORES[request.param]()


class Ranks:
    """Three ranks of one group: threads, each with meetings of its own over one store."""

    def __init__(self, store, timeout_s: float = 20.0, world_size: int = 3):
        self.store, self.timeout_s, self.world_size = store, timeout_s, world_size

    def meeting(self, rank: int, what: str = "tp_fused.init") -> Meeting:
        return Meeting(what, self.store, "0", rank, self.world_size, self.timeout_s)

    def run(self, function, *ranks: int) -> list:
        """What function(rank) returns or raises, and after how many seconds, on these ranks or on all."""

        def timed(rank: int) -> tuple:
            begin = time.monotonic()
            try:
                result = function(rank)
            except Exception as error:
                result = error
            return result, time.monotonic() - begin

        with concurrent.futures.ThreadPoolExecutor(self.world_size) as executor:
            return list(executor.map(timed, ranks or range(self.world_size)))

    def call(self, rank: int, exchanges: int = 3) -> list:
        """One collective call."""
        with self.meeting(rank) as meeting:
            values = [meeting.gather((rank, i), "call init") for i in range(exchanges)]
        assert values == [[(peer, i) for peer in range(self.world_size)] for i in range(exchanges)]
        return values[0]

    def call_all(self) -> None:
        for result, _ in self.run(self.call):
            assert result == [(rank, 0) for rank in range(self.world_size)]


def test_all_ranks_get_the_values_of_all(store):
    ranks = Ranks(store)
    for _ in range(5):
        ranks.call_all()


def test_the_store_does_not_grow():
    ranks = Ranks(dist.HashStore())
    ranks.call_all()
    before = ranks.store.num_keys()
    for _ in range(10):
        ranks.call_all()
    assert ranks.store.num_keys() == before


def test_a_rank_that_does_not_come_is_named_and_hears_it_when_it_comes(store):
    ranks = Ranks(store, SHORT_S)
    told = "rank 2 of group '0' did not call init within 0.5 s; call tp_fused.init again on all ranks"
    results = ranks.run(ranks.call, 0, 1)
    for error, _ in results:
        assert isinstance(error, CollectiveFault) and str(error) == f"tp_fused.init: {told}"
        assert (error.op, error.peer, error.reason) == ("init", 2, "never arrived")
    # The rank that called first gives up first, and tells the other.
    assert SHORT_S <= max(seconds for _, seconds in results) < SHORT_S + BUSY_S
    [(error, _)] = ranks.run(ranks.call, 2)
    assert isinstance(error, CollectiveFault)
    assert str(error) in [f"tp_fused.init: rank {r} had given up before this rank came: {told}" for r in (0, 1)]
    ranks.call_all()


def test_two_ranks_that_do_not_come_are_both_named():
    ranks = Ranks(dist.HashStore(), SHORT_S)
    [(error, _)] = ranks.run(ranks.call, 1)
    assert "ranks 0, 2 of group '0' did not call init within 0.5 s" in str(error)
    assert error.peer == 0
    for error, _ in ranks.run(ranks.call, 0, 2):
        assert isinstance(error, CollectiveFault) and "had given up before this rank came" in str(error)
    ranks.call_all()


@pytest.mark.parametrize("failures", [1, 3])
def test_a_late_rank_joins_those_who_called_again(store, failures):
    ranks = Ranks(store, 0.1)
    for _ in range(failures):
        for error, _ in ranks.run(ranks.call, 0, 1):
            assert isinstance(error, CollectiveFault)
    ranks.timeout_s = 20.0

    def call(rank: int):
        if rank == 2:
            time.sleep(0.3)
        return ranks.call(rank)

    for result, _ in ranks.run(call):
        assert result == [(0, 0), (1, 0), (2, 0)]
    ranks.call_all()


def test_a_late_rank_that_nobody_waits_for_needs_one_call_to_catch_up():
    ranks = Ranks(dist.HashStore(), SHORT_S)
    for _ in range(3):
        ranks.run(ranks.call, 0, 1)
    [(error, _)] = ranks.run(ranks.call, 2)
    assert "had given up before this rank came: rank 2 of group '0' did not call init" in str(error)
    ranks.call_all()
    assert ranks.store.num_keys() == len(["count", "value"]) * ranks.world_size + len(["outcome"])


def test_a_rank_that_stops_midway_is_named(store):
    ranks = Ranks(store, SHORT_S)

    def call(rank: int):
        with ranks.meeting(rank) as meeting:
            meeting.gather(None, "call init")
            if rank != 1:
                meeting.gather(None, "get as far as mapping the shared memory")

    (error, _), (stopped, _), (other, _) = ranks.run(call)
    assert stopped is None
    for seen in (error, other):
        assert "rank 1 of group '0' did not get as far as mapping the shared memory within 0.5 s" in str(seen)
    assert isinstance(ranks.run(ranks.call, 1)[0][0], CollectiveFault)
    ranks.call_all()


@pytest.mark.parametrize("when", ["before the first exchange", "between two exchanges"])
def test_a_rank_that_raises_tells_the_others_at_once(store, when):
    ranks = Ranks(store)

    def call(rank: int):
        with ranks.meeting(rank) as meeting:
            if when == "between two exchanges":
                meeting.gather(None, "call init")
            if rank == 1:
                raise MemoryError("no room on this card")
            meeting.gather(None, "get as far as mapping the shared memory")

    results = ranks.run(call)
    assert isinstance(results[1][0], MemoryError)
    for rank in (0, 2):
        error, seconds = results[rank]
        assert isinstance(error, CollectiveFault) and error.peer == 1 and error.reason == "gave up"
        assert "rank 1 gave up: MemoryError: no room on this card" in str(error)
        assert seconds < BUSY_S
    ranks.call_all()


def test_calls_that_differ_are_named():
    ranks = Ranks(dist.HashStore())

    def call(rank: int):
        with ranks.meeting(rank, "symm_empty" if rank == 2 else "tp_fused.init") as meeting:
            meeting.gather(None, "call it")

    for error, _ in ranks.run(call):
        assert isinstance(error, ValueError)
        assert "rank 2 of group '0' called symm_empty, rank 0 called tp_fused.init: all ranks make" in str(error)
    ranks.call_all()


def test_no_rank_gets_values_of_an_exchange_that_another_has_given_up():
    """Whether the last rank comes just before or just after the others' deadline: all have the values, or none has."""
    outcomes = set()
    for attempt in range(40):
        ranks = Ranks(dist.HashStore(), timeout_s=0.02)

        def call(rank: int, ranks=ranks, attempt=attempt):
            if rank == 2:
                time.sleep(attempt * 0.001)
            with ranks.meeting(rank) as meeting:
                return meeting.gather(rank, "call init")

        failed = {isinstance(result, CollectiveFault) for result, _ in ranks.run(call)}
        assert len(failed) == 1
        outcomes |= failed
        ranks.timeout_s = 20.0
        ranks.call_all()
    assert outcomes == {True, False}  # the delays reach from one side of the deadline to the other


# ---- torch's store ----


def torch_all_gather(store: dist.Store, rank: int, world_size: int, number: int, value: bytes) -> list[bytes]:
    """As torch does it in C++: `number` is counted by the process."""
    store.set(f"CUDASymmetricMemory/{number}/{rank}", value)
    others = []
    for peer in range(world_size):
        key = f"CUDASymmetricMemory/{number}/{peer}"
        if peer != rank:
            store.wait([key])
        others.append(store.get(key))
    return others


class Torch:
    """Stands for torch's C++: finds a group's store by its name, and numbers exchanges by process (here, by thread)."""

    def __init__(self, world_size: int):
        self.numbers = [7 * rank for rank in range(world_size)]  # other histories
        self.stopped: int | None = None  # a rank that raises before its second exchange

    def rendezvous(self, rank: int, name: str) -> list:
        group = dist.distributed_c10d._resolve_process_group(name)
        assert group.rank() == rank
        store, seen = group.get_group_store(), []
        for i in range(3):
            if i == 1 and rank == self.stopped:
                raise RuntimeError("CUDA driver error: out of memory")
            number = self.numbers[rank]
            self.numbers[rank] += 1
            seen.append(torch_all_gather(store, rank, group.size(), number, bytes([255, 0, rank, i])))
        return seen


@pytest.fixture
def fake_torch(monkeypatch):
    fake = Torch(3)

    class SymmetricMemory:
        @staticmethod
        def rendezvous(tensor, name):
            return fake.rendezvous(int(tensor), name)

    monkeypatch.setattr(rendezvous, "_SymmetricMemory", SymmetricMemory)
    monkeypatch.setattr(rendezvous, "_TORCH_HAS_GROUP_TABLE", False)
    return fake


def rendezvous_of(ranks: Ranks, rank: int):
    with ranks.meeting(rank) as meeting:
        meeting.gather(None, "call init")
        return meeting.rendezvous(torch.tensor(rank))


def test_ranks_with_other_histories_find_each_other(store, fake_torch):
    ranks = Ranks(store)
    for _ in range(3):
        for result, _ in ranks.run(lambda rank: rendezvous_of(ranks, rank)):
            assert result == [[bytes([255, 0, rank, i]) for rank in range(3)] for i in range(3)]
        fake_torch.numbers[1] += 5  # an engine's own rendezvous
    ranks.call_all()


def test_the_store_keeps_nothing_of_a_rendezvous(fake_torch):
    ranks = Ranks(dist.HashStore())
    ranks.call_all()
    before = ranks.store.num_keys()
    ranks.run(lambda rank: rendezvous_of(ranks, rank))
    assert ranks.store.num_keys() == before


def test_a_rank_that_is_missing_from_the_rendezvous_is_named(store, fake_torch):
    ranks = Ranks(store, SHORT_S)

    def call(rank: int):
        with ranks.meeting(rank) as meeting:
            meeting.gather(None, "call init")
            if rank != 1:
                meeting.rendezvous(torch.tensor(rank))

    results = ranks.run(call)
    for rank in (0, 2):
        error, seconds = results[rank]
        assert isinstance(error, CollectiveFault) and error.peer == 1
        assert "rank 1 of group '0' did not get as far as mapping the peers' memory within 0.5 s" in str(error)
        assert seconds < SHORT_S + BUSY_S
    assert isinstance(ranks.run(ranks.call, 1)[0][0], CollectiveFault)
    ranks.call_all()


def test_a_rank_that_torch_fails_on_tells_the_others(store, fake_torch):
    ranks, fake_torch.stopped = Ranks(store), 2
    results = ranks.run(lambda rank: rendezvous_of(ranks, rank))
    assert type(results[2][0]) is RuntimeError
    for error, seconds in results[:2]:
        assert isinstance(error, CollectiveFault) and seconds < BUSY_S
        assert "rank 2 gave up: RuntimeError: CUDA driver error: out of memory" in str(error)
    fake_torch.stopped = None
    for result, _ in ranks.run(lambda rank: rendezvous_of(ranks, rank)):
        assert len(result) == 3


def test_what_torch_may_ask_of_the_store():
    """Through C++: a PrefixStore hands on what it is asked."""
    with Ranks(dist.HashStore(), world_size=1).meeting(0) as meeting:
        meeting.gather(None, "call init")
        own = TorchStore(meeting, "come")
        store = dist.PrefixStore("", own)
        store.set("name/3/0", b"\xff\x00")
        assert store.check(["name/3/0"]) and not store.check(["name/4/0"])
        assert store.get("name/3/0") == b"\xff\x00"
        assert store.multi_get(["name/3/0"]) == [b"\xff\x00"]
        store.set("other", "words")
        assert store.get("other") == b"words"
        assert {key.split("/", 1)[1] for key in meeting._torch_keys} == {"torch/0/0", "torch/2/"}


def test_the_socket_of_a_rendezvous_gets_a_deadline(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound, socket.socketpair()[0] as other:
        bound.bind(str(tmp_path / f"symm_mem-{os.getpid()}"))
        rendezvous._bound_torch_receive(0.2)
        begin = time.monotonic()
        with pytest.raises(BlockingIOError):
            bound.recv(1)
        assert 0.1 < time.monotonic() - begin < BUSY_S
        assert other.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)
