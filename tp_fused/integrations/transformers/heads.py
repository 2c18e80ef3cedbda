"""Layers of plain attention, with grouped key-value heads or without: Llama, Mistral, Qwen2, Qwen3."""

from torch import nn

from ... import partition
from .layers import DecoderLayer
from .sharding import Shards, scaled


class HeadsLayer(DecoderLayer):
    """Queries are projected from whole rows, so both boundaries gather them."""

    def __init__(self, tp, shards: Shards, layer: nn.Module):
        super().__init__(tp, shards, layer)
        attention = self.self_attn
        shares = self.shares(attention, shards)
        shards.attention(attention, shares)
        queries, keys = shares["q_proj"], shares["k_proj"]
        attention.num_key_value_groups = (queries.stop - queries.start) // (keys.stop - keys.start)

    @staticmethod
    def shares(attention, shards):
        config, size = attention.config, attention.head_dim
        heads = (config.num_attention_heads, config.num_key_value_heads)
        queries, keys = (scaled(own, size) for own in share_heads(*heads, shards.rank, shards.world_size))
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}

    def attend(self, rows, residual, shape, kwargs):
        rows, residual = self.tp.program.norm_rows(rows, residual, self.input_layernorm)
        return self.self_attn(hidden_states=rows.unflatten(0, shape), **kwargs), residual


def share_heads(num_heads: int, num_key_value_heads: int, rank: int, world_size: int) -> tuple[slice, slice]:
    """This rank's query heads and the key-value heads that serve them.

    Key-value heads are shared out, each with all of its query heads. Where they are fewer than ranks, the ranks are
    shared out among them: those of one key-value head hold it all, and share out its query heads. So a rank has the
    same number of query heads for each of its key-value heads, as attention kernels want.
    """
    group = num_heads // num_key_value_heads
    if num_key_value_heads >= world_size:
        keys = partition.row_slice(num_key_value_heads, rank, world_size)
        return scaled(keys, group), keys
    ranks = [partition.row_slice(world_size, head, num_key_value_heads) for head in range(num_key_value_heads)]
    head = next(head for head, its in enumerate(ranks) if its.start <= rank < its.stop)
    own = partition.row_slice(group, rank - ranks[head].start, ranks[head].stop - ranks[head].start)
    return slice(head * group + own.start, head * group + own.stop), slice(head, head + 1)
