"""Tensors to pointers to `_C`: one function an op, under the op's own name.

The arguments have been checked (checks.py) and `residual` is this rank's rows. Outputs are allocated here, and on CUDA
this rank's rows of a projection before they are gathered; no other memory is.
"""

import functools
import warnings

import torch

from . import partition, reference

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"tp_fused's native library is missing or does not load: build it with `pip install .`, or `make build` in a "
        f"checkout ({error})"
    ) from error

NEWEST_TESTED_TORCH = (2, 13)
if tuple(map(int, torch.__version__.split(".")[:2])) > NEWEST_TESTED_TORCH:
    warnings.warn(
        f"torch {torch.__version__} is newer than {'.'.join(map(str, NEWEST_TESTED_TORCH))}, the newest that this "
        f"tp_fused was tested with: run its tests (pytest -m smoke) before you rely on it",
        stacklevel=2,
    )

DTYPE_CODES = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.uint8: 4,
}


def _own_rows(workspace, num_tokens: int) -> int:
    return partition.row_count(num_tokens, workspace.rank, workspace.world_size)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(workspace) -> int:
    """The CUDA stream that torch launches on now; the CPU backend takes none."""
    return 0 if workspace.device_index is None else torch._C._cuda_getCurrentRawStream(workspace.device_index)


def _variant(residual: torch.Tensor | None, complete: bool = False) -> int:
    return (_C.RESIDUAL if residual is not None else 0) | (_C.COMPLETE if complete else 0)


def _done(workspace, status: int) -> None:
    if status:
        workspace.check()
        raise RuntimeError(f"tp_fused: status {status} without a fault record")


def rs_rmsnorm(workspace, input, residual, weight, eps, complete):
    num_tokens, hidden_size = input.shape
    output = input.new_empty(_own_rows(workspace, num_tokens), hidden_size)
    residual_out = torch.empty_like(output)
    status = _C.rs_rmsnorm(
        _address(output),
        _address(residual_out),
        _address(input),
        _address(residual),
        _address(weight),
        workspace.team,
        num_tokens,
        hidden_size,
        DTYPE_CODES[input.dtype],
        eps,
        _variant(residual, complete),
        _stream(workspace),
    )
    _done(workspace, status)
    return output, residual_out


def rs_rmsnorm_fp8(workspace, input, residual, weight, eps, group_size, scale_layout, keep_output, complete):
    num_tokens, hidden_size = input.shape
    num_rows = _own_rows(workspace, num_tokens)
    q = input.new_empty(num_rows, hidden_size, dtype=torch.float8_e4m3fn)
    scale = reference.empty_scale(num_rows, hidden_size, group_size, scale_layout, input.device)
    residual_out = input.new_empty(num_rows, hidden_size)
    output = input.new_empty(num_rows if keep_output else 0, hidden_size)
    column = scale_layout == "column"
    variant = _variant(residual, complete) | column * _C.COLUMN_SCALES | keep_output * _C.KEEP_OUTPUT
    status = _C.rs_rmsnorm_fp8(
        _address(q),
        _address(scale),
        _address(residual_out),
        _address(output),
        _address(input),
        _address(residual),
        _address(weight),
        workspace.team,
        num_tokens,
        hidden_size,
        DTYPE_CODES[input.dtype],
        eps,
        group_size,
        1 if column else scale.shape[1],
        reference.scale_pitch(num_rows) if column else 1,
        variant,
        _stream(workspace),
    )
    _done(workspace, status)
    return q, scale, residual_out, output


def rs_rmsnorm_ag(workspace, input, residual, weight, eps):
    num_tokens, hidden_size = input.shape
    output = torch.empty_like(input)
    residual_out = input.new_empty(_own_rows(workspace, num_tokens), hidden_size)
    status = _C.rs_rmsnorm_ag(
        _address(output),
        _address(residual_out),
        _address(input),
        _address(residual),
        _address(weight),
        workspace.team,
        num_tokens,
        hidden_size,
        DTYPE_CODES[input.dtype],
        eps,
        _variant(residual),
        _stream(workspace),
    )
    _done(workspace, status)
    return output, residual_out


def reduce_scatter_rows(workspace, input):
    num_tokens, hidden_size = input.shape
    output = input.new_empty(_own_rows(workspace, num_tokens), hidden_size)
    status = _C.reduce_scatter_rows(
        _address(output),
        _address(input),
        workspace.team,
        num_tokens,
        hidden_size,
        DTYPE_CODES[input.dtype],
        _stream(workspace),
    )
    _done(workspace, status)
    return output


def all_gather_rows(workspace, input, num_tokens):
    columns = input.shape[1]
    output = input.new_empty(num_tokens, columns)
    status = _C.all_gather_rows(
        _address(output),
        _address(input),
        workspace.team,
        num_tokens,
        columns,
        DTYPE_CODES[input.dtype],
        _stream(workspace),
    )
    _done(workspace, status)
    return output


def _next_slot(workspace, num_rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """This rank's staging rows of the next round: what is computed into them need not be copied there."""
    workspace.check()  # after a fault a late peer may still read there
    count = num_rows * columns
    if count == 0:
        return torch.empty(num_rows, columns, dtype=dtype)
    memory = workspace.team.next_slot(count * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(num_rows, columns)


@functools.cache
def triton_projection():
    """(tp_fused.triton.qkv_a_proj_ag, None), or (None, what keeps it from being there)."""
    try:
        from .triton import qkv_a_proj_ag as module
    except ImportError as error:
        return None, str(error)
    return module, None


def _project(workspace, input, weight, bias=None) -> torch.Tensor:
    """This rank's rows of the product; on the CPU they lie in its slot of the next round."""
    with torch.no_grad():  # a product with out= refuses inputs that ask for gradients; the ops have none
        if workspace.backend == "cuda":
            return torch.nn.functional.linear(input, weight, bias)
        rows = _next_slot(workspace, input.shape[0], weight.shape[0], input.dtype)
        if bias is None:
            return torch.mm(input, weight.t(), out=rows)
        return torch.addmm(bias, input, weight.t(), out=rows)


def _project_fp8(workspace, q, scale, weight, weight_scale) -> torch.Tensor:
    """The same of fp8 rows. A Triton kernel is compiled at its first call: not while a graph is being captured."""
    shape = q.shape[0], weight.shape[0]
    if workspace.backend == "cuda" and (module := triton_projection()[0]):
        rows = q.new_empty(shape, dtype=torch.bfloat16)
        return module.project_fp8(q, scale, weight, weight_scale, out=rows, max_ctas=workspace.max_ctas)
    product = reference.project_fp8(q, scale, weight, weight_scale)
    return product if workspace.backend == "cuda" else _next_slot(workspace, *shape, torch.bfloat16).copy_(product)


def _project_and_gather(
    workspace,
    op,
    outputs,
    input,
    weight,
    num_tokens,
    scale=None,
    weight_scale=None,
    bias=None,
    norms=(None, None),
    eps=0.0,
) -> bool:
    """Product and gather in one kernel. False, and nothing launched, where that does not serve: csrc/cuda knows."""
    if workspace.backend != "cuda":
        return False
    columns, hidden_size = weight.shape
    status = _C.project_and_gather(
        op,
        [_address(output) for output in (*outputs, None, None)[:3]],
        _address(input),
        _address(scale),
        *((0, 0) if scale is None else scale.stride()),
        _address(weight),
        _address(weight_scale),
        _address(bias),
        *map(_address, norms),
        workspace.team,
        num_tokens,
        hidden_size,
        columns,
        DTYPE_CODES[input.dtype],
        *(0 if norm is None else norm.numel() for norm in norms),
        eps,
        _stream(workspace),
    )
    if status is None:
        return False
    _done(workspace, status)
    return True


def qkv_a_proj_ag(workspace, input, weight, num_tokens, bias):
    columns, hidden_size = weight.shape
    latent = input.new_empty(num_tokens, columns)
    if _project_and_gather(workspace, _C.QKV_A_PROJ_AG, [latent], input, weight, num_tokens, bias=bias):
        return latent
    rows = _project(workspace, input, weight, bias)
    status = _C.qkv_a_proj_ag(
        _address(latent),
        _address(rows),
        workspace.team,
        num_tokens,
        hidden_size,
        columns,
        DTYPE_CODES[input.dtype],
        bias is not None,
        _stream(workspace),
    )
    _done(workspace, status)
    return latent


def qkv_a_proj_ag_fp8(workspace, q, scale, weight, weight_scale, num_tokens):
    columns, hidden_size = weight.shape
    latent = q.new_empty(num_tokens, columns, dtype=torch.bfloat16)
    if _project_and_gather(workspace, _C.QKV_A_PROJ_AG_FP8, [latent], q, weight, num_tokens, scale, weight_scale):
        return latent
    rows = _project_fp8(workspace, q, scale, weight, weight_scale)
    status = _C.qkv_a_proj_ag_fp8(
        _address(latent),
        _address(rows),
        workspace.team,
        num_tokens,
        hidden_size,
        columns,
        _stream(workspace),
    )
    _done(workspace, status)
    return latent


def qkv_a_proj_ag_norm(workspace, input, weight, q_a_weight, kv_a_weight, eps, num_tokens):
    columns, hidden_size = weight.shape
    q_columns, kv_columns = q_a_weight.numel(), kv_a_weight.numel()
    q_a = input.new_empty(num_tokens, q_columns)
    kv_a = input.new_empty(num_tokens, kv_columns)
    k_pe = input.new_empty(num_tokens, columns - q_columns - kv_columns)
    outputs, norms = (q_a, kv_a, k_pe), (q_a_weight, kv_a_weight)
    if _project_and_gather(workspace, _C.QKV_A_PROJ_AG_NORM, outputs, input, weight, num_tokens, norms=norms, eps=eps):
        return outputs
    rows = _project(workspace, input, weight)
    status = _C.qkv_a_proj_ag_norm(
        _address(q_a),
        _address(kv_a),
        _address(k_pe),
        _address(rows),
        _address(q_a_weight),
        _address(kv_a_weight),
        workspace.team,
        num_tokens,
        hidden_size,
        columns,
        DTYPE_CODES[input.dtype],
        q_columns,
        kv_columns,
        eps,
        _stream(workspace),
    )
    _done(workspace, status)
    return outputs
