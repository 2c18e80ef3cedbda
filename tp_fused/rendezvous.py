"""How ranks meet on the host when memory is made: over the store of their process group, and every wait has a deadline.

An *exchange* gives every rank a value of all ranks. The exchanges of a group are numbered; each rank counts them in the
store, so that a group made again over the same store counts on, and so do ranks that are threads. In exchange n

1. rank r sets `n/r` and waits for the keys of all ranks;
2. a rank that has seen them all proposes "done" as `n/outcome`, a rank that gives up (the deadline, an exception)
   proposes why. The store takes the first proposal (compare_set) and all ranks abide by it: either every rank gets all
   values, or every rank raises.

So all ranks agree on the number that comes next, whatever has failed. A rank that comes after the others gave up finds
failed outcomes, and goes on to the first exchange that has none: where a rank waits in it already, it takes part;
otherwise it raises what the others raised. When exchange n is done, every rank has read exchange n - 1, whose keys are
deleted.
"""

# torch's stub of Store knows neither bytes nor timeouts.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

import contextlib
import itertools
import json
import os
import pickle
import socket
import struct
import time

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    _register_process_group,
    _SymmetricMemory,
    _unregister_process_group,
)
from torch.distributed import distributed_c10d

from .faults import CollectiveFault

_DONE = "done"
_ABSENT = "tp_fused: there is no such key"
_LONGEST_PAUSE_S = 0.01  # between two looks at the store

# torch 2.10 looks for a group's store in a table of its own, to which entries can only be added.
_TORCH_HAS_GROUP_TABLE = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11)
_table: list[dist.Store] = []
_rendezvous_numbers = itertools.count()


class Meeting:
    """One collective call on the host, such as `init` or `symm_empty`, a context manager around its exchanges.

    What leaves it by an exception is told to the ranks that wait, or will wait, for this one: they raise at once.
    Nothing that can fail on one rank alone may follow the last exchange.
    """

    def __init__(self, what: str, store: dist.Store, group_name: str, rank: int, world_size: int, timeout_s: float):
        self.what, self.group_name, self.rank, self.world_size = what, group_name, rank, world_size
        self.timeout_s = timeout_s
        self._store = store
        self._number = 0  # of the exchange that is on, or was the last; 0 before the first
        self._open = False  # whether it has no outcome yet
        self._failed = False  # the other ranks know
        self._torch_keys: list[str] = []

    @classmethod
    def of(cls, group: dist.ProcessGroup, what: str) -> "Meeting":
        try:
            store = distributed_c10d._get_process_group_store(group)
        except KeyError:
            raise ValueError(
                f"{what}: the process group {group.group_name!r} was destroyed; call tp_fused.init on the new one"
            ) from None
        # Subgroups of other ranks may have the same name, and the same store.
        ranks = "_".join(map(str, dist.get_process_group_ranks(group)))
        prefixed = dist.PrefixStore(f"tp_fused/{ranks}", store)
        return cls(what, prefixed, group.group_name, group.rank(), group.size(), _timeout_s(group, store))

    def gather(self, value, step: str) -> list:
        """The values of all ranks. step: what a rank that does not come "did not" do: "call init", "get as far as...".

        Raises CollectiveFault on every rank when one does not come within `timeout_s`, or has given up.
        """
        self._begin()
        self._store.set(self._key(self.rank), pickle.dumps((self.what, step, value)))
        return self._finish(step)

    def rendezvous(self, tensor: torch.Tensor):
        """torch's handle of symmetric memory, once all ranks have mapped each other's `tensor`.

        torch up to 2.13 numbers the exchanges of a rendezvous by process: ranks with other rendezvous behind them wait
        for each other's keys for ever. So it gets a group of our own, with a store that numbers them anew.
        """
        step = "get as far as mapping the peers' memory"
        self._begin()
        name = f"tp_fused/{self.group_name}/{next(_rendezvous_numbers)}"
        store = TorchStore(self, step)
        group = dist.ProcessGroup(store, self.rank, self.world_size)  # found by its name; has no backend and needs none
        _register_process_group(name, group)
        try:
            if _TORCH_HAS_GROUP_TABLE:
                _table.append(store)
                _SymmetricMemory.set_group_info(name, self.rank, self.world_size, store)
            handle = _SymmetricMemory.rendezvous(tensor, name)
        except RuntimeError as error:
            if "receive fd" not in str(error):
                raise
            raise RuntimeError(
                f"{self.what}: a rank of group {self.group_name!r} stopped while torch passed its memory to the peers; "
                f"rank {self.rank} waited {self.timeout_s:.3g} s"
            ) from error
        finally:
            _unregister_process_group(name)
        self._store.set(self._key(self.rank), pickle.dumps((self.what, step, None)))
        self._finish(step)
        return handle

    def wait_for(self, ranks_by_key: dict[str, int | None], step: str) -> None:
        """Returns when the store has these keys of the exchange that is on; raises CollectiveFault as `gather` does."""
        deadline, pause = time.monotonic() + self.timeout_s, 1e-4
        while not self._store.check(list(ranks_by_key)):
            failure = self._failure(self._number)
            if failure is None and time.monotonic() > deadline:
                failure = self._give_up(ranks_by_key, step)
            if failure is not None:
                raise self._fault(failure)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def read(self, key: str) -> bytes | None:
        """The value of a key; None where there is none, for which `get` would wait."""
        value = self._store.compare_set(key, _ABSENT, _ABSENT)
        return None if value == _ABSENT.encode() else value

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or self._failed:
            return
        self._failed = True
        if isinstance(error, dist.DistError):
            raise RuntimeError(
                f"{self.what}: the store of group {self.group_name!r} cannot be reached; the process that serves it, "
                f"often that of rank 0, may have ended: {error}"
            ) from error
        told = f"rank {self.rank} gave up: {kind.__name__}: {error}"
        with contextlib.suppress(Exception):  # the store may be what has failed
            if not self._open:
                self._number = self._count(1)
            self._settle(json.dumps({"told": told, "by": self.rank, "peer": self.rank, "reason": "gave up"}))
            self._delete_own_keys()

    # ---- an exchange ----

    def _key(self, name) -> str:
        return f"{self._number}/{name}"

    def _count(self, exchanges: int) -> int:
        return self._store.add(f"count/{self.rank}", exchanges)

    def _begin(self) -> None:
        first, self._number = self._number == 0, self._count(1)
        self._open = True
        if first:
            self._catch_up()

    def _catch_up(self) -> None:
        """Goes on to the first exchange without outcome, where the others have given up some."""
        number, failure = self._number, None
        while (failed := self._failure(number)) is not None:
            number, failure = number + 1, failed
        if failure is None:
            return
        waits = any(self._store.check([f"{number}/{rank}"]) for rank in range(self.world_size))
        self._number = self._count(number - (0 if waits else 1) - self._number)
        if not waits:
            raise self._fault(failure, late=True)

    def _finish(self, step: str) -> list:
        keys = {self._key(rank): rank for rank in range(self.world_size)}
        self.wait_for(keys, step)
        outcome = self._settle(_DONE)
        if outcome != _DONE:
            raise self._fault(json.loads(outcome))
        self._open = False
        values = [pickle.loads(self._store.get(key)) for key in keys]
        self._delete_past()
        for rank, (what, own_step, _) in enumerate(values):
            if (what, own_step) != values[0][:2]:
                raise ValueError(
                    f"rank {rank} of group {self.group_name!r} called {what}, rank 0 called {values[0][0]}: all ranks "
                    "make the same calls in the same order"
                )
        return [value for _, _, value in values]

    def _settle(self, outcome: str) -> str:
        """The outcome of the exchange: this one, unless another rank was first."""
        return self._store.compare_set(self._key("outcome"), "", outcome).decode()

    def _failure(self, number: int) -> dict | None:
        """Why an exchange was given up, if it was."""
        outcome = self.read(f"{number}/outcome")
        return None if outcome in (None, _DONE.encode()) else json.loads(outcome)

    def _give_up(self, ranks_by_key: dict[str, int | None], step: str) -> dict | None:
        """After the deadline; None where all have come after all."""
        missing = [rank for key, rank in ranks_by_key.items() if not self._store.check([key])]
        if not missing:
            return None
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of group {self.group_name!r}"
        told = f"{who} did not {step} within {self.timeout_s:.3g} s"
        failure = {"told": told, "by": self.rank, "peer": missing[0], "reason": "never arrived"}
        outcome = self._settle(json.dumps(failure))
        return None if outcome == _DONE else json.loads(outcome)

    def _fault(self, failure: dict, late: bool = False) -> CollectiveFault:
        self._failed, self._open = True, False
        self._delete_own_keys()
        before = ""
        if late and failure["peer"] != failure["by"]:
            before = f"rank {failure['by']} had given up before this rank came: "
        message = f"{self.what}: {before}{failure['told']}; call {self.what} again on all ranks"
        op = self.what.removeprefix("tp_fused.")
        return CollectiveFault(message, op, self._number, self.rank, failure["peer"], failure["reason"])

    def _delete_own_keys(self) -> None:
        self._delete(self._key(self.rank), *self._torch_keys)
        self._torch_keys.clear()

    def _delete_past(self) -> None:
        """Once an exchange is done: all ranks have read the one before, and left the failed ones before that."""
        self._delete(f"{self._number - 1}/{self.rank}", *self._torch_keys)
        self._torch_keys.clear()
        number = self._number - 1
        while self.rank == 0 and number > 0 and self._store.check([f"{number}/outcome"]):
            if not self._delete(f"{number}/outcome"):
                return
            number -= 1

    def _delete(self, *keys: str) -> bool:
        """False where the store knows no deletion: then a few words an exchange stay in it."""
        try:
            for key in keys:
                self._store.delete_key(key)
        except (RuntimeError, NotImplementedError):
            return False
        return True


class TorchStore(dist.Store):
    """The store that torch's rendezvous of symmetric memory gets: the keys of one exchange of a `Meeting`.

    torch's keys end in the rank that sets them. What comes before holds a number that may differ between ranks, and is
    replaced by its place in the order of first use, which is the same on all of them.
    """

    def __init__(self, meeting: Meeting, step: str):
        super().__init__()
        self._meeting, self._step = meeting, step
        self._places: dict[str, int] = {}

    def set(self, key: str, value: bytes) -> None:
        _bound_torch_receive(self._meeting.timeout_s)
        own, _ = self._own(key)
        self._meeting._torch_keys.append(own)
        self._meeting._store.set(own, value)

    def get(self, key: str) -> bytes:
        while (value := self._meeting.read(self._own(key)[0])) is None:  # a rank that gives up deletes its keys
            self.wait([key])
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def wait(self, keys: list[str], timeout=None) -> None:
        self._meeting.wait_for(dict(self._own(key) for key in keys), self._step)

    def check(self, keys: list[str]) -> bool:
        return self._meeting._store.check([self._own(key)[0] for key in keys])

    def _own(self, key: str) -> tuple[str, int | None]:
        """The key in the meeting's store, and the rank that sets it."""
        name, _, rank = key.rpartition("/")
        if not rank.isdecimal() or int(rank) >= self._meeting.world_size:
            name, rank = key, ""
        place = self._places.setdefault(name, len(self._places))
        return self._meeting._key(f"torch/{place}/{rank}"), int(rank) if rank else None


def _timeout_s(group: dist.ProcessGroup, store: dist.Store) -> float:
    """What the user gave init_process_group or new_group; the store's own where the backend does not tell."""
    times = []
    for device in group._device_types:
        with contextlib.suppress(RuntimeError, AttributeError):
            times.append(group._get_backend(device).options._timeout)
    return min(times, default=store.timeout).total_seconds()


def _bound_torch_receive(timeout_s: float) -> None:
    """Gives torch's socket, over which a rendezvous passes file descriptors and waits for ever, a deadline.

    It is bound to `symm_mem-<pid>` when torch first uses the store. No other socket is touched.
    """
    with open("/proc/net/unix") as table:
        rows = [line.split() for line in table]
    inodes = {row[6] for row in rows if len(row) == 8 and row[7].endswith(f"/symm_mem-{os.getpid()}")}
    for fd in os.listdir("/proc/self/fd") if inodes else ():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:").strip("[]") not in inodes:
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, fileno=os.dup(int(fd))) as found:
                found.setblocking(True)  # whatever socket.setdefaulttimeout says
                limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
                found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
