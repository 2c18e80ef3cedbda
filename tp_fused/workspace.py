"""The symmetric memory of a process group, and which backend serves it."""

import atexit
import os
import secrets
import shutil
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from . import faults
from .native import _C

BACKENDS = ("cuda", "cpu", "reference")
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
        self.closed = False
        self.calls, self.fault = 0, None  # the reference backend's; the others keep theirs in the region
        self._segments: list = []
        if backend == "cpu":
            self._make_cpu_team()

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
            gave_up = record["status"] == faults.PEER_FAULTED
            raise faults.fault_from(record, self.team.fault(record["peer"]) if gave_up else None)

    def symm_empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor in symmetric memory. Collective: all ranks call it with the same shape and dtype.

        An op whose input lies in it, at the same place on all ranks, lets the peers read it there instead of staging
        it. It lives until the workspace is closed or the last tensor on it is gone, whichever is later. The
        reference backend has no symmetric memory and returns an ordinary tensor.
        """
        self.require_open()
        dtype = dtype or self.dtype
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        requests = _gather_objects(self.group, (shape, dtype))
        for rank, request in enumerate(requests):
            if request != requests[0]:
                raise ValueError(f"symm_empty: rank {rank} asked for {request}, rank 0 for {requests[0]}")
        numel = torch.Size(shape).numel()
        if self.backend == "reference" or numel == 0:
            return torch.empty(shape, dtype=dtype, device=self.device_type)
        stride = -(-numel * dtype.itemsize // 4096) * 4096
        segment = self._shared_segment(stride)
        self.team.add_symmetric_buffer([segment.base + r * stride for r in range(self.world_size)], stride)
        return torch.frombuffer(segment, dtype=dtype, count=numel, offset=self.rank * stride).view(shape)

    def close(self) -> None:
        """Gives the memory back. Peers that still wait for this rank raise `CollectiveFault`."""
        if self.closed:
            return
        self.closed = True
        if self.backend == "cpu":
            self.team.close()
        self._segments.clear()
        self.team = None
        key = (self.group_name, self.device_type)
        if _workspaces.get(key) is self:
            del _workspaces[key]

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

    def _make_cpu_team(self) -> None:
        slot_bytes = -(-self.max_num_tokens * self.row_bytes // 4096) * 4096
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
        self._segments.append(segment)
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
    timeout_s: how long an op waits for a peer before it raises `CollectiveFault`. max_ctas: bounds the grid of every
    CUDA kernel. device: "cpu" or "cuda" (default: cuda where torch sees one).

    The backend is chosen from what all ranks report, the same everywhere: `cpu` (shared memory) when all ranks run on
    one host, `reference` (torch.distributed) otherwise. TP_FUSED_BACKEND=cpu|cuda|reference asks for one; if it cannot
    run, this raises. A workspace that the group already has is closed and replaced.

    Raises ValueError on every rank when an argument is out of range or differs between ranks, and names the rank and
    the argument; MemoryError when /dev/shm is too small.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("tp_fused.init needs torch.distributed: call torch.distributed.init_process_group first")
    group = group if group is not None else dist.group.WORLD
    device_type = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
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
    reports = _gather_objects(group, _Report(arguments, *_host()))
    for rank, report in enumerate(reports):
        for name, value in report.arguments.items():
            if value != reports[0].arguments[name]:
                raise ValueError(
                    f"tp_fused.init: rank {rank} was called with {name}={value}, rank 0 with "
                    f"{name}={reports[0].arguments[name]}"
                )
    _check_arguments(arguments, group.size())
    backend, reason = choose_backend(reports, device_type, group.size(), arguments["TP_FUSED_BACKEND"])
    key = (group.group_name, device_type)
    if key in _workspaces:
        _workspaces[key].close()
    workspace = Workspace(group, device_type, backend, reason, arguments)
    _workspaces[key] = workspace
    return workspace


def get_workspace(group_name: str, device: torch.device) -> Workspace:
    """The workspace that serves `group_name` for tensors on `device`."""
    workspace = _workspaces.get((group_name, device.type))
    if workspace is None:
        others = [kind for name, kind in _workspaces if name == group_name]
        made = f" (it has one for {others[0]} tensors)" if others else ""
        raise ValueError(
            f"group {group_name!r} has no workspace for {device.type} tensors{made}; call tp_fused.init(group, "
            f"max_num_tokens=..., hidden_size=...) once on all ranks"
        )
    return workspace


def resolve_group_name(group: dist.ProcessGroup | str | None) -> str:
    """The name by which the ops know a group; None is the default group."""
    if isinstance(group, str):
        return group
    if group is None:
        if not dist.is_initialized():
            raise ValueError("no group given and torch.distributed is not initialised")
        group = dist.group.WORLD
    return group.group_name


def symm_empty(shape, dtype: torch.dtype | None = None, group=None, device: str | torch.device | None = None):
    """`Workspace.symm_empty` on the workspace of `group`: see there. Collective."""
    device_type = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    return get_workspace(resolve_group_name(group), torch.device(device_type)).symm_empty(shape, dtype=dtype)


@dataclass
class _Report:
    """What one rank tells the others when a workspace is made."""

    arguments: dict
    host: str
    cpu_supported: bool
    max_ranks: int


def _host() -> tuple[str, bool, int]:
    """What identifies this host's shared memory, and what the native library can do here."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        mount = os.stat("/dev/shm").st_dev  # two containers of one machine may have a /dev/shm each
    except OSError:
        boot, mount = "unknown", "none"
    return f"{socket.gethostname()}/{boot}/{mount}", _C.cpu_supported(), _C.MAX_RANKS


def choose_backend(reports, device_type: str, world_size: int, asked: str | None) -> tuple[str, str]:
    """Which backend runs, and why. A function of what all ranks reported: the same on all of them."""
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"TP_FUSED_BACKEND={asked}: must be one of {', '.join(BACKENDS)}")
    if asked == "reference":
        return "reference", "TP_FUSED_BACKEND asks for it"
    obstacle = _obstacle(reports, device_type, world_size, asked)
    if obstacle is None:
        return device_type, "TP_FUSED_BACKEND asks for it" if asked else "all ranks share one host's memory"
    if asked is not None:
        raise ValueError(f"TP_FUSED_BACKEND={asked} cannot run: {obstacle}")
    return "reference", obstacle


def _obstacle(reports, device_type: str, world_size: int, asked: str | None) -> str | None:
    """What keeps the shared-memory backend of this device from running, if anything does."""
    if asked is not None and asked != device_type:
        return f"the workspace is for {device_type} tensors"
    if device_type != "cpu":
        return f"there are no {device_type} kernels in this build"
    if world_size > reports[0].max_ranks:
        return f"world size {world_size} is over {reports[0].max_ranks}, the ranks that one segment is made for"
    for rank, report in enumerate(reports):
        if report.host != reports[0].host:
            return f"rank {rank} runs on {report.host}, rank 0 on {reports[0].host}: they share no memory"
        if not report.cpu_supported:
            return f"the processor of rank {rank} lacks AVX2"
    return None


def _check_arguments(arguments: dict, world_size: int) -> None:
    for name in ("max_num_tokens", "hidden_size", "latent_size", "max_ctas"):
        value = arguments[name]
        optional = name in ("latent_size", "max_ctas")
        if not (optional and value is None) and (not isinstance(value, int) or value < 1):
            raise ValueError(f"tp_fused.init: {name} must be a positive integer, got {value!r}")
    if arguments["dtype"] not in DTYPES:
        raise TypeError(f"tp_fused.init: dtype must be one of {', '.join(map(str, DTYPES))}, got {arguments['dtype']}")
    if not 0 < arguments["timeout_s"] < 1e9:
        raise ValueError(f"tp_fused.init: timeout_s must be positive seconds, got {arguments['timeout_s']}")


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
