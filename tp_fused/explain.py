"""`tp_fused.explain`: what would run, and why."""

import contextlib
from typing import Any

import torch

from . import checks, faults, native, partition, planning
from .groups import get_workspace, resolve_group_name, type_of

COMPOSED = ("rs_rmsnorm_ag_fp8", "mla_prologue", "mla_prologue_fp8")
OPS = (*faults.OPS.values(), *COMPOSED)


def explain(
    op: str,
    num_tokens: int,
    group=None,
    *,
    device=None,
    input: torch.Tensor | None = None,
    gpu: str | None = None,
    world_size: int = 8,
    hidden_size: int = 7168,
    latent_size: int = 2112,
    dtype: torch.dtype = torch.bfloat16,
    ranks_per_card: int = 1,
    in_place: bool = False,
    complete: bool = False,
) -> str:
    """What a call of `op` with `num_tokens` tokens would run on this rank, and why, in words.

    input: the tensor that would be passed; with it, the answer says whether the peers read it in place. Without it, a
    tensor of the workspace's hidden_size and dtype is assumed. A projection is taken to make latent_size columns.
    complete: as the call would be. Raises ValueError or TypeError where the call itself would: no workspace, an unknown
    op, a count below zero, a width or dtype that no kernel takes. Of more tokens than the workspace takes it says so.

    gpu: "A100", "H20", "H100", "H200", "B200" or "RTX PRO 6000" asks about such cards instead, without a workspace and
    without a GPU: about a call of `world_size` ranks, `ranks_per_card` on each card, with an input of `hidden_size`
    columns of `dtype`, in_place in symmetric memory or not, and projections of `latent_size` columns. Without gpu these
    are not looked at. A plan depends on nothing else: what is told here is what runs there.
    """
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"unknown op {checks.described(op)}; there are {', '.join(OPS)}")
    checks.count("num_tokens", num_tokens)
    if input is not None:
        checks.rows("input", input, (checks.E4M3,) if _multiplies_fp8(op) else _dtypes(op))
    if gpu is not None:
        if not isinstance(gpu, str):
            raise TypeError(f"gpu must be a card's name, got {checks.described(gpu)}")
        admitted = _dtypes(op)
        if not isinstance(dtype, torch.dtype) or dtype not in admitted:
            raise TypeError(f"dtype must be one of {', '.join(map(str, admitted))}, got {checks.described(dtype)}")
        checks.count("world_size", world_size, 1, native._C.MAX_RANKS)
        checks.count("ranks_per_card", ranks_per_card, 1, world_size)
        checks.count("hidden_size", hidden_size, 1)
        checks.count("latent_size", latent_size, 1)
    asked = {"group": group, "device": device, "input": input, "in_place": in_place}
    asked |= {"gpu": gpu, "world_size": world_size, "ranks_per_card": ranks_per_card, "dtype": dtype}
    asked |= {"hidden_size": hidden_size, "latent_size": latent_size}
    if op in COMPOSED:
        return _explain_composed(op, num_tokens, complete, asked)
    return _explain_op(op, num_tokens, complete, asked)


def _explain_op(op: str, num_tokens: int, complete: bool, asked: dict[str, Any]) -> str:
    """Of one that is one call, or one kernel. asked: what else `explain` was asked, and found in order."""
    if asked["gpu"] is not None:
        conditions = _conditions(op, complete, asked)  # which knows whether there is such a card
        _require_kernels(op, "cuda", asked["hidden_size"], asked["latent_size"])
        world_size = asked["world_size"]
        about = f"{world_size} ranks, {asked['ranks_per_card']} on each {asked['gpu']}; rank 0 of them owns "
        first = f"{op}: {about}{partition.row_count(num_tokens, 0, world_size)} of {num_tokens} rows"
        return "\n".join([first, *_on_cuda(op, num_tokens, conditions)])
    workspace, input = _workspace(asked), asked["input"]
    if input is not None and not op.startswith("qkv_"):
        checks.row_fits(workspace, input.shape[1], input.dtype)
    width = workspace.hidden_size if input is None else input.shape[1]
    _require_kernels(op, workspace.backend, width, workspace.latent_size)
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
        lines += _on_cuda(op, num_tokens, _conditions(op, complete, asked))
    elif op.startswith(("rs_", "reduce_")) and input is not None:
        symmetric = workspace.team.is_symmetric(input.data_ptr())
        lines.append("the peers read the input in place" if symmetric else "the input is staged by the same kernel")
    elif op.startswith("qkv_"):
        what = "by this rank's share of the weight" if complete else "this rank's rows"
        lines.append(f"torch multiplies {what} into shared memory; the gather copies from there")
    return "\n".join(lines)


def _workspace(asked: dict[str, Any]):
    device = asked["device"] if asked["input"] is None else asked["input"].device
    return get_workspace(resolve_group_name(asked["group"]), type_of(device))


def _conditions(op: str, complete: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """What a plan depends on beside the op and its tokens, as `planning.plan` takes it. in_place: None where nothing is
    known of the input."""
    if asked["gpu"] is not None:
        conditions = {name: asked[name] for name in ("world_size", "hidden_size", "dtype", "in_place")}
        conditions |= {"card": asked["gpu"], "limits": planning.limits_of(asked["gpu"], asked["ranks_per_card"])}
        columns = asked["latent_size"]
    else:
        workspace, input = _workspace(asked), asked["input"]
        conditions = {"world_size": workspace.world_size, "slot_bytes": workspace.slot_bytes}
        conditions |= {"card": workspace.device_index, "limits": workspace.limits}
        if input is None:
            conditions |= {"hidden_size": workspace.hidden_size, "dtype": workspace.dtype, "in_place": None}
        else:
            symmetric = workspace.team.is_symmetric(input.data_ptr())
            conditions |= {"hidden_size": input.shape[1], "dtype": input.dtype, "in_place": symmetric}
        columns = workspace.latent_size
    if _multiplies_fp8(op):
        conditions["dtype"] = torch.float8_e4m3fn
    return conditions | {"columns": columns if op.startswith("qkv_") else 0, "complete": complete}


def _multiplies_fp8(op: str) -> bool:
    return op.startswith("qkv_") and op.endswith("_fp8")


def _dtypes(op: str) -> tuple[torch.dtype, ...]:
    """Of a call's rows; of a projection in fp8, those of the model, too, whose rows it is given quantised."""
    if op == "all_gather_rows":
        return checks.GATHERED
    return (*checks.FLOATS, checks.E4M3) if _multiplies_fp8(op) else checks.FLOATS


def _require_kernels(op: str, backend: str, hidden_size: int, latent_size: int) -> None:
    """The widths are such as the call itself admits."""
    reduces, limit = op.startswith(("rs_", "reduce_")), native._C.MAX_HIDDEN_SIZE
    if reduces and backend != "reference" and hidden_size > limit:
        raise ValueError(f"hidden_size={hidden_size} is over {limit}, the widest row the kernels reduce")
    if reduces and backend == "cuda":
        checks.kernel_width(hidden_size)
    if _multiplies_fp8(op) and backend == "cuda":
        checks.kernel_fp8_weight((latent_size, hidden_size))


def _explain_composed(op: str, num_tokens: int, complete: bool, asked: dict[str, Any]) -> str:
    """The ops that this one is, or its one kernel, and why. asked: what else was asked of `explain`."""
    if asked["gpu"] is not None:
        columns, world_size, on_cuda = asked["latent_size"], asked["world_size"], True
    else:
        workspace = _workspace(asked)
        columns, world_size, on_cuda = workspace.latent_size, workspace.world_size, workspace.backend == "cuda"
    rest = dict(asked, input=None)
    if op == "rs_rmsnorm_ag_fp8":
        if on_cuda:
            with contextlib.suppress(planning.NoKernelError):
                return _explain_op(op, num_tokens, False, asked)
            gather = planning.plan("rs_rmsnorm_ag", num_tokens, **_conditions("rs_rmsnorm_ag", False, asked))
            if gather["quantized_by_all"]:
                way = "so few rows are gathered in 16 bits, and all quantised by every rank (groups of 128, no output)"
                return "\n".join((f"{op}: {way}", explain("rs_rmsnorm_ag", num_tokens, **asked)))
        way = "each rank quantises its own rows; they are gathered, with their scales if both are whole 16 bytes"
        parts = (explain("rs_rmsnorm_fp8", num_tokens, **asked), explain("all_gather_rows", num_tokens, **rest))
        return "\n".join((f"{op}: {way}", *parts))
    fp8 = op.endswith("_fp8")
    gathers = not complete and native._C.gathers_normed_rows(num_tokens, columns, world_size)
    way = f"each rank multiplies its own rows by all {columns} rows of the weight"
    if gathers:
        way = f"all ranks take all {num_tokens} normed rows, for their share of the weight's {columns} rows"
    precision = "_fp8" if fp8 else ""
    first = ("rs_rmsnorm_ag" if gathers else "rs_rmsnorm") + precision
    parts = (explain(first, num_tokens, complete=complete and not gathers, **asked),)
    parts += (explain(f"qkv_a_proj_ag_norm{precision}", num_tokens, complete=gathers, **rest),)
    return "\n".join((f"{op}: {way}", *parts))


def _product(op: str, complete: bool) -> str:
    """What multiplies where a gather comes after it."""
    rows = "all rows by this rank's share of the weight" if complete else "this rank's rows"
    if not op.endswith("fp8"):
        return f"torch multiplies {rows} (cuBLAS)"
    triton, missing = native.triton_projection()
    what = "a Triton kernel" if triton else f"dequantising and torch, since Triton is missing ({missing}),"
    return f"{what} multiplies {rows}"


def _on_cuda(op: str, num_tokens: int, conditions: dict[str, Any]) -> list[str]:
    """What libtp_fused would launch, and what multiplies before that."""
    projects, complete, in_place = op.startswith("qkv_"), conditions["complete"], conditions["in_place"]
    plan = planning.plan(op, num_tokens, **conditions)
    grid = f"{plan['blocks']} blocks (max_ctas={conditions['limits'].max_ctas}) of {plan['threads']} threads"
    if plan["body"] == "tiles":
        return [
            f"one kernel multiplies, in tiles of {plan['chunk_rows']} x {plan['tile_columns']}, and gathers finished "
            "rows meanwhile",
            grid,
        ]
    if plan["body"] == "columns":
        return [
            f"one kernel multiplies all rows by this rank's share of the weight, {plan['tile_columns']} of its rows by "
            f"{plan['cluster']} of the blocks, and posts the columns to all ranks",
            grid,
        ]
    lines = []
    if projects:
        why = (
            "every rank has all rows: of the product it is columns that are gathered"
            if complete
            else "so few rows of a rank are all finished at the same time, with nothing to hide their way behind"
            if plan["few_rows"]
            else f"no kernel does both for {op} of {conditions['dtype']} on this card"
        )
        lines += [f"{_product(op, complete)}; then one kernel gathers", why]
    elif op != "all_gather_rows" and in_place is not None:
        if plan["in_place"]:
            lines.append("the peers read the input in place")
        elif in_place:
            lines.append(
                "the input is staged by the same kernel, although the peers could read it in place: so few rows are "
                "posted, one way between ranks where an input that is read in place takes two"
            )
        else:
            lines.append("the input is staged by the same kernel")

    shared_by, groups = plan["cluster"], plan["blocks"] // plan["cluster"]
    whole = plan["body"] == "all rows" or (projects and complete)
    most = -(-(num_tokens if whole else partition.row_count(num_tokens, 0, conditions["world_size"])) // groups)
    who = f"each {shared_by} of them share" if shared_by > 1 else "each has"
    lines.append(f"{grid}; {who} {most} row{'s' if most != 1 else ''} at most")
    if plan["body"] == "all rows":
        what = "adds up, norms and quantises" if op == "rs_rmsnorm_ag_fp8" else "adds up"
        lines.append(f"one round: every rank posts its rows to all others and {what} all rows itself")
    elif op == "rs_rmsnorm_ag" and plan["rounds"] == 1:
        lines.append("one round: rows are added up by their owners, which post them to all others when they are normed")
    elif op == "rs_rmsnorm_ag":
        lines.append("two rounds: rows are added up by their owners, then gathered")
    if plan["body"] == "bulk":
        lines.append(f"TMA moves rows, through {plan['shared_bytes'] // 1024} KiB of shared memory a block")
    else:
        lines.append("each thread moves its vector of a row" if plan["body"] == "one row" else "threads move rows")
    return lines
