"""`tp_fused.explain`: what would run, and why."""

import torch

from . import partition
from .workspace import get_workspace, resolve_group_name


def explain(op: str, num_tokens: int, group=None, *, device=None, input: torch.Tensor | None = None) -> str:
    """What a call of `op` with `num_tokens` tokens would run on this rank, and why, in words.

    input: the tensor that would be passed; with it, the answer says whether the peers read it in place.
    Raises ValueError where the call itself would: no workspace, an unknown op.
    """
    if not hasattr(torch.ops.tp_fused, op):
        raise ValueError(f"unknown op {op!r}")
    if input is not None:
        device = input.device
    device_type = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    workspace = get_workspace(resolve_group_name(group), torch.device(device_type))
    rows = partition.row_slice(num_tokens, workspace.rank, workspace.world_size)
    lines = [
        f"{op}: backend {workspace.backend} ({workspace.reason})",
        f"rank {workspace.rank} of {workspace.world_size} owns rows {rows.start} to {rows.stop} of {num_tokens}",
    ]
    if num_tokens > workspace.max_num_tokens:
        lines.append(f"it would raise: the workspace was made for {workspace.max_num_tokens} tokens")
    if workspace.backend == "reference":
        lines.append("rows travel by torch.distributed's all-to-all and all-gather; nothing is fused")
    elif op.startswith(("rs_", "reduce_")) and input is not None:
        in_place = workspace.team.is_symmetric(input.data_ptr())
        lines.append("the peers read the input in place" if in_place else "the input is staged by the same kernel")
    elif op.startswith("qkv_") and workspace.backend == "cuda":
        lines.append("torch multiplies, then all_gather_rows; not fused yet on this backend")
    elif op.startswith("qkv_"):
        lines.append("torch multiplies into shared memory; the gather copies from there")
    return "\n".join(lines)
