"""The ops that project rows onto the latent of multi-head latent attention (MLA).

As in ops.py, where the rules stand that all ops keep.
"""

import torch

from . import checks, reference, traced
from .groups import get_workspace, resolve_group_name
from .registration import define, typed, unfused

__all__ = ["qkv_a_proj_ag", "qkv_a_proj_ag_fp8", "qkv_a_proj_ag_norm", "qkv_a_proj_ag_norm_fp8"]

_ops = torch.ops.tp_fused


# ---- qkv_a_proj_ag ----


def _qkv_a_proj_ag_fake(input, weight, num_tokens, group_name, bias=None, complete=False):
    traced.projection(input, weight, num_tokens)
    if bias is not None:
        checks.like("bias", bias, (weight.shape[0],), input.dtype, input.device)
    return input.new_empty(num_tokens, weight.shape[0])


@define(
    "qkv_a_proj_ag(Tensor input, Tensor weight, SymInt num_tokens, str group_name, *, Tensor? bias=None,"
    " bool complete=False) -> Tensor",
    _qkv_a_proj_ag_fake,
)
def _qkv_a_proj_ag(input, weight, num_tokens, group_name, bias=None, complete=False):
    workspace = get_workspace(group_name, input.device)
    checks.projection(workspace, input, weight, num_tokens, complete)
    if bias is not None:
        checks.like("bias", bias, (weight.shape[0],), input.dtype, input.device)
        checks.kernel_starts(workspace, bias=bias)
    return unfused(
        workspace,
        reference.qkv_a_proj_ag,
        input,
        weight,
        num_tokens,
        bias,
        complete,
        product=(input, weight, bias),
    )


@typed
def qkv_a_proj_ag(input, weight, num_tokens, group=None, *, bias=None, complete=False):
    """A replicated projection of scattered rows, all-gathered while it is computed.

        latent = all_gather(input @ weight.T + bias)

    input: this rank's rows of num_tokens, [rows, hidden_size], bf16, fp16 or fp32. weight: [columns, hidden_size], the
    same on all ranks (DeepSeek's fused q_a and kv_a projection). bias: [columns]. complete: the input is all
    num_tokens rows, the same on every rank; each rank multiplies them by its share of the weight's rows and reads no
    others, which for few tokens takes less time. Returns [num_tokens, columns], the same bits on all ranks.
    """
    return _ops.qkv_a_proj_ag(input, weight, num_tokens, resolve_group_name(group), bias=bias, complete=complete)


# ---- qkv_a_proj_ag_fp8 ----


def _qkv_a_proj_ag_fp8_fake(q, scale, weight, weight_scale, num_tokens, group_name, complete=False):
    traced.projection_fp8(q, scale, weight, weight_scale, num_tokens)
    return q.new_empty(num_tokens, weight.shape[0], dtype=torch.bfloat16)


@define(
    "qkv_a_proj_ag_fp8(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, SymInt num_tokens, str group_name,"
    " *, bool complete=False) -> Tensor",
    _qkv_a_proj_ag_fp8_fake,
)
def _qkv_a_proj_ag_fp8(q, scale, weight, weight_scale, num_tokens, group_name, complete=False):
    workspace = get_workspace(group_name, q.device)
    checks.projection(workspace, q, weight, num_tokens, complete, (checks.E4M3,), torch.bfloat16)
    checks.fp8_scales(scale, q)
    checks.weight_scale(weight_scale, weight)
    return unfused(workspace, reference.qkv_a_proj_ag_fp8, q, scale, weight, weight_scale, num_tokens, complete)


@typed
def qkv_a_proj_ag_fp8(q, scale, weight, weight_scale, num_tokens, group=None, *, complete=False):
    """`qkv_a_proj_ag` on fp8 rows and weight with DeepSeek-V3's block scales.

        latent = all_gather((q * scale) @ (weight * weight_scale).T)

    q: e4m3 [rows, hidden_size]; scale: fp32 [rows, ceil(hidden_size / 128)], either layout of `rs_rmsnorm_fp8`.
    weight: e4m3 [columns, hidden_size]; weight_scale: fp32, one per 128 x 128 block, the last may be smaller.
    complete: q and scale are of all num_tokens rows, as in `qkv_a_proj_ag`; a rank's share is whole blocks. Returns
    bf16 [num_tokens, columns].
    """
    return _ops.qkv_a_proj_ag_fp8(
        q, scale, weight, weight_scale, num_tokens, resolve_group_name(group), complete=complete
    )


# ---- qkv_a_proj_ag_norm ----


def _qkv_a_proj_ag_norm_fake(
    input, weight, q_a_weight, kv_a_weight, eps, num_tokens, group_name, weight_offset=0.0, complete=False
):
    traced.projection(input, weight, num_tokens)
    checks.latent_norms(weight, q_a_weight=q_a_weight, kv_a_weight=kv_a_weight)
    traced.numbers(eps, weight_offset)
    q_columns, kv_columns = q_a_weight.shape[0], kv_a_weight.shape[0]
    widths = (q_columns, kv_columns, weight.shape[0] - q_columns - kv_columns)
    return tuple(input.new_empty(num_tokens, width) for width in widths)


@define(
    "qkv_a_proj_ag_norm(Tensor input, Tensor weight, Tensor q_a_weight, Tensor kv_a_weight, float eps,"
    " SymInt num_tokens, str group_name, *, float weight_offset=0.0, bool complete=False)"
    " -> (Tensor q_a, Tensor kv_a, Tensor k_pe)",
    _qkv_a_proj_ag_norm_fake,
)
def _qkv_a_proj_ag_norm(
    input, weight, q_a_weight, kv_a_weight, eps, num_tokens, group_name, weight_offset=0.0, complete=False
):
    workspace = get_workspace(group_name, input.device)
    checks.projection(workspace, input, weight, num_tokens, complete)
    checks.latent_norms(weight, q_a_weight=q_a_weight, kv_a_weight=kv_a_weight)
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
        complete,
        product=(input, weight),
    )


@typed
def qkv_a_proj_ag_norm(
    input, weight, q_a_weight, kv_a_weight, num_tokens, eps=1e-6, group=None, *, weight_offset=0.0, complete=False
):
    """`qkv_a_proj_ag` and the two latent RMSNorms, split into three contiguous tensors.

        q_a, kv_a, k_pe = split(all_gather(input @ weight.T))
        q_a = rms_norm(q_a, q_a_weight, eps); kv_a = rms_norm(kv_a, kv_a_weight, eps)

    input, weight, complete: as `qkv_a_proj_ag`. q_a_weight: [q_lora_rank], empty for a model without q_lora.
    kv_a_weight: [kv_lora_rank]; both of the input's dtype or both fp32. The columns of weight after both are k_pe.
    weight_offset: as in `rs_rmsnorm`, of both norms. Returns (q_a, kv_a, k_pe), each [num_tokens, ...].
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
        complete=complete,
    )


# ---- qkv_a_proj_ag_norm_fp8 ----


def _qkv_a_proj_ag_norm_fp8_fake(
    q,
    scale,
    weight,
    weight_scale,
    q_a_weight,
    kv_a_weight,
    eps,
    num_tokens,
    group_name,
    quantize_q_a=False,
    scale_layout="row",
    complete=False,
    round_scales=False,
):
    checks.scale_layout(scale_layout)
    traced.projection_fp8(q, scale, weight, weight_scale, num_tokens)
    checks.latent_norms(weight, torch.bfloat16, q_a_weight=q_a_weight, kv_a_weight=kv_a_weight)
    traced.numbers(eps)
    q_columns, kv_columns = q_a_weight.shape[0], kv_a_weight.shape[0]
    widths = (kv_columns, weight.shape[0] - q_columns - kv_columns)
    return (
        q.new_empty(num_tokens, q_columns, dtype=checks.E4M3 if quantize_q_a else torch.bfloat16),
        reference.empty_scale(num_tokens if quantize_q_a else 0, q_columns, 128, scale_layout, q.device),
        *(q.new_empty(num_tokens, width, dtype=torch.bfloat16) for width in widths),
    )


@define(
    "qkv_a_proj_ag_norm_fp8(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, Tensor q_a_weight,"
    " Tensor kv_a_weight, float eps, SymInt num_tokens, str group_name, *, bool quantize_q_a=False,"
    ' str scale_layout="row", bool complete=False, bool round_scales=False)'
    " -> (Tensor q_a, Tensor q_a_scale, Tensor kv_a, Tensor k_pe)",
    _qkv_a_proj_ag_norm_fp8_fake,
)
def _qkv_a_proj_ag_norm_fp8(
    q,
    scale,
    weight,
    weight_scale,
    q_a_weight,
    kv_a_weight,
    eps,
    num_tokens,
    group_name,
    quantize_q_a=False,
    scale_layout="row",
    complete=False,
    round_scales=False,
):
    workspace = get_workspace(group_name, q.device)
    checks.scale_layout(scale_layout)
    checks.projection(workspace, q, weight, num_tokens, complete, (checks.E4M3,), torch.bfloat16)
    checks.fp8_scales(scale, q)
    checks.weight_scale(weight_scale, weight)
    checks.latent_norms(weight, torch.bfloat16, q_a_weight=q_a_weight, kv_a_weight=kv_a_weight)
    checks.kernel_starts(workspace, q_a_weight=q_a_weight, kv_a_weight=kv_a_weight)
    checks.eps(eps)
    operands = (q, scale, weight, weight_scale, q_a_weight, kv_a_weight, eps, num_tokens)
    options = (quantize_q_a, scale_layout, complete, round_scales)
    return unfused(workspace, reference.qkv_a_proj_ag_norm_fp8, *operands, *options)


@typed
def qkv_a_proj_ag_norm_fp8(
    q,
    scale,
    weight,
    weight_scale,
    q_a_weight,
    kv_a_weight,
    num_tokens,
    eps=1e-6,
    group=None,
    *,
    quantize_q_a=False,
    scale_layout="row",
    complete=False,
    round_scales=False,
):
    """`qkv_a_proj_ag_fp8` and the two latent RMSNorms, split; q_a in fp8 again, for q_b_proj, where that is asked for.

        q_a, kv_a, k_pe = split(all_gather((q * scale) @ (weight * weight_scale).T))
        q_a = rms_norm(q_a, q_a_weight, eps); kv_a = rms_norm(kv_a, kv_a_weight, eps)
        q_a, q_a_scale = e4m3(q_a) with a scale for each 128 columns, if quantize_q_a

    q, scale, weight, weight_scale, complete: as `qkv_a_proj_ag_fp8`. q_a_weight, kv_a_weight: as `qkv_a_proj_ag_norm`,
    bf16 or fp32. scale_layout, round_scales: of q_a_scale, as in `rs_rmsnorm_fp8`, whose formula quantises. Returns
    (q_a, q_a_scale, kv_a, k_pe): q_a [num_tokens, q_lora_rank], bf16 or e4m3; q_a_scale has no rows unless
    quantize_q_a; kv_a and k_pe bf16.
    """
    return _ops.qkv_a_proj_ag_norm_fp8(
        q,
        scale,
        weight,
        weight_scale,
        q_a_weight,
        kv_a_weight,
        eps,
        num_tokens,
        resolve_group_name(group),
        quantize_q_a=quantize_q_a,
        scale_layout=scale_layout,
        complete=complete,
        round_scales=round_scales,
    )
