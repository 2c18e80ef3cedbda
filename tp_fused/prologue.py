"""mla_prologue: one call for all that comes before the attention of a layer, made of two of the other ops.

As in ops.py, where the rules stand that all ops keep. Ranks tell each other, and faults name, the ops it is made of.
"""

import torch

from . import checks, reference, traced
from .groups import get_workspace, resolve_group_name
from .registration import define, own_rows, typed, unfused

__all__ = ["mla_prologue", "mla_prologue_fp8"]

_ops = torch.ops.tp_fused


# ---- mla_prologue ----


def _mla_prologue_fake(
    input, residual, norm_weight, qkv_a_weight, q_a_norm_weight, kv_a_norm_weight, eps, group_name, complete=False
):
    traced.normed_reduction(input, residual, norm_weight, eps, name="norm_weight")
    checks.projected_rows(input, qkv_a_weight, "qkv_a_weight")
    checks.latent_norms(qkv_a_weight, q_a_norm_weight=q_a_norm_weight, kv_a_norm_weight=kv_a_norm_weight)
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


# ---- mla_prologue_fp8 ----


def _mla_prologue_fp8_fake(
    input,
    residual,
    norm_weight,
    qkv_a_weight,
    weight_scale,
    q_a_norm_weight,
    kv_a_norm_weight,
    eps,
    group_name,
    quantize_q_a=False,
    scale_layout="row",
    round_scales=False,
    complete=False,
):
    checks.scale_layout(scale_layout)
    traced.normed_reduction(input, residual, norm_weight, eps, name="norm_weight")
    checks.projected_rows(input, qkv_a_weight, "qkv_a_weight", checks.E4M3)
    checks.weight_scale(weight_scale, qkv_a_weight)
    norms = {"q_a_norm_weight": q_a_norm_weight, "kv_a_norm_weight": kv_a_norm_weight}
    checks.latent_norms(qkv_a_weight, torch.bfloat16, **norms)
    num_tokens, q_columns, kv_columns = input.shape[0], q_a_norm_weight.shape[0], kv_a_norm_weight.shape[0]
    widths = (kv_columns, qkv_a_weight.shape[0] - q_columns - kv_columns)
    return (
        input.new_empty(num_tokens, q_columns, dtype=checks.E4M3 if quantize_q_a else torch.bfloat16),
        reference.empty_scale(num_tokens if quantize_q_a else 0, q_columns, 128, scale_layout, input.device),
        *(input.new_empty(num_tokens, width, dtype=torch.bfloat16) for width in widths),
        input.new_empty(own_rows(input, num_tokens, group_name), input.shape[1]),
    )


@define(
    "mla_prologue_fp8(Tensor input, Tensor? residual, Tensor norm_weight, Tensor qkv_a_weight, Tensor weight_scale,"
    " Tensor q_a_norm_weight, Tensor kv_a_norm_weight, float eps, str group_name, *, bool quantize_q_a=False,"
    ' str scale_layout="row", bool round_scales=False, bool complete=False)'
    " -> (Tensor q_a, Tensor q_a_scale, Tensor kv_a, Tensor k_pe, Tensor residual_out)",
    _mla_prologue_fp8_fake,
)
def _mla_prologue_fp8(
    input,
    residual,
    norm_weight,
    qkv_a_weight,
    weight_scale,
    q_a_norm_weight,
    kv_a_norm_weight,
    eps,
    group_name,
    quantize_q_a=False,
    scale_layout="row",
    round_scales=False,
    complete=False,
):
    workspace = get_workspace(group_name, input.device)
    checks.scale_layout(scale_layout)
    residual = checks.normed_reduction(workspace, input, residual, norm_weight, eps, 0.0, name="norm_weight")
    shape = (input.shape[0], torch.bfloat16)
    checks.projection_weight(workspace, input, qkv_a_weight, *shape, name="qkv_a_weight", dtype=checks.E4M3)
    checks.weight_scale(weight_scale, qkv_a_weight)
    norms = {"q_a_norm_weight": q_a_norm_weight, "kv_a_norm_weight": kv_a_norm_weight}
    checks.latent_norms(qkv_a_weight, torch.bfloat16, **norms)
    checks.kernel_starts(workspace, **norms)
    weights = (norm_weight, qkv_a_weight, weight_scale, q_a_norm_weight, kv_a_norm_weight)
    options = (quantize_q_a, scale_layout, round_scales, complete)
    return unfused(workspace, reference.mla_prologue_fp8, input, residual, *weights, eps, *options)


@typed
def mla_prologue_fp8(
    input,
    residual,
    norm_weight,
    qkv_a_weight,
    weight_scale,
    q_a_norm_weight,
    kv_a_norm_weight,
    eps=1e-6,
    group=None,
    *,
    quantize_q_a=False,
    scale_layout="row",
    round_scales=False,
    complete=False,
):
    """`mla_prologue` with an fp8 projection: the normed rows are quantised, and q_a again where that is asked for.

        x = all_reduce(input); residual = residual + x; hidden = rms_norm(residual, norm_weight, eps)
        q, scale = e4m3(hidden) with a scale for each 128 columns
        q_a, kv_a, k_pe = split((q * scale) @ (qkv_a_weight * weight_scale).T), normed as in `mla_prologue`
        q_a, q_a_scale = e4m3(q_a) with a scale for each 128 columns, if quantize_q_a

    Few tokens: `rs_rmsnorm_ag_fp8`, then `qkv_a_proj_ag_norm_fp8(complete=True)`; many: `rs_rmsnorm_fp8`, then
    `qkv_a_proj_ag_norm_fp8`; which, by the rule of `mla_prologue`. Arguments as there, and qkv_a_weight and
    weight_scale as `qkv_a_proj_ag_fp8`'s weight, the latent norms' weights bf16 or fp32. round_scales: of both
    quantisations; scale_layout: of q_a_scale. Returns (q_a, q_a_scale, kv_a, k_pe, residual_out).
    """
    return _ops.mla_prologue_fp8(
        input,
        residual,
        norm_weight,
        qkv_a_weight,
        weight_scale,
        q_a_norm_weight,
        kv_a_norm_weight,
        eps,
        resolve_group_name(group),
        quantize_q_a=quantize_q_a,
        scale_layout=scale_layout,
        round_scales=round_scales,
        complete=complete,
    )
