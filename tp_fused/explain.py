"""`tp_fused.explain`: what would run, and why."""

import torch

from . import faults, native, partition
from .workspace import Workspace, get_workspace, resolve_group_name, type_of


def explain(op: str, num_tokens: int, group=None, *, device=None, input: torch.Tensor | None = None) -> str:
    """What a call of `op` with `num_tokens` tokens would run on this rank, and why, in words.

    input: the tensor that would be passed; with it, the answer says whether the peers read it in place. Without it, a
    tensor of the workspace's hidden_size and dtype is assumed. A projection is taken to make latent_size columns.
    Raises ValueError where the call itself would: no workspace, an unknown op.
    """
    if not hasattr(torch.ops.tp_fused, op):
        raise ValueError(f"unknown op {op!r}")
    if input is not None:
        device = input.device
    workspace = get_workspace(resolve_group_name(group), type_of(device))
    rows = partition.row_slice(num_tokens, workspace.rank, workspace.world_size)
    lines = [
        f"{op}: backend {workspace.backend} ({workspace.reason})",
        f"rank {workspace.rank} of {workspace.world_size} owns rows {rows.start} to {rows.stop} of {num_tokens}",
    ]
    if num_tokens > workspace.max_num_tokens:
        lines.append(f"it would raise: the workspace was made for {workspace.max_num_tokens} tokens")
    if workspace.backend == "reference":
        lines.append("rows travel by torch.distributed's all-to-all and all-gather; nothing is fused")
    elif workspace.backend == "cuda":
        lines += _on_cuda(workspace, op, num_tokens, input)
    elif op.startswith(("rs_", "reduce_")) and input is not None:
        in_place = workspace.team.is_symmetric(input.data_ptr())
        lines.append("the peers read the input in place" if in_place else "the input is staged by the same kernel")
    elif op.startswith("qkv_"):
        lines.append("torch multiplies into shared memory; the gather copies from there")
    return "\n".join(lines)


def _product(op: str) -> str:
    """What multiplies where a gather comes after it."""
    if op != "qkv_a_proj_ag_fp8":
        return "torch multiplies this rank's rows (cuBLAS)"
    triton, missing = native.triton_projection()
    what = "a Triton kernel" if triton else f"dequantising and torch, since Triton is missing ({missing}),"
    return f"{what} multiplies this rank's rows"


def _on_cuda(workspace: Workspace, op: str, num_tokens: int, input: torch.Tensor | None) -> list[str]:
    """What libtp_fused would launch, as it says itself, and what multiplies before that."""
    dtype, hidden_size = (workspace.dtype, workspace.hidden_size) if input is None else (input.dtype, input.shape[1])
    if op == "qkv_a_proj_ag_fp8":
        dtype = torch.float8_e4m3fn
    code = next(code for code, name in faults.OPS.items() if name == op)
    address = 0 if input is None else input.data_ptr()
    sizes = num_tokens, hidden_size, workspace.latent_size
    plan = workspace.team.plan(code, address, *sizes, native.DTYPE_CODES[dtype])

    if plan["tile_rows"]:
        return [
            f"one kernel multiplies, in tiles of {plan['tile_rows']} x {plan['tile_columns']}, and gathers finished "
            "rows meanwhile",
            f"{plan['blocks']} blocks (max_ctas={workspace.max_ctas}) of {plan['threads']} threads",
        ]
    lines = []
    if op.startswith("qkv_"):
        why = (
            "so few rows of a rank are all finished at the same time, with nothing to hide their way behind"
            if plan["few_rows"]
            else f"no kernel does both for {dtype} on this card"
        )
        lines += [f"{_product(op)}; then one kernel gathers them", why]
    elif op != "all_gather_rows" and input is not None:
        if plan["source"] >= 0:
            lines.append("the peers read the input in place")
        elif workspace.team.is_symmetric(address):
            lines.append(
                "the input is staged by the same kernel, although the peers could read it in place: so few rows are "
                "posted, one way between ranks where an input that is read in place takes two"
            )
        else:
            lines.append("the input is staged by the same kernel")

    shared_by, groups = plan["cluster"], plan["blocks"] // plan["cluster"]
    most = -(-partition.row_count(num_tokens, 0, workspace.world_size) // groups)
    who = f"each {shared_by} of them share" if shared_by > 1 else "each has"
    lines.append(
        f"{plan['blocks']} blocks (max_ctas={workspace.max_ctas}) of {plan['threads']} threads; {who} {most} "
        f"row{'s' if most != 1 else ''} at most"
    )
    if plan["shared_bytes"]:
        lines.append(f"the copy engine moves rows, through {plan['shared_bytes'] // 1024} KiB of shared memory a block")
    else:
        lines.append("threads move rows")
    return lines
