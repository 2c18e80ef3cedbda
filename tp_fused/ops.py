"""The ops that reduce and gather rows: schema, border checks, fake kernel, and the Python wrapper with the docstring.
Those that project are in projections.py.

Each op is registered as `torch.ops.tp_fused.<name>` (what engines and compiled graphs call) and wrapped as
`tp_fused.<name>` (what people call: a ProcessGroup instead of a name, defaults). Calls are served in
csrc/torch_ops.cpp. What is written here gets those that it refuses, says what is wrong with them, and runs the
reference backend.

In all of them rows are split as `torch.tensor_split` splits them; a rank may own none and still takes part. Inputs are
never written. Ops that meet trouble between ranks raise `CollectiveFault`; on bad arguments they raise ValueError or
TypeError before anything is launched, and where they are traced, as far as that can be known there. Inference only: no
output asks for a gradient, and autocast changes nothing.
"""

import torch

from . import checks, reference, traced
from .groups import get_workspace, resolve_group_name
from .registration import define, own_rows, typed, unfused

__all__ = [
    "all_gather_rows",
    "reduce_scatter_rows",
    "rs_rmsnorm",
    "rs_rmsnorm_ag",
    "rs_rmsnorm_ag_fp8",
    "rs_rmsnorm_fp8",
]

_ops = torch.ops.tp_fused


# ---- rs_rmsnorm ----


def _rs_rmsnorm_fake(input, residual, weight, eps, group_name, complete=False, weight_offset=0.0):
    traced.normed_reduction(input, residual, weight, eps, weight_offset)
    shape = (own_rows(input, input.shape[0], group_name), input.shape[1])
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


@typed
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
    round_scales=False,
):
    traced.quantised_reduction(input, residual, weight, eps, weight_offset, group_size, scale_layout)
    num_rows, hidden_size = own_rows(input, input.shape[0], group_name), input.shape[1]
    return (
        input.new_empty(num_rows, hidden_size, dtype=checks.E4M3),
        reference.empty_scale(num_rows, hidden_size, group_size, scale_layout, input.device),
        input.new_empty(num_rows, hidden_size),
        input.new_empty(num_rows if keep_output else 0, hidden_size),
    )


@define(
    "rs_rmsnorm_fp8(Tensor input, Tensor? residual, Tensor weight, float eps, str group_name, *, int group_size=128,"
    ' str scale_layout="row", bool keep_output=False, bool complete=False, float weight_offset=0.0,'
    " bool round_scales=False)"
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
    round_scales=False,
):
    workspace = get_workspace(group_name, input.device)
    residual = checks.normed_reduction(workspace, input, residual, weight, eps, weight_offset)
    checks.quantisation(workspace, group_size, scale_layout, input.shape[1])
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
        round_scales,
    )


@typed
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
    round_scales=False,
):
    """Reduce-scatter, residual add, RMSNorm and fp8 quantisation in one kernel.

        output, residual = rs_rmsnorm(input, residual, weight, eps, weight_offset=weight_offset)
        amax = max(|output|) of each group_size columns
        scale = amax / 448;  q = e4m3(output * (448 / amax))

    Arguments as `rs_rmsnorm`. What is quantised is the output as it would have been stored. Both quotients and the
    product are fp32, each rounded once; 448 / amax is at most the largest finite number, and 0 for a group of zeros,
    whose scale is 0. q has the same bits on every backend. scale is one per token and group: layout "row" is
    [rows, groups] row-major; "column" is column-major with rows padded to a multiple of 4, as DeepGEMM's TMA loads
    want.

    Others: DeepGEMM's per-token cast multiplies by 1 / scale, and takes an amax of at least 1e-4; transformers'
    fine-grained quantiser divides by scale. From that amax on the scales of both are these, to the bit; of q, one
    element in some thousands is the next number, and none with round_scales. Smaller groups keep their own scale here.

    group_size: on cuda 64, 128 or, for one scale a token, hidden_size or more.

    round_scales: amax / 448 is rounded up to a power of two, 2^-126 at least (UE8M0, which DeepSeek-V3.1 and later are
    trained with), and q = e4m3(output / scale). A scale that is not finite is not rounded.

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
        round_scales=round_scales,
    )


# ---- rs_rmsnorm_ag ----


def _rs_rmsnorm_ag_fake(input, residual, weight, eps, group_name, weight_offset=0.0):
    traced.normed_reduction(input, residual, weight, eps, weight_offset)
    residual_out = input.new_empty(own_rows(input, input.shape[0], group_name), input.shape[1])
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


@typed
def rs_rmsnorm_ag(input, residual, weight, eps=1e-6, group=None, *, weight_offset=0.0):
    """All-reduce, residual add and RMSNorm in one kernel, with the residual left scattered.

        x = reduce_scatter(input); residual = residual + x; output = all_gather(rms_norm(residual, weight, eps))

    Arguments as `rs_rmsnorm`. Returns (output, residual_out): output [num_tokens, hidden_size] on every rank,
    residual_out [rows of this rank, hidden_size]. For the attention -> MLP boundary and the final norm.
    """
    return _ops.rs_rmsnorm_ag(input, residual, weight, eps, resolve_group_name(group), weight_offset=weight_offset)


# ---- rs_rmsnorm_ag_fp8 ----


def _rs_rmsnorm_ag_fp8_fake(
    input,
    residual,
    weight,
    eps,
    group_name,
    group_size=128,
    scale_layout="row",
    keep_output=False,
    weight_offset=0.0,
    round_scales=False,
):
    traced.quantised_reduction(input, residual, weight, eps, weight_offset, group_size, scale_layout)
    num_tokens, hidden_size = input.shape
    rows = own_rows(input, num_tokens, group_name)
    return (
        input.new_empty(num_tokens, hidden_size, dtype=checks.E4M3),
        reference.empty_scale(num_tokens, hidden_size, group_size, scale_layout, input.device),
        input.new_empty(rows, hidden_size),
        input.new_empty(rows if keep_output else 0, hidden_size),
    )


@define(
    "rs_rmsnorm_ag_fp8(Tensor input, Tensor? residual, Tensor weight, float eps, str group_name, *, int group_size=128,"
    ' str scale_layout="row", bool keep_output=False, float weight_offset=0.0, bool round_scales=False)'
    " -> (Tensor q, Tensor scale, Tensor residual_out, Tensor output)",
    _rs_rmsnorm_ag_fp8_fake,
)
def _rs_rmsnorm_ag_fp8(
    input,
    residual,
    weight,
    eps,
    group_name,
    group_size=128,
    scale_layout="row",
    keep_output=False,
    weight_offset=0.0,
    round_scales=False,
):
    workspace = get_workspace(group_name, input.device)
    residual = checks.normed_reduction(workspace, input, residual, weight, eps, weight_offset)
    checks.quantisation(workspace, group_size, scale_layout, input.shape[1])
    scales = -(-input.shape[1] // group_size)
    checks.capacity(workspace, input, input.shape[0], scales, torch.float32, name="scales of a row")
    arguments = (input, residual, weight, eps, weight_offset, group_size, scale_layout, keep_output, round_scales)
    return unfused(workspace, reference.rs_rmsnorm_ag_fp8, *arguments)


@typed
def rs_rmsnorm_ag_fp8(
    input,
    residual,
    weight,
    eps=1e-6,
    group=None,
    *,
    group_size=128,
    scale_layout="row",
    keep_output=False,
    weight_offset=0.0,
    round_scales=False,
):
    """`rs_rmsnorm_fp8` with the quantised rows and their scales gathered: half the bytes of `rs_rmsnorm_ag`.

        q, scale, residual_out, output = rs_rmsnorm_fp8(input, residual, weight, eps, ...)
        q, scale = all_gather(q), all_gather(scale)

    Arguments as `rs_rmsnorm_fp8`. Returns (q, scale, residual_out, output): q [num_tokens, hidden_size] and its scales
    on every rank; residual_out [rows of this rank, hidden_size]; output, where it is kept, this rank's normed rows
    before they were quantised, for a router whose logits are gathered afterwards. For the attention -> MLP boundary of
    fp8 models.

    On CUDA it goes one of three ways, which `tp_fused.explain` tells. Of the fewest tokens it is one kernel, in which
    every rank adds up and quantises all rows; faults name it `rs_rmsnorm_fp8`. Of few rows a block, in bf16, groups of
    128 and without output, it is `rs_rmsnorm_ag`, after which every rank quantises all rows. Else it is
    `rs_rmsnorm_fp8` and then `all_gather_rows`, as on the CPU. Faults name the op that the rank was in. The scales of a
    row have to fit into a row of the workspace: only those of very narrow groups do not.
    """
    return _ops.rs_rmsnorm_ag_fp8(
        input,
        residual,
        weight,
        eps,
        resolve_group_name(group),
        group_size=group_size,
        scale_layout=scale_layout,
        keep_output=keep_output,
        weight_offset=weight_offset,
        round_scales=round_scales,
    )


# ---- reduce_scatter_rows, all_gather_rows ----


def _reduce_scatter_rows_fake(input, group_name, residual=None):
    traced.reduction(input, residual)
    return input.new_empty(own_rows(input, input.shape[0], group_name), input.shape[1])


@define(
    "reduce_scatter_rows(Tensor input, str group_name, *, Tensor? residual=None) -> Tensor", _reduce_scatter_rows_fake
)
def _reduce_scatter_rows(input, group_name, residual=None):
    workspace = get_workspace(group_name, input.device)
    residual = checks.reduction(workspace, input, residual)
    return unfused(workspace, reference.reduce_scatter_rows, input, residual)


@typed
def reduce_scatter_rows(input, group=None, *, residual=None):
    """Reduce-scatter over the token dimension, any token count.

        output = tensor_split(sum over ranks of input + residual)[rank]

    input: this rank's partial sum [num_tokens, hidden_size]. residual: None, [num_tokens, hidden_size], or this rank's
    rows of it. Returns [rows of this rank, hidden_size], added in fp32 in rank order, the residual last, and rounded
    once.
    """
    return _ops.reduce_scatter_rows(input, resolve_group_name(group), residual=residual)


def _all_gather_rows_fake(input, num_tokens, group_name):
    checks.rows("input", input, checks.GATHERED)
    checks.token_count(num_tokens)
    return input.new_empty(num_tokens, input.shape[1])


@define("all_gather_rows(Tensor input, SymInt num_tokens, str group_name) -> Tensor", _all_gather_rows_fake)
def _all_gather_rows(input, num_tokens, group_name):
    workspace = get_workspace(group_name, input.device)
    checks.rows("input", input, checks.GATHERED)
    checks.capacity(workspace, input, num_tokens, input.shape[1], name="input.shape[1]")
    checks.local_rows(workspace, "input", input, num_tokens)
    return unfused(workspace, reference.all_gather_rows, input, num_tokens)


@typed
def all_gather_rows(input, num_tokens, group=None):
    """All-gather of scattered rows, any token count.

        output = cat(every rank's input)

    input: this rank's rows of num_tokens, bf16, fp16, fp32, e4m3 or uint8. Returns [num_tokens, columns].
    """
    return _ops.all_gather_rows(input, num_tokens, resolve_group_name(group))
