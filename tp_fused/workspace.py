"""The symmetric memory of a process group, and which backend serves it."""

import atexit
import math
import os
import threading

import torch
import torch.distributed as dist
from torch.compiler import is_compiling

from . import backends, checks, compiled, faults, lifetime, memory, partition
from .native import _C
from .rendezvous import Meeting

_workspaces: dict[tuple[str, str], "Workspace"] = {}
_SIZES = ("max_num_tokens", "hidden_size", "latent_size", "row_bytes")
_END_OF_GROUP = "is closed: its process group was destroyed; call tp_fused.init on the new one"
_groups: dict[str, dist.ProcessGroup] = {}  # whose workspaces these are
_ended: dict[tuple[str, str], str] = {}  # what became of workspaces that no later one stands for


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
        self.device_type, self.backend, self.reason = device_type, backend, reason
        self.max_num_tokens: int = arguments["max_num_tokens"]
        self.hidden_size: int = arguments["hidden_size"]
        self.latent_size: int = arguments["latent_size"]
        self.dtype: torch.dtype = arguments["dtype"]
        self.timeout_s: float = arguments["timeout_s"]
        self.max_ctas: int | None = arguments["max_ctas"]
        self.share: backends.CardShare | None = arguments.get("share")
        self.row_bytes: int = arguments["row_bytes"]
        self.device_index = torch.cuda.current_device() if device_type == "cuda" else None
        self.closed, self._end = False, ""
        self._pid = os.getpid()
        self.caller = _C.Caller()
        self.calls, self.fault = 0, None  # the reference backend's; the others keep theirs in the region
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
            raise faults.fault_from(*records)

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
        dtype = dtype or self.dtype
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        index = torch.device(device).index if device is not None else None
        elsewhere = None
        if self.device_type == "cuda" and index not in (None, self.device_index):
            elsewhere = f"{device}, its workspace is on cuda:{self.device_index}"
        # Exchanged before any of them is judged: a rank that raised alone would leave the others waiting.
        requests = meeting.gather(((shape, dtype), elsewhere), "call symm_empty")
        for rank, (request, elsewhere) in enumerate(requests):
            if elsewhere is not None:
                raise ValueError(f"symm_empty: rank {rank} asked for memory on {elsewhere}")
            if request != requests[0][0]:
                raise ValueError(f"symm_empty: rank {rank} asked for {request}, rank 0 for {requests[0][0]}")
        if any(size < 0 for size in shape):
            raise ValueError(f"symm_empty: sizes must not be negative, got {shape}")
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

    def close(self) -> None:
        """Gives the memory back. Peers that still wait for this rank raise `CollectiveFault`.

        Where a CUDA graph has captured a call of this workspace, the memory stays for the life of the process: a later
        replay leaves NaN, and `check` of the workspace that the process has then raises `CollectiveFault`.
        """
        self._close("is closed; call tp_fused.init(...) on all ranks")

    def _close(self, end: str) -> None:
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
        key = (self.group_name, self.device_type)
        if _workspaces.get(key) is self:
            del _workspaces[key]
            compiled.remove_workspace(compiled.pin(self.group_name, self.rank, self.world_size))

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
        self._mailbox = torch.zeros(_C.FAULT_BYTES, dtype=torch.uint8, pin_memory=True)
        self._memory["mailbox"] = _C.FAULT_BYTES
        torch.cuda.synchronize()
        self.team = _C.Team(
            rank=self.rank,
            regions=regions,
            slot_bytes=slot_bytes,
            timeout_ns=int(self.timeout_s * 1e9),
            max_ctas=self.max_ctas,
            device=self.device_index,
            mailbox=self._mailbox.data_ptr(),
            free_sms=self.share.free_sms,
        )
        # Nobody signals into a region that is not zeroed yet.
        meeting.gather(None, "get as far as clearing its memory")

    def _symmetric_memory(self, meeting: Meeting, num_bytes: int) -> tuple[torch.Tensor, list[int]]:
        """torch's symmetric memory: this rank's tensor of bytes, and where every rank's is mapped here."""
        tensor, handle = memory.symmetric(meeting, num_bytes, torch.device("cuda", self.device_index))
        self._symmetric.append((tensor, handle))
        return tensor, list(handle.buffer_ptrs)


def init(
    group: dist.ProcessGroup | None = None,
    *,
    max_num_tokens: int,
    hidden_size: int,
    latent_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    timeout_s: float = 30.0,
    max_ctas: int | None = None,
    device: str | torch.device | None = None,
) -> Workspace:
    """Makes the workspace of a group. Collective: every rank calls it once, with the same arguments, outside of graph
    capture and of `forward`.

    max_num_tokens: the largest token count of any later call. hidden_size: columns of the reduced rows.
    latent_size: columns of a projection's output (default: hidden_size). dtype: of the widest rows.
    timeout_s: how long an op waits for a peer before it raises `CollectiveFault`; the reference backend waits as long
    as the process group does. max_ctas: bounds the grid of every CUDA kernel. Where ranks share a card, their blocks
    have to fit on it together, and the default also leaves room for the thread block clusters of other kernels, such as
    cuBLAS's: a kernel that finds none while peers wait for it ends in a fault. More blocks are for a group whose
    calls have the cards to themselves. A group of some of the ranks, whose workspace is made after that of all of
    them, takes the others on its cards into account.
    device: "cpu" or "cuda", which is torch's current one (default: cuda where torch sees one).

    The backend is chosen from what all ranks report, the same everywhere: when all ranks run on one host, `cuda`
    (torch's symmetric memory; the build has to have code for their cards, and these peer access) or `cpu` (shared
    memory); otherwise `reference` (torch.distributed).
    TP_FUSED_BACKEND=cpu|cuda|reference asks for one; if it cannot run, this raises.

    A workspace that the group has open is closed and replaced by one that fits both: it takes the larger of the old and
    the new max_num_tokens, hidden_size, latent_size and bytes of a row, so that two models can share a group. For a
    smaller one, close the old one first. `destroy_process_group` closes the workspaces of its group.

    Raises ValueError on every rank when an argument is out of range or differs between ranks, and names the rank and
    the argument; MemoryError when /dev/shm is too small; CollectiveFault on every rank when a rank does not come, or
    gives up, and names it. Each wait lasts as long as the group's own timeout, which init_process_group or new_group
    was given; nothing is left behind, and init can be called again on all ranks.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("tp_fused.init needs torch.distributed: call torch.distributed.init_process_group first")
    group = group if group is not None else dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("tp_fused.init: this rank is not in the group")
    device = str(device) if device is not None else default_type()
    device_type = device.split(":")[0]
    arguments = {
        "max_num_tokens": max_num_tokens,
        "hidden_size": hidden_size,
        "latent_size": latent_size,
        "dtype": dtype,
        "timeout_s": timeout_s,
        "max_ctas": max_ctas,
        "device": device_type,
        "TP_FUSED_BACKEND": os.environ.get("TP_FUSED_BACKEND") or None,
    }
    key = (group.group_name, device_type)
    replaced = _workspaces.get(key)
    if replaced is not None:
        replaced.require_own_process()
        if replaced.group is not group:
            replaced._close(_END_OF_GROUP)
            replaced = None
    lifetime.on_group_end(_close_workspaces_of)
    with Meeting.of(group, "tp_fused.init") as meeting:
        report = backends.report(arguments, device)
        report.ranks_per_card = max((made.share.ranks for made in _workspaces.values() if made.share), default=1)
        if replaced is not None:
            report.open_sizes = {name: getattr(replaced, name) for name in _SIZES}
        # Exchanged before any of them is judged: a rank that raised alone would leave the others waiting.
        reports = meeting.gather(report, "call init")
        backends.compare(reports)
        for report in reports:  # 1 and True are equal, and only one of them is refused
            backends.check_arguments(report.arguments)
        backend, reason = backends.choose_backend(reports, device_type, group.size(), arguments["TP_FUSED_BACKEND"])
        if backend == "cuda":
            share = backends.share_card(reports, max_ctas)
            arguments |= {"share": share, "max_ctas": share.max_ctas}
            if share.ranks > 1:  # torch refuses two ranks on one card unless told it is meant
                os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        if replaced is not None:
            replaced._close(
                f"was replaced by tp_fused.init(max_num_tokens={max_num_tokens}, hidden_size={hidden_size}) at "
                f"{lifetime.call_site()}: the workspace that it made serves the group"
            )
        workspace = Workspace(group, device_type, backend, reason, backends.grown(arguments, reports), meeting)
    _ended.pop(key, None)
    _groups[group.group_name] = group
    _workspaces[key] = workspace
    workspace.token = reports[0].token  # the same on all ranks, and no other workspace's
    compiled.add_workspace(compiled.pin(workspace.group_name, workspace.rank, workspace.world_size))
    if workspace.team is not None:
        workspace.team.serve(workspace.caller, workspace.group_name, workspace.max_num_tokens, workspace.row_bytes)
    return workspace


def get_workspace(group_name: str, device: torch.device) -> Workspace:
    """The workspace that serves `group_name` for tensors on `device`."""
    workspace = _workspaces.get((group_name, device.type))
    if workspace is None and (pinned := compiled.unpin(group_name)) is not None:
        group_name, rank, world_size = pinned
        workspace = _workspaces.get((group_name, device.type))
        if workspace is not None and (workspace.rank, workspace.world_size) != (rank, world_size):
            raise ValueError(
                f"this graph was traced for rank {rank} of {world_size} of group {group_name!r}; this process is rank "
                f"{workspace.rank} of {workspace.world_size}"
            )
    if workspace is not None:
        workspace.require_own_process()
    elif (group_name, device.type) in _ended:
        raise ValueError(f"the workspace of group {group_name!r} {_ended[group_name, device.type]}")
    else:
        others = [kind for name, kind in _workspaces if name == group_name]
        made = f" (it has one for {others[0]} tensors)" if others else ""
        raise ValueError(
            f"group {group_name!r} has no workspace for {device.type} tensors{made}; call tp_fused.init(group, "
            f"max_num_tokens=..., hidden_size=...) once on all ranks"
        )
    return workspace


def resolve_group_name(group: dist.ProcessGroup | str | None) -> str:
    """The name by which the ops know a group; None is the default group.

    In a graph that torch traces it tells this rank and the world size, too (`compiled.pin`): its code is of no use to
    another rank.
    """
    if group is None:
        group = dist.group.WORLD
        if group is None:
            raise ValueError("no group given and torch.distributed is not initialised")
    if is_compiling():
        return _pinned_name(group)
    if isinstance(group, str):
        return group
    name = group.group_name
    if _groups.get(name, group) is not group:
        raise ValueError(f"this process group {name!r} was destroyed; the workspace of that name is of a later group")
    return name


def _pinned_name(group: dist.ProcessGroup | str) -> str:
    if not isinstance(group, str):
        return compiled.pin(group.group_name, group.rank(), group.size())
    for device_type in ("cpu", "cuda"):
        workspace = _workspaces.get((group, device_type))
        if workspace is not None:
            return compiled.pin(group, workspace.rank, workspace.world_size)
    return group  # pinned already, or unknown, which the op will say


def type_of(device: str | torch.device | None) -> torch.device:
    """The kind of device that is asked for; by default a GPU, where torch sees one."""
    return torch.device(torch.device(device).type if device is not None else default_type())


def default_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def symm_empty(shape, dtype: torch.dtype | None = None, group=None, device: str | torch.device | None = None):
    """`Workspace.symm_empty` on the workspace of `group`: see there. Collective."""
    return get_workspace(resolve_group_name(group), type_of(device)).symm_empty(shape, dtype=dtype, device=device)


def _close_workspaces_of(group_name: str | None) -> None:
    """Those of a process group that is no more; None: of all."""
    for key, workspace in list(_workspaces.items()):
        if group_name in (None, workspace.group_name):
            workspace._close(_END_OF_GROUP)
            _ended[key] = _END_OF_GROUP
    for name in [group_name] if group_name is not None else list(_groups):
        _groups.pop(name, None)


@atexit.register
def _close_all() -> None:
    for workspace in list(_workspaces.values()):
        workspace.close()
