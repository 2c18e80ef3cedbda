"""Layers of multi-head latent attention: DeepSeek-V2 and V3, Kimi-K2 (V3's class), GLM's MLA models.

The latent projections are one replicated weight, which multiplies scattered rows. So are, in models with sparse
attention (GLM-5), the two projections of the indexer that read hidden states: they join it as further columns.
"""

import torch
from torch import nn

from .layers import DecoderLayer
from .programs import rms_norm
from .sharding import Shards, frozen


class LatentProjection(nn.Module):
    """q_a and kv_a, and the indexer's projections, as one replicated projection; and the two latent norms."""

    def __init__(self, shards: Shards, attention: nn.Module, replicated: list[nn.Linear]):
        super().__init__()
        self.weight = frozen(torch.cat([shards.read(linear.weight) for linear in replicated]))
        biases = [
            torch.zeros_like(self.weight[: linear.out_features, 0]) if linear.bias is None else shards.read(linear.bias)
            for linear in replicated
        ]
        self.bias = frozen(torch.cat(biases)) if any(linear.bias is not None for linear in replicated) else None
        self.q_norm, self.kv_norm = attention.q_a_layernorm, attention.kv_a_layernorm
        norms = [norm for norm in (self.q_norm, self.kv_norm) if norm is not None]
        self.norms_fuse = self.bias is None and len({norm.variance_epsilon for norm in norms}) == 1
        q_columns, kv_columns = (0 if norm is None else norm.weight.shape[0] for norm in (self.q_norm, self.kv_norm))
        self.widths = [q_columns, kv_columns, self.weight.shape[0] - q_columns - kv_columns]

    def normed(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_a, kv_a, rest = columns.split(self.widths, dim=-1)
        return q_a if self.q_norm is None else rms_norm(q_a, self.q_norm), rms_norm(kv_a, self.kv_norm), rest


class Handed(nn.Module):
    """Stands in for a projection: the attention calls it, and gets what the layer has computed already."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.value = None
        self.weight = nn.Buffer(torch.empty(0, dtype=dtype), persistent=False)  # whose dtype an indexer asks for

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, self.value = self.value, None
        return value


class LatentAttentionLayer(DecoderLayer):
    def __init__(self, tp, shards: Shards, layer: nn.Module):
        super().__init__(tp, shards, layer)
        attention = self.self_attn
        indexer = getattr(attention, "indexer", None)
        read_hidden = [] if indexer is None else [indexer.wk, indexer.weights_proj]
        latents = [linear for linear in (attention.q_a_proj, attention.kv_a_proj_with_mqa) if linear is not None]
        self.latent = LatentProjection(shards, attention, [*latents, *read_hidden])
        self.rest_widths = [attention.qk_rope_head_dim, *(linear.out_features for linear in read_hidden)]
        self.handed = [Handed(self.latent.weight.dtype) for _ in self.rest_widths]
        _shard(shards, attention, indexer, self.handed)

    @staticmethod
    def latent_size(config) -> int:
        indexed = getattr(config, "index_head_dim", 0) + getattr(config, "index_n_heads", 0)
        return (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_rope_head_dim + indexed

    def attend(self, rows, residual, shape, kwargs):
        program = self.tp.program
        queries, kv_a, rest, residual = program.attention_input(rows, residual, self.input_layernorm, self.latent)
        k_pe, *indexed = rest.split(self.rest_widths, dim=-1)
        for handed, value in zip(self.handed, (torch.cat([kv_a, k_pe], dim=-1), *indexed), strict=True):
            handed.value = value.unflatten(0, shape)
        return self.self_attn(hidden_states=queries.unflatten(0, shape), **kwargs), residual


def _shard(shards: Shards, attention: nn.Module, indexer: nn.Module | None, handed: list[Handed]) -> None:
    queries = attention.q_b_proj if getattr(attention, "q_proj", None) is None else attention.q_proj
    num_heads = attention.num_heads
    shards.column_parallel(queries, shards.share(num_heads, attention.qk_head_dim))
    shards.column_parallel(
        attention.kv_b_proj, shards.share(num_heads, attention.qk_nope_head_dim + attention.v_head_dim)
    )
    shards.row_parallel(attention.o_proj, shards.share(num_heads, attention.v_head_dim))
    own = shards.share(num_heads)
    attention.num_heads = own.stop - own.start
    # The latents come in computed and normalised; the attention's own steps to them fall away.
    if attention.q_a_proj is not None:
        attention.q_a_proj, attention.q_a_layernorm = nn.Identity(), nn.Identity()
    attention.kv_a_proj_with_mqa, attention.kv_a_layernorm = handed[0], nn.Identity()
    if indexer is not None:
        indexer.wk, indexer.weights_proj = handed[1:]
