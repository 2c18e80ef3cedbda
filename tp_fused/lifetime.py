"""What ends a workspace besides `close`, and what is kept of it afterwards."""

import functools
import os
import sys

from torch.distributed import distributed_c10d

from .faults import CollectiveFault, op_name

CLOSED = 8  # TPF_CLOSED: a kernel found its own workspace closed

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep

# Workspaces whose calls a CUDA graph has captured, closed since. A replay reads the addresses that were captured, so
# their memory stays for the life of the process: the kernels find the workspace closed there, and write a fault.
_retired: list["Retired"] = []


class Retired:
    """The memory of a closed workspace, and the mailbox in which a replay's kernel leaves its fault."""

    def __init__(self, group_name: str, rank: int, team, mailbox, symmetric: list):
        self.group_name, self.rank, self.team = group_name, rank, team
        self.mailbox, self.symmetric = mailbox, list(symmetric)


def retire(*arguments) -> None:
    """Keeps what `Retired` lists for the life of the process."""
    _retired.append(Retired(*arguments))


def check_retired() -> None:
    """Raises the CollectiveFault of a graph that was replayed after its workspace had been closed: once for each."""
    for workspace in _retired:
        record = workspace.team.fault_on_host(workspace.rank)
        if record["status"] != CLOSED:
            continue
        workspace.mailbox.zero_()
        op = op_name(record["expected"]["op"])
        raise CollectiveFault(
            f"{op} #{record['call_number']}: rank {workspace.rank} replayed a CUDA graph that was captured on a "
            f"workspace of group {workspace.group_name!r} closed since; its outputs are NaN: capture it again",
            op,
            record["call_number"],
            workspace.rank,
            workspace.rank,
            "closed",
        )


def on_group_end(close) -> None:
    """Calls `close(group_name)` when torch forgets a process group, `close(None)` when it forgets all. Once.

    torch has no hook for that; these two are the last that destroy_process_group calls.
    """
    for name in ("_unregister_process_group", "_unregister_all_process_groups"):
        forget = getattr(distributed_c10d, name, None)
        if forget is None or hasattr(forget, "_tp_fused_close"):
            continue

        @functools.wraps(forget)
        def closing(*arguments, _forget=forget, **named):
            close(next(iter((*arguments, *named.values())), None))
            return _forget(*arguments, **named)

        closing._tp_fused_close = close  # pyright: ignore[reportAttributeAccessIssue]
        setattr(distributed_c10d, name, closing)


def call_site() -> str:
    """FILE:LINE of the innermost caller outside of tp_fused."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
