"""The ops that project rows onto the latent of multi-head latent attention (MLA), and one call for all of its input.

As in ops.py, where the rules stand that all ops keep.
"""

import torch

from . import checks, reference
from .groups import get_workspace, resolve_group_name
from .registration import define, own_rows, typed, unfused

__all__ = ["mla_prologue", "qkv_a_proj_ag", "qkv_a_proj_ag_fp8", "qkv_a_proj_ag_norm"]

_ops = torch.ops.tp_fused


# ---- qkv_a_proj_ag ----


def _qkv_a_proj_ag_fake(input, weight, num_tokens, group_name, bias=None, complete=False):
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
    blocks = tuple(-(-size // 128) for size in weight.shape)
    checks.like("weight_scale", weight_scale, blocks, torch.float32, q.device)
    return unfused(workspace, reference.qkv_a_proj_ag_fp8, q, scale, weight, weight_scale, num_tokens, complete)


@typed
def qkv_a_proj_ag_fp8(q, scale, weight, weight_scale, num_tokens, group=None, *, complete=False):
    """`qkv_a_proj_ag` on fp8 rows and weight with DeepSeek-V3's block scales.

        latent = all_gather((q * scale) @ (weight * weight_scale).T)

    q: e4m3 [rows, hidden_size]; scale: fp32 [rows, ceil(hidden_size / 128)], either layout of `rs_rmsnorm_fp8`.
    weight: e4m3 [columns, hidden_size]; weight_scale: fp32, one per 128 x 128 block, the last may be partial.
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


# ---- mla_prologue ----


def _mla_prologue_fake(
    input, residual, norm_weight, qkv_a_weight, q_a_norm_weight, kv_a_norm_weight, eps, group_name, complete=False
):
    num_tokens, q_columns, kv_columns = input.shape[0], q_a_norm_weight.shape[0], kv_a_norm_weight.shape[0]
    widths = (q_columns, kv_columns, qkv_a_weight.shape[0] - q_columns - kv_columns)
    residual_out = input.new_empty(own_rows(input, num_tokens, group_name), input.shape[1])
    return *(input.new_empty(num_tokens, width) for width in widths), residual_out


@define(
    "mla_prologue(Tensor input, Tensor? residual, Tensor norm_weight, Tensor qkv_a_weight, Tensor q_a_norm_weight,"
    " Tensor kv_a_norm_weight, float eps, str group_name, *, bool complete=False)"
    " -> (Tensor q_a, Tensor kv_a, Tensor k_pe, Tensor residual_out)",
    _mla_prologue_fake,
)
def _mla_prologue(
    input, residual, norm_weight, qkv_a_weight, q_a_norm_weight, kv_a_norm_weight, eps, group_name, complete=False
):
    workspace = get_workspace(group_name, input.device)
    residual = checks.normed_reduction(workspace, input, residual, norm_weight, eps, 0.0, name="norm_weight")
    checks.projection_weight(workspace, input, qkv_a_weight, input.shape[0], name="qkv_a_weight")
    norms = {"q_a_norm_weight": q_a_norm_weight, "kv_a_norm_weight": kv_a_norm_weight}
    checks.latent_norms(qkv_a_weight, **norms)
    checks.kernel_starts(workspace, **norms)
    weights = (norm_weight, qkv_a_weight, q_a_norm_weight, kv_a_norm_weight)
    return unfused(workspace, reference.mla_prologue, input, residual, *weights, eps, complete)


@typed
def mla_prologue(
    input,
    residual,
    norm_weight,
    qkv_a_weight,
    q_a_norm_weight,
    kv_a_norm_weight,
    eps=1e-6,
    group=None,
    *,
    complete=False,
):
    """All that comes before MLA's attention: the last block's partial sum to q_a, kv_a and k_pe, for any token count.

        x = all_reduce(input); residual = residual + x; hidden = rms_norm(residual, norm_weight, eps)
        q_a, kv_a, k_pe = split(hidden @ qkv_a_weight.T)
        q_a = rms_norm(q_a, q_a_norm_weight, eps); kv_a = rms_norm(kv_a, kv_a_norm_weight, eps)

    Few tokens are reduced and gathered (`rs_rmsnorm_ag`), and every rank multiplies all of them by its share of the
    weight (`qkv_a_proj_ag_norm(complete=True)`); of many, every rank multiplies its own by all of the weight
    (`rs_rmsnorm`, `qkv_a_proj_ag_norm`), since the latent is narrower than the rows. Which, num_tokens and the columns
    of the weight decide, the same on all ranks; `explain` tells. The residual stays scattered either way.

    input: this rank's partial sum, [num_tokens, hidden_size]; with complete the full one, the same on every rank.
    residual: None, the full [num_tokens, hidden_size] or this rank's slice. norm_weight: [hidden_size]. qkv_a_weight:
    [columns, hidden_size]. The latent norms' weights as in `qkv_a_proj_ag_norm`. Returns (q_a, kv_a, k_pe,
    residual_out): the latent's parts of all tokens, [num_tokens, ...], and this rank's rows of the residual.
    """
    return _ops.mla_prologue(
        input,
        residual,
        norm_weight,
        qkv_a_weight,
        q_a_norm_weight,
        kv_a_norm_weight,
        eps,
        resolve_group_name(group),
        complete=complete,
    )
