"""The latent projections of a layer as one replicated weight, and how the programs multiply by it.

In bf16 and the like, or in fine-grained fp8: the ops of the two differ, the steps between them do not.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.finegrained_fp8 import fp8_linear

from ... import ops, projections, prologue
from .fp8_kernels import quantize
from .sharding import BLOCK, Shards, frozen, is_fp8


class LatentProjection(nn.Module):
    """q_a and kv_a, and the indexer's projections, as one replicated projection; and the two latent norms."""

    def __init__(self, shards: Shards, attention: nn.Module, replicated: list[nn.Linear]):
        super().__init__()
        self.weight = frozen(torch.cat([shards.read(linear.weight) for linear in replicated]))
        biases = [
            torch.zeros(linear.out_features, dtype=self.dtype, device=self.weight.device)
            if linear.bias is None
            else shards.read(linear.bias)
            for linear in replicated
        ]
        self.bias = frozen(torch.cat(biases)) if any(linear.bias is not None for linear in replicated) else None
        self.q_norm, self.kv_norm = attention.q_a_layernorm, attention.kv_a_layernorm
        norms = [norm for norm in (self.q_norm, self.kv_norm) if norm is not None]
        self.norms_fuse = self.bias is None and len({norm.variance_epsilon for norm in norms}) == 1
        q_columns, kv_columns = (0 if norm is None else norm.weight.shape[0] for norm in (self.q_norm, self.kv_norm))
        self.widths = [q_columns, kv_columns, self.weight.shape[0] - q_columns - kv_columns]

    @property
    def dtype(self) -> torch.dtype:
        """Of what it makes."""
        return self.weight.dtype

    @property
    def q_norm_weight(self) -> torch.Tensor:
        return self.kv_norm.weight.new_empty(0) if self.q_norm is None else self.q_norm.weight

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, self.weight, self.bias)

    # On the ops. Rows of this rank are what `reduce` or `own` returns.

    def prologue(self, partial, residual, norm, group) -> tuple[torch.Tensor, ...]:
        """-> (q_a, kv_a, the other columns, residual)"""
        weights = (norm.weight, self.weight, self.q_norm_weight, self.kv_norm.weight)
        return prologue.mla_prologue(partial, residual, *weights, self.kv_norm.variance_epsilon, group)

    def reduce(self, partial, residual, norm, group) -> tuple[tuple, torch.Tensor]:
        rows, residual = ops.rs_rmsnorm(partial, residual, norm.weight, norm.variance_epsilon, group)
        return (rows,), residual

    def own(self, rows: torch.Tensor) -> tuple:
        return (rows,)

    def project_normed(self, own: tuple, num_tokens: int, group) -> tuple[torch.Tensor, ...]:
        norms = (self.q_norm_weight, self.kv_norm.weight)
        return projections.qkv_a_proj_ag_norm(
            *own, self.weight, *norms, num_tokens, self.kv_norm.variance_epsilon, group
        )

    def project(self, own: tuple, num_tokens: int, group) -> torch.Tensor:
        return projections.qkv_a_proj_ag(*own, self.weight, num_tokens, group, bias=self.bias)

    def normed(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_a, kv_a, rest = columns.split(self.widths, dim=-1)
        return q_a if self.q_norm is None else rms_norm(q_a, self.q_norm), rms_norm(kv_a, self.kv_norm), rest


class Fp8LatentProjection(LatentProjection):
    """The same of e4m3 weights with a scale for each 128 x 128 block, which multiply rows of e4m3, to bf16.

    Scales of the rows are powers of two where the weights' are (scale_fmt "ue8m0").
    """

    def __init__(self, shards: Shards, attention: nn.Module, replicated: list[nn.Linear]):
        super().__init__(shards, attention, replicated)
        scales = [shards.read(linear.weight_scale_inv) for linear in replicated]
        self.stored_as = scales[0].dtype
        self.weight_scale_inv = frozen(torch.cat([scale.float() for scale in scales]))
        self.round_scales = self.stored_as == torch.float8_e8m0fnu

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def multiply(self, rows):
        return fp8_linear(rows, self.weight, self.weight_scale_inv.to(self.stored_as), [BLOCK, BLOCK], self.bias)

    def prologue(self, partial, residual, norm, group):
        weights = (norm.weight, self.weight, self.weight_scale_inv, self.q_norm_weight, self.kv_norm.weight)
        eps = self.kv_norm.variance_epsilon
        q_a, _, *others = prologue.mla_prologue_fp8(
            partial, residual, *weights, eps, group, round_scales=self.round_scales
        )
        return q_a, *others

    def reduce(self, partial, residual, norm, group):
        q, scale, residual, _ = ops.rs_rmsnorm_fp8(
            partial, residual, norm.weight, norm.variance_epsilon, group, round_scales=self.round_scales
        )
        return (q, scale), residual

    def own(self, rows):
        return quantize(rows, self.round_scales)

    def project_normed(self, own, num_tokens, group):
        weights = (self.weight, self.weight_scale_inv, self.q_norm_weight, self.kv_norm.weight)
        eps = self.kv_norm.variance_epsilon
        q_a, _, kv_a, rest = projections.qkv_a_proj_ag_norm_fp8(*own, *weights, num_tokens, eps, group)
        return q_a, kv_a, rest

    def project(self, own, num_tokens, group):
        columns = projections.qkv_a_proj_ag_fp8(*own, self.weight, self.weight_scale_inv, num_tokens, group)
        return columns if self.bias is None else columns.add_(self.bias)


def latent_projection(shards: Shards, attention: nn.Module, replicated: list[nn.Linear]) -> LatentProjection:
    made = Fp8LatentProjection if is_fp8(replicated[0].weight) else LatentProjection
    return made(shards, attention, replicated)


def rms_norm(rows: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    weight = norm.weight
    wide = rows if weight.dtype == rows.dtype else rows.to(weight.dtype)
    return F.rms_norm(wide, weight.shape, weight, norm.variance_epsilon).to(rows.dtype)
