"""The public ops: schema, border checks, fake kernel, and the Python wrapper with the docstring.

Each op is registered as `torch.ops.tp_fused.<name>` (what engines and compiled graphs call) and wrapped as
`tp_fused.<name>` (what people call: a ProcessGroup instead of a name, defaults). Calls are served in
csrc/torch_ops.cpp. What is written here gets those that it refuses, says what is wrong with them, and runs the
reference backend.

In all of them rows are split as `torch.tensor_split` splits them; a rank may own none and still takes part. Inputs are
never written. Ops that meet trouble between ranks raise `CollectiveFault`; on bad arguments they raise ValueError or
TypeError before anything is launched. Inference only: no output asks for a gradient, and autocast changes nothing.
"""

import torch

from . import checks, compiled, partition, reference
from .groups import get_workspace, resolve_group_name
from .registration import define, unfused

__all__ = [
    "all_gather_rows",
    "qkv_a_proj_ag",
    "qkv_a_proj_ag_fp8",
    "qkv_a_proj_ag_norm",
    "reduce_scatter_rows",
    "rs_rmsnorm",
    "rs_rmsnorm_ag",
    "rs_rmsnorm_fp8",
]

_ops = torch.ops.tp_fused


def _own_rows(tensor: torch.Tensor, num_tokens, group_name: str):
    workspace = get_workspace(group_name, tensor.device)
    return compiled.free_size(num_tokens, lambda n: partition.row_count(n, workspace.rank, workspace.world_size))


# ---- rs_rmsnorm ----


def _rs_rmsnorm_fake(input, residual, weight, eps, group_name, complete=False, weight_offset=0.0):
    shape = (_own_rows(input, input.shape[0], group_name), input.shape[1])
    # Not empty_like: torch would ask whether there is one row, and guard on the answer.
    return input.new_empty(shape), input.new_empty(shape)


@define(
    "rs_rmsnorm(Tensor input, Tensor? residual, Tensor weight, float eps, str group_name, *, bool complete=False,"
    " float weight_offset=0.0) -> (Tensor output, Tensor residual_out)",
    _rs_rmsnorm_fake,
)
def _rs_rmsnorm(input, residual, weight, eps, group_name, complete=False, weight_offset=0.0):
    workspace = get_workspace(group_name, input.device)
    residual = checks.normed_reduction(workspace, input, residual, weight, eps, weight_offset)
    return unfused(workspace, reference.rs_rmsnorm, input, residual, weight, eps, weight_offset, complete)


def rs_rmsnorm(input, residual, weight, eps=1e-6, group=None, *, complete=False, weight_offset=0.0):
    """Reduce-scatter, residual add and RMSNorm in one kernel.

        x = reduce_scatter(input); residual = residual + x; output = rms_norm(residual, weight, eps)

    input: this rank's partial sum, [num_tokens, hidden_size], bf16, fp16 or fp32, contiguous. In symmetric memory
    (`tp_fused.symm_empty`) the peers read it in place. residual: None (the reduced rows become the residual), the full
    [num_tokens, hidden_size] (this rank's rows are taken) or this rank's slice. weight: [hidden_size], of the input's
    dtype or fp32. weight_offset: added to it in fp32; 1.0 for models that store a norm's weight less one, as Gemma's.
    complete: the input is the full sum already, on every rank; nothing is added up, the rank's slice is taken.

    Returns (output, residual_out), both [rows of this rank, hidden_size]. Partial sums are added in fp32 in rank
    order, then the residual, and rounded once: residual_out has the same bits on every backend. output is the norm of
    residual_out as stored, in fp32, rounded once.

    The idea: SGLang's scattered attention input (pull request 10568), there as separate launches.
    """
    return _ops.rs_rmsnorm(
        input, residual, weight, eps, resolve_group_name(group), complete=complete, weight_offset=weight_offset
    )


# ---- rs_rmsnorm_fp8 ----


def _rs_rmsnorm_fp8_fake(
    input,
    residual,
    weight,
    eps,
    group_name,
    group_size=128,
    scale_layout="row",
    keep_output=False,
    complete=False,
    weight_offset=0.0,
):
    num_rows, hidden_size = _own_rows(input, input.shape[0], group_name), input.shape[1]
    return (
        input.new_empty(num_rows, hidden_size, dtype=checks.E4M3),
        reference.empty_scale(num_rows, hidden_size, group_size, scale_layout, input.device),
        input.new_empty(num_rows, hidden_size),
        input.new_empty(num_rows if keep_output else 0, hidden_size),
    )


@define(
    "rs_rmsnorm_fp8(Tensor input, Tensor? residual, Tensor weight, float eps, str group_name, *, int group_size=128,"
    ' str scale_layout="row", bool keep_output=False, bool complete=False, float weight_offset=0.0)'
    " -> (Tensor q, Tensor scale, Tensor residual_out, Tensor output)",
    _rs_rmsnorm_fp8_fake,
)
def _rs_rmsnorm_fp8(
    input,
    residual,
    weight,
    eps,
    group_name,
    group_size=128,
    scale_layout="row",
    keep_output=False,
    complete=False,
    weight_offset=0.0,
):
    workspace = get_workspace(group_name, input.device)
    if scale_layout not in ("row", "column"):
        raise ValueError(f'scale_layout must be "row" or "column", got {scale_layout!r}')
    checks.group_size(group_size)
    if workspace.backend == "cuda" and group_size not in (64, 128):
        raise ValueError(f"on cuda, group_size must be 64 or 128, got {group_size}")
    residual = checks.normed_reduction(workspace, input, residual, weight, eps, weight_offset)
    return unfused(
        workspace,
        reference.rs_rmsnorm_fp8,
        input,
        residual,
        weight,
        eps,
        weight_offset,
        group_size,
        scale_layout,
        keep_output,
        complete,
    )


def rs_rmsnorm_fp8(
    input,
    residual,
    weight,
    eps=1e-6,
    group=None,
    *,
    group_size=128,
    scale_layout="row",
    keep_output=False,
    complete=False,
    weight_offset=0.0,
):
    """Reduce-scatter, residual add, RMSNorm and fp8 quantisation in one kernel.

        output, residual = rs_rmsnorm(input, residual, weight, eps, weight_offset=weight_offset)
        amax = max(|output|) of each group_size columns
        scale = amax / 448;  q = e4m3(output * (448 / amax))

    Arguments as `rs_rmsnorm`. What is quantised is the output as it would have been stored. Both quotients and the
    product are fp32, each rounded once; 448 / amax is at most the largest finite number, and 0 for a group of zeros,
    whose scale is 0. q has the same bits on every backend. (Of e4m3(output / scale) about one element in 7000 is the
    next number.) scale is one per token and group: layout "row" is [rows, groups] row-major; "column" is column-major
    with rows padded to a multiple of 4, as DeepGEMM's TMA loads want.

    Returns (q, scale, residual_out, output); output has no rows unless keep_output.
    """
    return _ops.rs_rmsnorm_fp8(
        input,
        residual,
        weight,
        eps,
        resolve_group_name(group),
        group_size=group_size,
        scale_layout=scale_layout,
        keep_output=keep_output,
        complete=complete,
        weight_offset=weight_offset,
    )


# ---- rs_rmsnorm_ag ----


def _rs_rmsnorm_ag_fake(input, residual, weight, eps, group_name, weight_offset=0.0):
    residual_out = input.new_empty(_own_rows(input, input.shape[0], group_name), input.shape[1])
    return input.new_empty(input.shape), residual_out  # contiguous, whatever strides an input of no or one element has


@define(
    "rs_rmsnorm_ag(Tensor input, Tensor? residual, Tensor weight, float eps, str group_name, *,"
    " float weight_offset=0.0) -> (Tensor output, Tensor residual_out)",
    _rs_rmsnorm_ag_fake,
)
def _rs_rmsnorm_ag(input, residual, weight, eps, group_name, weight_offset=0.0):
    workspace = get_workspace(group_name, input.device)
    residual = checks.normed_reduction(workspace, input, residual, weight, eps, weight_offset)
    return unfused(workspace, reference.rs_rmsnorm_ag, input, residual, weight, eps, weight_offset)


def rs_rmsnorm_ag(input, residual, weight, eps=1e-6, group=None, *, weight_offset=0.0):
    """All-reduce, residual add and RMSNorm in one kernel, with the residual left scattered.

        x = reduce_scatter(input); residual = residual + x; output = all_gather(rms_norm(residual, weight, eps))

    Arguments as `rs_rmsnorm`. Returns (output, residual_out): output [num_tokens, hidden_size] on every rank,
    residual_out [rows of this rank, hidden_size]. For the attention -> MLP boundary and the final norm.
    """
    return _ops.rs_rmsnorm_ag(input, residual, weight, eps, resolve_group_name(group), weight_offset=weight_offset)


# ---- reduce_scatter_rows, all_gather_rows ----


def _reduce_scatter_rows_fake(input, group_name, residual=None):
    return input.new_empty(_own_rows(input, input.shape[0], group_name), input.shape[1])


@define(
    "reduce_scatter_rows(Tensor input, str group_name, *, Tensor? residual=None) -> Tensor", _reduce_scatter_rows_fake
)
def _reduce_scatter_rows(input, group_name, residual=None):
    workspace = get_workspace(group_name, input.device)
    residual = checks.reduction(workspace, input, residual)
    return unfused(workspace, reference.reduce_scatter_rows, input, residual)


def reduce_scatter_rows(input, group=None, *, residual=None):
    """Reduce-scatter over the token dimension, any token count.

        output = tensor_split(sum over ranks of input + residual)[rank]

    input: this rank's partial sum [num_tokens, hidden_size]. residual: None, [num_tokens, hidden_size], or this rank's
    rows of it. Returns [rows of this rank, hidden_size], added in fp32 in rank order, the residual last, and rounded
    once.
    """
    return _ops.reduce_scatter_rows(input, resolve_group_name(group), residual=residual)


def _all_gather_rows_fake(input, num_tokens, group_name):
    return input.new_empty(num_tokens, input.shape[1])


@define("all_gather_rows(Tensor input, SymInt num_tokens, str group_name) -> Tensor", _all_gather_rows_fake)
def _all_gather_rows(input, num_tokens, group_name):
    workspace = get_workspace(group_name, input.device)
    checks.rows("input", input, (*checks.FLOATS, checks.E4M3, torch.uint8))
    checks.capacity(workspace, input, num_tokens, input.shape[1], name="input.shape[1]")
    checks.local_rows(workspace, "input", input, num_tokens)
    return unfused(workspace, reference.all_gather_rows, input, num_tokens)


def all_gather_rows(input, num_tokens, group=None):
    """All-gather of scattered rows, any token count.

        output = cat(every rank's input)

    input: this rank's rows of num_tokens, bf16, fp16, fp32, e4m3 or uint8. Returns [num_tokens, columns].
    """
    return _ops.all_gather_rows(input, num_tokens, resolve_group_name(group))


# ---- qkv_a_proj_ag ----


def _qkv_a_proj_ag_fake(input, weight, num_tokens, group_name, bias=None):
    return input.new_empty(num_tokens, weight.shape[0])


@define(
    "qkv_a_proj_ag(Tensor input, Tensor weight, SymInt num_tokens, str group_name, *, Tensor? bias=None) -> Tensor",
    _qkv_a_proj_ag_fake,
)
def _qkv_a_proj_ag(input, weight, num_tokens, group_name, bias=None):
    workspace = get_workspace(group_name, input.device)
    checks.projection(workspace, input, weight, num_tokens)
    if bias is not None:
        checks.like("bias", bias, (weight.shape[0],), input.dtype, input.device)
        checks.kernel_starts(workspace, bias=bias)
    return unfused(workspace, reference.qkv_a_proj_ag, input, weight, num_tokens, bias, product=(input, weight, bias))


def qkv_a_proj_ag(input, weight, num_tokens, group=None, *, bias=None):
    """A replicated projection of scattered rows, all-gathered while it is computed.

        latent = all_gather(input @ weight.T + bias)

    input: this rank's rows of num_tokens, [rows, hidden_size], bf16, fp16 or fp32. weight: [columns, hidden_size], the
    same on all ranks (DeepSeek's fused q_a and kv_a projection). bias: [columns]. Returns [num_tokens, columns], the
    same bits on all ranks.
    """
    return _ops.qkv_a_proj_ag(input, weight, num_tokens, resolve_group_name(group), bias=bias)


# ---- qkv_a_proj_ag_fp8 ----


def _qkv_a_proj_ag_fp8_fake(q, scale, weight, weight_scale, num_tokens, group_name):
    return q.new_empty(num_tokens, weight.shape[0], dtype=torch.bfloat16)


@define(
    "qkv_a_proj_ag_fp8(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, SymInt num_tokens, str group_name)"
    " -> Tensor",
    _qkv_a_proj_ag_fp8_fake,
)
def _qkv_a_proj_ag_fp8(q, scale, weight, weight_scale, num_tokens, group_name):
    workspace = get_workspace(group_name, q.device)
    checks.projection(workspace, q, weight, num_tokens, (checks.E4M3,), torch.bfloat16)
    checks.fp8_scales(scale, q)
    blocks = tuple(-(-size // 128) for size in weight.shape)
    checks.like("weight_scale", weight_scale, blocks, torch.float32, q.device)
    return unfused(workspace, reference.qkv_a_proj_ag_fp8, q, scale, weight, weight_scale, num_tokens)


def qkv_a_proj_ag_fp8(q, scale, weight, weight_scale, num_tokens, group=None):
    """`qkv_a_proj_ag` on fp8 rows and weight with DeepSeek-V3's block scales.

        latent = all_gather((q * scale) @ (weight * weight_scale).T)

    q: e4m3 [rows, hidden_size]; scale: fp32 [rows, ceil(hidden_size / 128)], either layout of `rs_rmsnorm_fp8`.
    weight: e4m3 [columns, hidden_size]; weight_scale: fp32, one per 128 x 128 block, the last may be partial.
    Returns bf16 [num_tokens, columns].
    """
    return _ops.qkv_a_proj_ag_fp8(q, scale, weight, weight_scale, num_tokens, resolve_group_name(group))


# ---- qkv_a_proj_ag_norm ----


def _qkv_a_proj_ag_norm_fake(input, weight, q_a_weight, kv_a_weight, eps, num_tokens, group_name, weight_offset=0.0):
    q_columns, kv_columns = q_a_weight.shape[0], kv_a_weight.shape[0]
    widths = (q_columns, kv_columns, weight.shape[0] - q_columns - kv_columns)
    return tuple(input.new_empty(num_tokens, width) for width in widths)


@define(
    "qkv_a_proj_ag_norm(Tensor input, Tensor weight, Tensor q_a_weight, Tensor kv_a_weight, float eps,"
    " SymInt num_tokens, str group_name, *, float weight_offset=0.0) -> (Tensor q_a, Tensor kv_a, Tensor k_pe)",
    _qkv_a_proj_ag_norm_fake,
)
def _qkv_a_proj_ag_norm(input, weight, q_a_weight, kv_a_weight, eps, num_tokens, group_name, weight_offset=0.0):
    workspace = get_workspace(group_name, input.device)
    checks.projection(workspace, input, weight, num_tokens)
    checks.latent_norms(q_a_weight, kv_a_weight, weight)
    checks.kernel_starts(workspace, q_a_weight=q_a_weight, kv_a_weight=kv_a_weight)
    checks.eps(eps)
    checks.weight_offset(weight_offset)
    return unfused(
        workspace,
        reference.qkv_a_proj_ag_norm,
        input,
        weight,
        q_a_weight,
        kv_a_weight,
        eps,
        num_tokens,
        weight_offset,
        product=(input, weight),
    )


def qkv_a_proj_ag_norm(input, weight, q_a_weight, kv_a_weight, num_tokens, eps=1e-6, group=None, *, weight_offset=0.0):
    """`qkv_a_proj_ag` and the two latent RMSNorms, split into three contiguous tensors.

        q_a, kv_a, k_pe = split(all_gather(input @ weight.T))
        q_a = rms_norm(q_a, q_a_weight, eps); kv_a = rms_norm(kv_a, kv_a_weight, eps)

    input, weight: as `qkv_a_proj_ag`. q_a_weight: [q_lora_rank], empty for a model without q_lora; kv_a_weight:
    [kv_lora_rank], both of the input's dtype or both fp32; the columns of weight after both are k_pe. weight_offset: as
    in `rs_rmsnorm`, of both norms. Returns (q_a, kv_a, k_pe), each [num_tokens, ...].
    """
    return _ops.qkv_a_proj_ag_norm(
        input,
        weight,
        q_a_weight,
        kv_a_weight,
        eps,
        num_tokens,
        resolve_group_name(group),
        weight_offset=weight_offset,
    )
