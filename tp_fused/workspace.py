"""The symmetric memory of a process group, and which backend serves it."""

import atexit
import os
import secrets
import shutil

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch.compiler import is_compiling

from . import backends, compiled, faults, partition
from .native import _C

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_workspaces: dict[tuple[str, str], "Workspace"] = {}


class Workspace:
    """What the ranks of a group need to run the ops: made by `tp_fused.init`, used by every op on that group.

    Attributes: `group`, `group_name`, `rank`, `world_size`, `device_type`, `backend` ("cuda", "cpu" or "reference"),
    `reason` (why this backend), `max_num_tokens`, `hidden_size`, `latent_size`, `dtype`, `timeout_s`, `max_ctas`.
    """

    def __init__(self, group, device_type: str, backend: str, reason: str, arguments: dict):
        self.group = group
        self.group_name = group.group_name
        self.rank, self.world_size = group.rank(), group.size()
        self.device_type, self.backend, self.reason = device_type, backend, reason
        self.max_num_tokens: int = arguments["max_num_tokens"]
        self.hidden_size: int = arguments["hidden_size"]
        self.latent_size: int = arguments["latent_size"] or arguments["hidden_size"]
        self.dtype: torch.dtype = arguments["dtype"]
        self.timeout_s: float = arguments["timeout_s"]
        self.max_ctas: int | None = arguments["max_ctas"]
        self.row_bytes = max(self.hidden_size, self.latent_size) * self.dtype.itemsize
        self.device_index = torch.cuda.current_device() if device_type == "cuda" else None
        self.closed = False
        self._pid = os.getpid()
        self.calls, self.fault = 0, None  # the reference backend's; the others keep theirs in the region
        self.team = None
        self._symmetric: list = []  # torch's, that the team's addresses point into
        if backend == "cpu":
            self._make_cpu_team()
        elif backend == "cuda":
            self._make_cuda_team()

    # ---- what the ops ask ----

    def require_open(self) -> None:
        if self.closed:
            raise ValueError(
                f"the workspace of group {self.group_name!r} is closed; call tp_fused.init(...) on all ranks"
            )

    def require_kernel_width(self, hidden_size: int) -> None:
        limit = _C.MAX_HIDDEN_SIZE
        if self.backend != "reference" and hidden_size > limit:
            raise ValueError(f"hidden_size={hidden_size} is over {limit}, the widest row the kernels reduce")

    def check(self) -> None:
        """Raises the `CollectiveFault` that an earlier op on this workspace ran into, if any."""
        self.require_open()
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
        """
        self.require_open()
        dtype = dtype or self.dtype
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        index = torch.device(device).index if device is not None else None
        elsewhere = None
        if self.device_type == "cuda" and index not in (None, self.device_index):
            elsewhere = f"{device}, its workspace is on cuda:{self.device_index}"
        # Exchanged before any of them is judged: a rank that raised alone would leave the others waiting.
        requests = _gather_objects(self.group, ((shape, dtype), elsewhere))
        for rank, (request, elsewhere) in enumerate(requests):
            if elsewhere is not None:
                raise ValueError(f"symm_empty: rank {rank} asked for memory on {elsewhere}")
            if request != requests[0][0]:
                raise ValueError(f"symm_empty: rank {rank} asked for {request}, rank 0 for {requests[0][0]}")
        if any(size < 0 for size in shape):
            raise ValueError(f"symm_empty: sizes must not be negative, got {shape}")
        numel = torch.Size(shape).numel()
        if self.backend == "reference" or numel == 0:
            return torch.empty(shape, dtype=dtype, device=self.device_type)
        if self.backend == "cuda":
            tensor, bases = self._symmetric_memory(numel * dtype.itemsize)
            self.team.add_symmetric_buffer(bases, numel * dtype.itemsize)
            return tensor.view(dtype).view(shape)
        stride = -(-numel * dtype.itemsize // 4096) * 4096
        segment = self._shared_segment(stride)
        self.team.keep(segment)
        self.team.add_symmetric_buffer([segment.base + r * stride for r in range(self.world_size)], stride)
        return torch.frombuffer(segment, dtype=dtype, count=numel, offset=self.rank * stride).view(shape)

    def close(self) -> None:
        """Gives the memory back. Peers that still wait for this rank raise `CollectiveFault`."""
        if self.closed:
            return
        self.closed = True
        if self.team is not None and self._pid == os.getpid():  # a forked child's end is not this rank's
            self.team.close()
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

    def _slot_bytes(self) -> int:
        """A slot holds as many rows from every rank as the rank with most rows owns."""
        rows = self.world_size * partition.row_count(self.max_num_tokens, 0, self.world_size)
        return -(-rows * self.row_bytes // 4096) * 4096

    def _make_cpu_team(self) -> None:
        slot_bytes = self._slot_bytes()
        region = _C.region_bytes(slot_bytes)
        segment = self._shared_segment(region)
        held = all(_gather_objects(self.group, segment.hold(self.rank)))
        self.team = _C.Team(
            rank=self.rank,
            regions=[segment.base + rank * region for rank in range(self.world_size)],
            slot_bytes=slot_bytes,
            timeout_ns=int(self.timeout_s * 1e9),
            max_ctas=self.max_ctas or 0,
            liveness_fd=segment.fd if held else -1,
        )
        self.team.keep(segment)

    def _make_cuda_team(self) -> None:
        slot_bytes = self._slot_bytes()
        memory, regions = self._symmetric_memory(_C.region_bytes(slot_bytes, on_cuda=True))
        memory.zero_()
        torch.cuda.synchronize()
        _gather_objects(self.group, None)  # nobody signals into a region that is not zeroed yet
        self._mailbox = torch.zeros(_C.FAULT_BYTES, dtype=torch.uint8, pin_memory=True)
        self.team = _C.Team(
            rank=self.rank,
            regions=regions,
            slot_bytes=slot_bytes,
            timeout_ns=int(self.timeout_s * 1e9),
            max_ctas=self.max_ctas,
            device=self.device_index,
            mailbox=self._mailbox.data_ptr(),
        )

    def _symmetric_memory(self, num_bytes: int) -> tuple[torch.Tensor, list[int]]:
        """torch's symmetric memory: this rank's tensor of bytes, and where every rank's is mapped here."""
        tensor = symm_mem.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{self.device_index}")
        handle = symm_mem.rendezvous(tensor, self.group_name)
        self._symmetric.append((tensor, handle))
        return tensor, list(handle.buffer_ptrs)

    def _shared_segment(self, bytes_per_rank: int):
        """One segment, mapped by all ranks of this host and nameless by the time this returns."""
        size = bytes_per_rank * self.world_size

        def attempt(make):
            try:
                return make(), None
            except (OSError, MemoryError) as error:
                return None, error

        name = _gather_objects(self.group, f"/tp_fused-{os.getpid()}-{secrets.token_hex(8)}")[0]
        segment, error = attempt(lambda: _C.Segment(name, size, create=True)) if self.rank == 0 else (None, None)
        try:
            error = _gather_objects(self.group, error)[0]
            if error is None and self.rank != 0:
                segment, error = attempt(lambda: _C.Segment(name, size, create=False))
            errors = _gather_objects(self.group, error)
        finally:
            if self.rank == 0 and segment is not None:
                _C.Segment.unlink(name)
        for rank, error in enumerate(errors):
            if error is not None:
                raise type(error)(
                    f"rank {rank}: {error}. The workspace needs {size / 2**20:.1f} MiB of /dev/shm, which has "
                    f"{_free_bytes('/dev/shm') / 2**20:.1f} MiB free: ask for fewer tokens, enlarge it (docker run "
                    f"--shm-size), or use TP_FUSED_BACKEND=reference"
                )
        return segment


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
    as the process group does. max_ctas: bounds the grid of every CUDA kernel; up to half of a card's multiprocessors, a
    projection's blocks take them in pairs of neighbours.
    device: "cpu" or "cuda", which is torch's current one (default: cuda where torch sees one).

    The backend is chosen from what all ranks report, the same everywhere: when all ranks run on one host, `cuda`
    (torch's symmetric memory; the build has to have code for their cards, and these peer access) or `cpu` (shared
    memory); otherwise `reference` (torch.distributed).
    TP_FUSED_BACKEND=cpu|cuda|reference asks for one; if it cannot run, this raises. A workspace that the group already
    has is closed and replaced. Close it before `destroy_process_group`: a later group of the same name would find it.

    Raises ValueError on every rank when an argument is out of range or differs between ranks, and names the rank and
    the argument; MemoryError when /dev/shm is too small.
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
    # Exchanged before any of them is judged: a rank that raised alone would leave the others waiting.
    reports = _gather_objects(group, backends.report(arguments, device))
    for rank, report in enumerate(reports):
        if report.error is not None:
            raise ValueError(f"tp_fused.init: rank {rank}: {report.error}")
    for rank, report in enumerate(reports):
        for name, value in report.arguments.items():
            if value != reports[0].arguments[name]:
                raise ValueError(
                    f"tp_fused.init: rank {rank} was called with {name}={value}, rank 0 with "
                    f"{name}={reports[0].arguments[name]}"
                )
    _check_arguments(arguments, group.size())
    backend, reason = backends.choose_backend(reports, device_type, group.size(), arguments["TP_FUSED_BACKEND"])
    if backend == "cuda":
        arguments["max_ctas"] = backends.bound_ctas(reports, max_ctas)
        if backends.ranks_per_card(reports) > 1:  # torch refuses two ranks on one card unless told that it is meant
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    key = (group.group_name, device_type)
    if key in _workspaces:
        _workspaces[key].close()
    workspace = Workspace(group, device_type, backend, reason, arguments)
    _workspaces[key] = workspace
    compiled.add_workspace(compiled.pin(workspace.group_name, workspace.rank, workspace.world_size))
    if workspace.team is not None:
        workspace.team.serve(workspace.group_name, workspace.max_num_tokens, workspace.row_bytes)
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
    if workspace is None:
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
    return group if isinstance(group, str) else group.group_name


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


def _check_arguments(arguments: dict, world_size: int) -> None:
    for name in ("max_num_tokens", "hidden_size", "latent_size", "max_ctas"):
        value = arguments[name]
        optional = name in ("latent_size", "max_ctas")
        if not (optional and value is None) and (not isinstance(value, int) or not 0 < value < 2**31):
            raise ValueError(f"tp_fused.init: {name} must be a positive integer below 2**31, got {value!r}")
    if arguments["dtype"] not in DTYPES:
        raise TypeError(f"tp_fused.init: dtype must be one of {', '.join(map(str, DTYPES))}, got {arguments['dtype']}")
    timeout_s = arguments["timeout_s"]
    if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
        raise ValueError(f"tp_fused.init: timeout_s must be positive seconds, got {timeout_s!r}")


def _free_bytes(path: str) -> int:
    return shutil.disk_usage(path).free if os.path.isdir(path) else 0


def _gather_objects(group, value) -> list:
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


@atexit.register
def _close_all() -> None:
    for workspace in list(_workspaces.values()):
        workspace.close()
