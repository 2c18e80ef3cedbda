"""How the weights of a DeepSeek-V2 or V3 of transformers are split over ranks, in place.

`tp` is the `TensorParallel` of transformers.py, of which `rank` and `share` are asked.
"""

# A submodule of torch.nn.Module may be a tensor, as far as annotations tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import torch
import torch.nn.functional as F
from torch import nn


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def cut(parameter: torch.Tensor, *index) -> nn.Parameter:
    """A part as memory of its own, so that the whole can be freed."""
    return frozen(parameter[index].clone(memory_format=torch.contiguous_format))


def _column_parallel(linear: nn.Linear, own: slice) -> None:
    linear.weight = cut(linear.weight, own)
    if linear.bias is not None:
        linear.bias = cut(linear.bias, own)
    linear.out_features = own.stop - own.start


def _row_parallel(tp, linear: nn.Linear, own: slice) -> None:
    """Leaves the partial sum; the bias is rank 0's to add."""
    linear.weight = cut(linear.weight, slice(None), own)
    if tp.rank != 0:
        linear.bias = None
    linear.in_features = own.stop - own.start


def shard_attention(tp, attention: nn.Module, handed: nn.Module) -> None:
    queries = attention.q_proj if attention.q_a_proj is None else attention.q_b_proj
    num_heads = attention.num_heads
    _column_parallel(queries, tp.share(num_heads, attention.qk_head_dim))
    _column_parallel(attention.kv_b_proj, tp.share(num_heads, attention.qk_nope_head_dim + attention.v_head_dim))
    _row_parallel(tp, attention.o_proj, tp.share(num_heads, attention.v_head_dim))
    own = tp.share(num_heads)
    attention.num_heads = own.stop - own.start
    # The latents come in computed and normalised; the attention's own steps to them fall away.
    if attention.q_a_proj is not None:
        attention.q_a_proj, attention.q_a_layernorm = nn.Identity(), nn.Identity()
    attention.kv_a_proj_with_mqa, attention.kv_a_layernorm = handed, nn.Identity()


def shard_mlp(tp, mlp: nn.Module) -> None:
    own = tp.share(mlp.intermediate_size)
    _column_parallel(mlp.gate_proj, own)
    _column_parallel(mlp.up_proj, own)
    _row_parallel(tp, mlp.down_proj, own)
    mlp.intermediate_size = own.stop - own.start


def shard_experts(tp, experts: nn.Module) -> None:
    """By intermediate columns, padded with zeros, which add nothing: grouped GEMMs take rows of whole 16 bytes only."""
    size = experts.intermediate_dim
    own = tp.share(size)
    padding = -(own.stop - own.start) % (16 // experts.down_proj.element_size())
    gate_up = experts.gate_up_proj.unflatten(1, (2, size))[:, :, own]
    experts.gate_up_proj = frozen(F.pad(gate_up, (0, 0, 0, padding)).flatten(1, 2))
    experts.down_proj = frozen(F.pad(experts.down_proj[..., own], (0, padding)))
    experts.intermediate_dim = own.stop - own.start + padding
