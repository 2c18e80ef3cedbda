"""A workspace: the symmetric memory of a process group, and which backend serves it."""

import math
import numbers
import os
import threading

import torch
import torch.distributed as dist

from . import backends, checks, faults, lifetime, memory, partition
from .native import _C
from .rendezvous import Meeting

# Whose elements need a scale: torch makes no such tensor over memory that it is given.
_QUANTISED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


class Workspace:
    """What the ranks of a group need to run the ops: made by `tp_fused.init`, used by every op on that group.

    Attributes: `group`, `group_name`, `rank`, `world_size`, `device_type`, `backend` ("cuda", "cpu" or "reference"),
    `reason` (why this backend), `max_num_tokens`, `hidden_size`, `latent_size`, `dtype`, `timeout_s`, `max_ctas`,
    `nbytes` (what this rank has allocated).
    """

    def __init__(self, group, device_type: str, backend: str, reason: str, arguments: dict, meeting: Meeting):
        self.group = group
        self.group_name = group.group_name
        self.rank, self.world_size = group.rank(), group.size()
        self.members: list[int] = dist.get_process_group_ranks(group)  # their global ranks
        self.device_type, self.backend, self.reason = device_type, backend, reason
        self.max_num_tokens: int = arguments["max_num_tokens"]
        self.hidden_size: int = arguments["hidden_size"]
        self.latent_size: int = arguments["latent_size"]
        self.dtype: torch.dtype = arguments["dtype"]
        self.timeout_s: float = arguments["timeout_s"]
        self.max_ctas: int | None = arguments["max_ctas"]
        self.limits: backends.CardLimits | None = arguments.get("limits")
        self.row_bytes: int = arguments["row_bytes"]
        self.device_index = torch.cuda.current_device() if device_type == "cuda" else None
        self.closed, self._end = False, ""
        self.token = ""  # groups.py sets it: the same on all ranks, and no other workspace's
        self.on_close = lambda workspace: None  # groups.py sets it, and then forgets the workspace
        self._pid = os.getpid()
        self.caller = _C.Caller()
        # The reference backend's; the others keep theirs in the region.
        self.calls, self.calling, self.fault = 0, "", None
        self.team = None
        self._symmetric: list = []  # torch's, that the team's addresses point into
        self._memory: dict[str, int] = {}
        if backend == "cpu":
            self._make_cpu_team(meeting)
        elif backend == "cuda":
            self._make_cuda_team(meeting)

    # ---- what the ops ask ----

    def require_open(self) -> None:
        self.require_own_process()
        if self.closed:
            raise ValueError(f"the workspace of group {self.group_name!r} {self._end}")

    def require_own_process(self) -> None:
        if self._pid != os.getpid():
            raise ValueError(
                f"the workspace of group {self.group_name!r} belongs to process {self._pid}, which is its rank "
                f"{self.rank}; this is process {os.getpid()}, forked from it: it is no rank, and must not call ops"
            )

    def require_caller(self) -> None:
        """Raises where this thread is not the one that calls the ops of this workspace."""
        # The native kernel has waited already; only what it has refused comes here.
        if not self.caller.admit(patience_ms=100 if self.backend == "reference" else 0):
            raise ValueError(
                f"the workspace of group {self.group_name!r} is used by thread {self.caller.thread_id}, this is thread "
                f"{threading.get_native_id()}: calls of two threads would come in another order on every rank. Make a "
                f"group and a workspace for each thread, or hand this one over with Workspace.attach_thread()"
            )

    def attach_thread(self) -> None:
        """From here on this thread calls the ops of this workspace, and no other may.

        The first thread that calls an op is the one that may, until it ends: call this to go on in another one. The
        ranks' calls must have one order, so the thread before must have made its last call, on every rank at the same
        place in that order.
        """
        self.require_open()
        self.caller.attach()

    def require_kernel_width(self, hidden_size: int) -> None:
        limit = _C.MAX_HIDDEN_SIZE
        if self.backend != "reference" and hidden_size > limit:
            raise ValueError(f"hidden_size={hidden_size} is over {limit}, the widest row the kernels reduce")

    def check(self) -> None:
        """Raises the `CollectiveFault` that an earlier op on this workspace ran into, if any."""
        self.require_open()
        lifetime.check_retired()
        if self.backend == "reference":
            if self.fault is not None:
                raise self.fault
            return
        record = self.team.fault(self.rank)
        if record["status"]:
            # A rank that gave up because another one had says so: the first cause is that other one's.
            records = [record]
            while records[-1]["status"] == faults.PEER_FAULTED and len(records) < self.world_size:
                records.append(self.team.fault(records[-1]["peer"]))
            raise faults.fault_from(*records, members=self.members)

    def symm_empty(self, *shape: int, dtype: torch.dtype | None = None, device=None) -> torch.Tensor:
        """An uninitialised tensor in symmetric memory. Collective: all ranks call it with the same shape and dtype.

        An op whose input lies in it, at the same place on all ranks, lets the peers read it there instead of staging
        it; from another place on some rank it is a `CollectiveFault`, which numbers the buffers in the order they were
        made in. It lives until the workspace is closed or the last tensor on it is gone, whichever is later. The
        reference backend has no symmetric memory and returns an ordinary tensor. device: none but the workspace's own.

        Waits for the other ranks as long as `tp_fused.init` does, and raises as it does.
        """
        self.require_own_process()
        with Meeting.of(self.group, "symm_empty") as meeting:
            self.require_open()
            return self._symm_empty(meeting, shape, dtype, device)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank has allocated for the workspace, `symm_empty`'s included: the sum of `memory()`."""
        return sum(self._memory.values())

    def memory(self) -> dict[str, int]:
        """Bytes of every part that this rank has allocated: "control", "signals", "staging slots", "inboxes" (cuda),
        "symmetric buffers" (`symm_empty`'s) and, in pinned host memory, "mailbox" (cuda).

        Empty for the reference backend, and once the workspace is closed, unless a CUDA graph keeps the memory (see
        `close`). On cuda each allocation is rounded up to the granularity of the card's mappings (2 MiB), which is not
        counted here.
        """
        return dict(self._memory)

    def _symm_empty(self, meeting: Meeting, shape, dtype, device) -> torch.Tensor:
        dtype = self.dtype if dtype is None else dtype
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        sizes = [int(size) if isinstance(size, numbers.Integral) else size for size in shape]
        request = (tuple(map(checks.exchangeable, sizes)), checks.exchangeable(dtype))
        # Exchanged before any of them is judged: a rank that raised alone would leave the others waiting.
        requests = meeting.gather((request, self._elsewhere(device)), "call symm_empty")
        for rank, (request, elsewhere) in enumerate(requests):
            if elsewhere is not None:
                raise ValueError(f"symm_empty: rank {rank} asked for memory on {elsewhere}")
            if request != requests[0][0]:
                raise ValueError(f"symm_empty: rank {rank} asked for {request}, rank 0 for {requests[0][0]}")
        shape, dtype = request
        for size in shape:
            checks.count("symm_empty: a size", size, most=2**63 - 1)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"symm_empty: dtype must be a torch.dtype, got {dtype!r}")
        if dtype in _QUANTISED:
            raise TypeError(f"symm_empty: there is no symmetric memory of {dtype}, whose elements need a scale, too")
        numel = math.prod(shape)  # torch.Size.numel() wraps at 2^63
        if numel * dtype.itemsize * self.world_size >= 2**63:
            raise MemoryError(f"symm_empty: {shape} of {dtype} are {numel * dtype.itemsize} bytes a rank")
        if self.backend == "reference" or numel == 0:
            return torch.empty(shape, dtype=dtype, device=self.device_type)
        if self.backend == "cuda":
            tensor, bases = self._symmetric_memory(meeting, numel * dtype.itemsize)
            self.team.add_symmetric_buffer(bases, numel * dtype.itemsize)
            self._memory["symmetric buffers"] += numel * dtype.itemsize
            return tensor.view(dtype).view(shape)
        stride = -(-numel * dtype.itemsize // 4096) * 4096
        segment = memory.shared_segment(meeting, stride)
        self._memory["symmetric buffers"] += stride
        self.team.keep(segment)
        self.team.add_symmetric_buffer([segment.base + r * stride for r in range(self.world_size)], stride)
        return torch.frombuffer(segment, dtype=dtype, count=numel, offset=self.rank * stride).view(shape)

    def _elsewhere(self, device) -> str | None:
        """How a device that is asked for is not the workspace's."""
        own = self.device_type if self.device_index is None else f"{self.device_type}:{self.device_index}"
        try:
            asked = checks.device(own if device is None else device)
        except (TypeError, ValueError) as error:
            return f"{checks.described(device)}: {error}"
        if asked.type == self.device_type and asked.index in (None, self.device_index or 0):
            return None
        return f"{asked}, its workspace is on {own}"

    def close(self) -> None:
        """Gives the memory back. Peers that still wait for this rank raise `CollectiveFault`.

        Where a CUDA graph has captured a call of this workspace, the memory stays for the life of the process: a later
        replay leaves NaN, and `check` of the workspace that the process has then raises `CollectiveFault`.
        """
        self.close_as("is closed; call tp_fused.init(...) on all ranks")

    def close_as(self, end: str) -> None:
        """The same; whoever uses the workspace later is told `end`."""
        if self.closed:
            return
        self.closed, self._end = True, end
        captured = False
        if self.team is not None and self._pid == os.getpid():  # a forked child's end is not this rank's
            captured = self.backend == "cuda" and getattr(self.team, "captured", bool)()
            self.team.close()
        if captured:
            lifetime.retire(self.group_name, self.rank, self.team, self._mailbox, self._symmetric)
        else:
            self._memory.clear()
        self._symmetric.clear()
        self.team = None
        self.on_close(self)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __repr__(self) -> str:
        return (
            f"Workspace({self.group_name!r}, rank {self.rank}/{self.world_size}, backend={self.backend!r}, "
            f"max_num_tokens={self.max_num_tokens}, hidden_size={self.hidden_size}, dtype={self.dtype})"
        )

    # ---- making ----

    @property
    def slot_bytes(self) -> int:
        """A slot holds as many rows from every rank as the rank with most rows owns."""
        rows = self.world_size * partition.row_count(self.max_num_tokens, 0, self.world_size)
        checks.addressable(rows * self.row_bytes, self)
        return -(-rows * self.row_bytes // 4096) * 4096

    def _make_cpu_team(self, meeting: Meeting) -> None:
        slot_bytes = self.slot_bytes
        self._memory = memory.region_parts(slot_bytes)
        region = self.nbytes
        segment = memory.shared_segment(meeting, region)
        held = all(meeting.gather(segment.hold(self.rank), "get as far as mapping the shared memory"))
        self.team = _C.Team(
            rank=self.rank,
            regions=[segment.base + rank * region for rank in range(self.world_size)],
            slot_bytes=slot_bytes,
            timeout_ns=int(self.timeout_s * 1e9),
            max_ctas=self.max_ctas or 0,
            liveness_fd=segment.fd if held else -1,
        )
        self.team.keep(segment)

    def _make_cuda_team(self, meeting: Meeting) -> None:
        slot_bytes = self.slot_bytes
        self._memory = memory.region_parts(slot_bytes, on_cuda=True)
        region, regions = self._symmetric_memory(meeting, self.nbytes)
        region.zero_()
        self._mailbox = torch.zeros(_C.FAULT_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._memory["mailbox"] = _C.FAULT_BYTES
        torch.cuda.synchronize()
        self.team = _C.Team(
            rank=self.rank,
            regions=regions,
            slot_bytes=slot_bytes,
            timeout_ns=int(self.timeout_s * 1e9),
            max_ctas=self.max_ctas or 0,
            device=torch.cuda.current_device(),
            mailbox=self._mailbox.data_ptr(),
            free_sms=self.limits.free_sms,
            free_cluster_sms=self.limits.free_cluster_sms,
        )
        # Nobody signals into a region that is not zeroed yet.
        meeting.gather(None, "get as far as clearing its memory")

    def _symmetric_memory(self, meeting: Meeting, num_bytes: int) -> tuple[torch.Tensor, list[int]]:
        """torch's symmetric memory: this rank's tensor of bytes, and where every rank's is mapped here."""
        tensor, handle = memory.symmetric(meeting, num_bytes, torch.device(f"cuda:{self.device_index}"))
        self._symmetric.append((tensor, handle))
        return tensor, list(handle.buffer_ptrs)
