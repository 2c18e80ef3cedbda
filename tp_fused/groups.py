"""Which workspace serves a process group: `init` makes it, the ops find it by the group's name."""

import atexit
import os

import torch
import torch.distributed as dist
from torch.compiler import is_compiling

from . import backends, checks, compiled, lifetime
from .rendezvous import Meeting
from .workspace import Workspace

_workspaces: dict[tuple[str, str], Workspace] = {}
_SIZES = ("max_num_tokens", "hidden_size", "latent_size", "row_bytes")
_END_OF_GROUP = "is closed: its process group was destroyed; call tp_fused.init on the new one"
_groups: dict[str, dist.ProcessGroup] = {}  # whose workspaces these are
_ended: dict[tuple[str, str], str] = {}  # what became of workspaces that no later one stands for


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

    Ops are for inference: no output asks for a gradient. The calls of a workspace have one order, the same on all
    ranks, so they are made by one thread (`Workspace.attach_thread` hands it over) and on one stream at a time: for a
    second thread, or calls that shall overlap on a second stream, make a group and a workspace of its own.

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
    group = process_group(group) if group is not None else default_group()
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
    arguments = {name: checks.exchangeable(value) for name, value in arguments.items()}
    key = (group.group_name, device_type)
    replaced = _workspaces.get(key)
    if replaced is not None:
        replaced.require_own_process()
        if replaced.group is not group:
            replaced.close_as(_END_OF_GROUP)
            replaced = None
    lifetime.on_group_end(_close_workspaces_of)
    with Meeting.of(group, "tp_fused.init") as meeting:
        report = backends.report(arguments, device)
        report.ranks_per_card = max((made.limits.ranks for made in _workspaces.values() if made.limits), default=1)
        if replaced is not None:
            report.open_sizes = {name: getattr(replaced, name) for name in _SIZES}
        # Exchanged before any of them is judged: a rank that raised alone would leave the others waiting.
        reports = meeting.gather(report, "call init")
        backends.compare(reports)
        for report in reports:  # 1 and True are equal, and only one of them is refused
            backends.check_arguments(report.arguments)
        backend, reason = backends.choose_backend(reports, device_type, group.size(), arguments["TP_FUSED_BACKEND"])
        if backend == "cuda":
            limits = backends.limits_of_ranks(reports, max_ctas)
            arguments |= {"limits": limits, "max_ctas": limits.max_ctas}
            if limits.ranks > 1:  # torch refuses two ranks on one card unless told it is meant
                os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        if replaced is not None:
            replaced.close_as(
                f"was replaced by tp_fused.init(max_num_tokens={max_num_tokens}, hidden_size={hidden_size}) at "
                f"{lifetime.call_site()}: the workspace that it made serves the group"
            )
        workspace = Workspace(group, device_type, backend, reason, backends.grown(arguments, reports), meeting)
    _ended.pop(key, None)
    _groups[group.group_name] = group
    _workspaces[key] = workspace
    workspace.on_close = _forget
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


def workspaces_of(group_name: str) -> list[Workspace]:
    """Those that serve the group: one for each kind of device, at most."""
    return [workspace for (name, _), workspace in _workspaces.items() if name == group_name]


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
    name = process_group(group).group_name
    if _groups.get(name, group) is not group:
        raise ValueError(f"this process group {name!r} was destroyed; the workspace of that name is of a later group")
    return name


def process_group(group) -> dist.ProcessGroup:
    if isinstance(group, dist.ProcessGroup):
        return group
    if type(group) is int and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"this rank is not in the group: new_group returned {group}, for its other ranks")
    raise TypeError(
        f"group must be a process group, got {checks.described(group)}; of a DeviceMesh, pass mesh.get_group()"
    )


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
    return torch.device(checks.device(device).type if device is not None else default_type())


def default_group() -> dist.ProcessGroup:
    return dist.distributed_c10d._get_default_group()


def default_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def symm_empty(shape, dtype: torch.dtype | None = None, group=None, device: str | torch.device | None = None):
    """`Workspace.symm_empty` on the workspace of `group`: see there. Collective."""
    return get_workspace(resolve_group_name(group), type_of(device)).symm_empty(shape, dtype=dtype, device=device)


def _forget(workspace: Workspace) -> None:
    """It has been closed, and serves its group no more."""
    key = (workspace.group_name, workspace.device_type)
    if _workspaces.get(key) is workspace:
        del _workspaces[key]
        compiled.remove_workspace(compiled.pin(workspace.group_name, workspace.rank, workspace.world_size))


def _close_workspaces_of(group_name: str | None) -> None:
    """Those of a process group that is no more; None: of all."""
    for key, workspace in list(_workspaces.items()):
        if group_name in (None, workspace.group_name):
            workspace.close_as(_END_OF_GROUP)
            _ended[key] = _END_OF_GROUP
    for name in [group_name] if group_name is not None else list(_groups):
        _groups.pop(name, None)


@atexit.register
def _close_all() -> None:
    for workspace in list(_workspaces.values()):
        workspace.close()
