"""The modules that replace transformers' own, in a decoder of any kind of attention."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .sharding import Shards
from .tensor_parallel import TensorParallel


class Stream(NamedTuple):
    """What travels between decoder layers in the place of hidden states."""

    partial: torch.Tensor  # [batch, length, hidden_size]: this rank's part of a sum
    residual: torch.Tensor | None  # [rows, hidden_size]: all rows or this rank's, as the way has it


def as_stream(hidden_states: torch.Tensor | Stream) -> Stream:
    """What comes first, a layer or, of no layers, the final norm, gets the embedding's partial sum."""
    return hidden_states if isinstance(hidden_states, Stream) else Stream(hidden_states, None)


class VocabParallelEmbedding(nn.Module):
    """This rank's part of the vocabulary. Called from outside of a forward, on all ranks, it returns whole rows."""

    def __init__(self, tp: TensorParallel, shards: Shards, embedding: nn.Embedding):
        super().__init__()
        self.tp = tp
        self.vocab_size = embedding.num_embeddings
        self.own = shards.share(self.vocab_size)
        self.weight = shards.take(embedding.weight, self.own)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = self.partial(input_ids)
        dist.all_reduce(rows, group=self.tp.group)
        return rows

    def partial(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The rows of this rank's tokens, zero for others."""
        below = (input_ids >= 0) & (input_ids < self.own.start)
        above = (input_ids >= self.own.stop) & (input_ids < self.vocab_size)
        others = below | above  # not the ids outside of the vocabulary: those shall raise, on every rank
        rows = F.embedding((input_ids - self.own.start).masked_fill(others, 0), self.weight)
        return rows.masked_fill_(others.unsqueeze(-1), 0)


class DecoderLayer(nn.Module):
    """A layer from partial sum to partial sum. Both blocks end in one; the next norm's op completes it.

    A kind of attention has `attend`, `shares`, and `latent_size`: the widest rows that its ops have beside the hidden
    ones.
    """

    def __init__(self, tp: TensorParallel, shards: Shards, layer: nn.Module):
        super().__init__()
        self.tp = tp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        shards.feed_forward(self.mlp)

    @staticmethod
    def latent_size(config) -> int | None:
        return None

    @staticmethod
    def shares(attention: nn.Module, shards: Shards) -> dict[str, slice]:
        """By name, of each projection that heads are split in: this rank's rows, of o_proj its columns."""
        raise NotImplementedError

    def attend(self, rows, residual, shape, kwargs) -> tuple[tuple, torch.Tensor]:
        """-> (what the attention returns; residual)"""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor | Stream, **kwargs):
        stream = as_stream(hidden_states)
        shape = stream.partial.shape[:2]
        attention, residual = self.attend(stream.partial.flatten(0, 1), stream.residual, shape, kwargs)
        attended, _, *others = attention
        norm = self.post_attention_layernorm
        rows, residual = self.tp.program.norm_rows(attended.flatten(0, 1), residual, norm)
        stream = Stream(self.mlp(rows.unflatten(0, shape)), residual)
        return (stream, *others) if others else stream  # some attentions hand on more than hidden states


class FinalNorm(nn.Module):
    """Completes the last layer's sum and normalises all rows, on every rank."""

    def __init__(self, tp: TensorParallel, norm: nn.Module):
        super().__init__()
        self.tp, self.norm = tp, norm

    def forward(self, hidden_states: torch.Tensor | Stream) -> torch.Tensor:
        stream = as_stream(hidden_states)
        rows, _ = self.tp.program.norm_rows(stream.partial.flatten(0, 1), stream.residual, self.norm)
        return rows.unflatten(0, stream.partial.shape[:2])
