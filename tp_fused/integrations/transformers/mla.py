"""Layers of multi-head latent attention: DeepSeek-V2 and V3, Kimi-K2 (V3's class), GLM's MLA models.

The latent projections are one replicated weight, which multiplies scattered rows. So are, in models with sparse
attention (GLM-5), the two projections of the indexer that read hidden states: they join it as further columns.
"""

import math

import torch
from torch import nn

from .latents import latent_projection
from .layers import DecoderLayer
from .sharding import BLOCK, Shards, is_fp8, scaled


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
        latents = [linear for _, linear in replicated(attention)]
        self.latent = latent_projection(shards, attention, latents)
        self.rest_widths = [attention.qk_rope_head_dim, *(linear.out_features for linear in read_hidden)]
        self.handed = [Handed(self.latent.dtype) for _ in self.rest_widths]
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

    @staticmethod
    def shares(attention: nn.Module, shards: Shards) -> dict[str, slice]:
        heads, names = share_heads(attention, shards), _by_heads(attention)
        return {name: scaled(heads, size) for name, size in names.items()}


def replicated(attention: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The projections of hidden states, in the order in which they become one, by name."""
    indexer = getattr(attention, "indexer", None)
    named = [(name, getattr(attention, name)) for name in ("q_a_proj", "kv_a_proj_with_mqa")]
    if indexer is not None:
        named += [(f"indexer.{name}", getattr(indexer, name)) for name in ("wk", "weights_proj")]
    return [(name, linear) for name, linear in named if linear is not None]


def heads_together(attention: nn.Module) -> dict[str, int]:
    """Of each projection: the fewest heads that fill whole blocks of an fp8 weight, which ranks take together."""
    names = _by_heads(attention)
    together = {name: BLOCK // math.gcd(BLOCK, size) for name, size in names.items()}
    return {name: count if is_fp8(getattr(attention, name).weight) else 1 for name, count in together.items()}


def share_heads(attention: nn.Module, shards: Shards) -> slice:
    return shards.share_blocks(attention.num_heads, max(heads_together(attention).values()))


def _by_heads(attention: nn.Module) -> dict[str, int]:
    """Rows of a head, or, of o_proj, columns."""
    queries = "q_b_proj" if getattr(attention, "q_proj", None) is None else "q_proj"
    key_value = attention.qk_nope_head_dim + attention.v_head_dim
    return {queries: attention.qk_head_dim, "kv_b_proj": key_value, "o_proj": attention.v_head_dim}


def _shard(shards: Shards, attention: nn.Module, indexer: nn.Module | None, handed: list[Handed]) -> None:
    own = share_heads(attention, shards)
    shards.attention(attention, LatentAttentionLayer.shares(attention, shards))
    attention.num_heads = own.stop - own.start
    # The latents come in computed and normalised; the attention's own steps to them fall away.
    if attention.q_a_proj is not None:
        attention.q_a_proj, attention.q_a_layernorm = nn.Identity(), nn.Identity()
    attention.kv_a_proj_with_mqa, attention.kv_a_layernorm = handed[0], nn.Identity()
    if indexer is not None:
        indexer.wk, indexer.weights_proj = handed[1:]
