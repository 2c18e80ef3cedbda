"""DeepSeek-V2 and V3 of transformers, tensor-parallel, with the residual kept scattered from first layer to last.

    model = DeepseekV3ForCausalLM.from_pretrained(...)      # unsharded, the same on every rank
    parallelize(model, max_num_tokens=4096)                 # now sharded, in place
    model.generate(...)                                     # on every rank, with the same arguments

The attention, its rotary embedding, the cache, the router and the experts stay transformers' own and see smaller
weights. What is replaced is what lies between them: the embedding, the decoder layer and the final norm. Between those,
a partial sum and the residual travel instead of the hidden states.
"""

# A submodule of torch.nn.Module may be a tensor, as far as annotations tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false, reportReturnType=false

import contextlib
import functools
import inspect
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from .. import ops, partition, projections, prologue
from ..groups import get_workspace, init
from . import sharding

# ---- what callers see ----


def parallelize(
    model: DeepseekV2ForCausalLM | DeepseekV3ForCausalLM,
    group: dist.ProcessGroup | None = None,
    *,
    max_num_tokens: int | None = None,
    way: str = "fused",
    timeout_s: float = 30.0,
) -> "TensorParallel":
    """Shards an unsharded DeepSeek-V2 or V3 model over `group`, in place, and runs its forward on the ops.

        before: all_reduce(x); residual += x; h = rms_norm(residual); latent = h @ qkv_a.T      on all tokens
        after:  mla_prologue                                                                    on this rank's tokens

    Collective: every rank calls it with the same model. Attention is split by heads, the MLPs, shared and routed
    experts by intermediate columns, the embedding by vocabulary, all as `torch.tensor_split` does, so that the sizes
    need not divide. The latent projections are one replicated weight; norms, router and lm_head stay whole. With
    q_lora_rank=None (V2-Lite) the queries need every normalised row, and only the kv latent is scattered.

    max_num_tokens: the most tokens (batch times length) of any forward; makes the group's workspace, with this
    timeout_s, and replaces the one it has. None: the group's own workspace serves. way: see `TensorParallel`.

    Afterwards every rank must call the model with the same tokens, and gets all logits. It is for inference: weights no
    longer require gradients, `output_hidden_states` raises. So does `save_pretrained`: what is left on a rank are its
    shards. `copy.deepcopy` copies these, and shares the group.

    Raises ValueError, before anything is changed, when the model is of another class, quantised, of mixed dtypes, on
    several devices or not on the workspace's, or has fewer heads than there are ranks. A forward of more than
    max_num_tokens tokens raises ValueError.
    """
    if group is None and not dist.is_initialized():
        raise ValueError("no group given and torch.distributed is not initialised")
    group = group if group is not None else dist.group.WORLD
    dtype, device = _check_model(model, group.size())
    if max_num_tokens is not None:
        latent_size = (model.config.q_lora_rank or 0) + model.config.kv_lora_rank + model.config.qk_rope_head_dim
        init(
            group,
            max_num_tokens=max_num_tokens,
            hidden_size=model.config.hidden_size,
            latent_size=latent_size,
            dtype=dtype,
            timeout_s=timeout_s,
            device=device,
        )
    tp = TensorParallel(group, device, way)
    decoder = model.model
    model.eval().requires_grad_(False)
    decoder.embed_tokens = _VocabParallelEmbedding(tp, decoder.embed_tokens)
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = _DecoderLayer(tp, layer)
    decoder.norm = _FinalNorm(tp, decoder.norm)
    parameters = list(inspect.signature(decoder.forward).parameters)
    decoder.register_forward_pre_hook(functools.partial(tp.admit, parameters), with_kwargs=True)
    model.save_pretrained = _refuse_to_save
    return tp


def _refuse_to_save(*_, **__):
    raise NotImplementedError(
        "save_pretrained: a parallelized model holds this rank's shards, under names of their own; save it before "
        "parallelize"
    )


class TensorParallel:
    """What the modules of a parallelized model share; `parallelize` returns it.

    `way` may be set between forwards; all ways run on the same sharded weights:
        "fused"       tp_fused's ops; the residual is scattered
        "all_reduce"  what engines do without: torch.distributed's all-reduce, the residual whole on every rank
        "transport"   "all_reduce", but by `reduce_scatter_rows` and `all_gather_rows`: tells the gain of fusing from
                      the gain of the transport
    `timer`: None, or a function that takes "communication", "rms_norm" or "qkv_a_proj" and returns a context manager,
    which is entered around that part of a forward.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, way: str = "fused"):
        self.group, self.rank, self.world_size = group, group.rank(), group.size()
        self.device = device
        self.timer = None
        self._ways = {
            "all_reduce": _Unfused(self, self._all_reduce),
            "transport": _Unfused(self, self._all_reduce_rows),
            "fused": _Fused(self),
        }
        self.way = way
        get_workspace(group.group_name, device)  # raises where there is none

    def __deepcopy__(self, memo) -> "TensorParallel":
        """A copied model's ranks are the same."""
        return self

    def __reduce__(self):
        raise TypeError(
            "a parallelized model cannot be pickled: it holds this process's group; save it before parallelize"
        )

    @property
    def way(self) -> str:
        return self._way

    @way.setter
    def way(self, way: str) -> None:
        if way not in self._ways:
            raise ValueError(f"way must be one of {', '.join(self._ways)}, got {way!r}")
        self._way, self.program = way, self._ways[way]

    def timed(self, part: str):
        return contextlib.nullcontext() if self.timer is None else self.timer(part)

    def share(self, size: int, unit: int = 1) -> slice:
        """This rank's part of `size` units, in columns."""
        own = partition.row_slice(size, self.rank, self.world_size)
        return slice(own.start * unit, own.stop * unit)

    def admit(self, parameters: list[str], decoder, args, kwargs):
        """Forward pre-hook of the decoder: what cannot run raises here, on all ranks alike."""
        if kwargs.get("output_hidden_states") or getattr(decoder.config, "output_hidden_states", False):
            raise ValueError("output_hidden_states: a parallelized model has no whole hidden states between layers")
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        embeds, ids = given.get("inputs_embeds"), given.get("input_ids")
        tokens = embeds[..., 0] if embeds is not None else ids
        limit = get_workspace(self.group.group_name, self.device).max_num_tokens
        if tokens is not None and tokens.numel() > limit:
            raise ValueError(
                f"a forward of {tokens.numel()} tokens {tuple(tokens.shape)} is over max_num_tokens={limit}; "
                f"parallelize with a larger one, or prefill in chunks"
            )
        if (embeds is None) == (ids is None):
            return None  # transformers says what is wrong
        # The first layer adds up what the ranks bring. Embeddings of the caller are whole on every rank.
        if embeds is None:
            partial = decoder.embed_tokens.partial(ids)
        else:
            partial = embeds.detach().clone(memory_format=torch.contiguous_format)
            if self.rank != 0:
                partial.zero_()
        return (), {**given, "input_ids": None, "inputs_embeds": partial}

    def _all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(partial, group=self.group)
        return partial

    def _all_reduce_rows(self, partial: torch.Tensor) -> torch.Tensor:
        return ops.all_gather_rows(ops.reduce_scatter_rows(partial, self.group), partial.shape[0], self.group)


# ---- the programs of a layer: what happens between attention and MLP ----
#
# Both take this rank's partial sum [num_tokens, hidden_size], which they may overwrite, and the residual as they left
# it: None at the first layer.


class _Unfused:
    """All-reduce, then every rank adds, normalises and projects all tokens."""

    def __init__(self, tp: TensorParallel, all_reduce):
        self.tp, self.all_reduce = tp, all_reduce

    def norm_rows(self, partial, residual, norm):
        """-> (all tokens, normalised; residual)"""
        with self.tp.timed("communication"):
            reduced = self.all_reduce(partial)
        with self.tp.timed("rms_norm"):
            residual = reduced if residual is None else reduced.add_(residual)
            return _rms_norm(residual, norm), residual

    def attention_input(self, partial, residual, norm, latent):
        """-> (all tokens that queries are projected from; their kv latent, normalised, and k_pe; residual)"""
        rows, residual = self.norm_rows(partial, residual, norm)
        with self.tp.timed("qkv_a_proj"):
            columns = F.linear(rows, latent.weight, latent.bias)
        with self.tp.timed("rms_norm"):
            q_a, *kv = latent.normed(columns)
        return (rows if latent.q_norm is None else q_a), torch.cat(kv, dim=-1), residual


class _Fused:
    """The same on tp_fused's ops: the residual is this rank's slice."""

    def __init__(self, tp: TensorParallel):
        self.tp = tp

    def norm_rows(self, partial, residual, norm):
        with self.tp.timed("communication"):
            return ops.rs_rmsnorm_ag(partial, residual, norm.weight, norm.variance_epsilon, self.tp.group)

    def attention_input(self, partial, residual, norm, latent):
        num_tokens, group, eps = partial.shape[0], self.tp.group, latent.kv_norm.variance_epsilon
        if latent.q_norm is not None and latent.norms_fuse and norm.variance_epsilon == eps:
            weights = (norm.weight, latent.weight, latent.q_norm.weight, latent.kv_norm.weight)
            with self.tp.timed("qkv_a_proj"):
                q_a, *kv, residual = prologue.mla_prologue(partial, residual, *weights, eps, group)
            return q_a, torch.cat(kv, dim=-1), residual
        if latent.q_norm is None:
            queries, residual = self.norm_rows(partial, residual, norm)
            own = queries[self.tp.share(num_tokens)]
        else:
            with self.tp.timed("communication"):
                own, residual = ops.rs_rmsnorm(partial, residual, norm.weight, norm.variance_epsilon, group)
        if latent.norms_fuse:
            q_weight = latent.weight.new_empty(0) if latent.q_norm is None else latent.q_norm.weight
            with self.tp.timed("qkv_a_proj"):
                q_a, *kv = projections.qkv_a_proj_ag_norm(
                    own, latent.weight, q_weight, latent.kv_norm.weight, num_tokens, eps, group
                )
        else:
            with self.tp.timed("qkv_a_proj"):
                columns = projections.qkv_a_proj_ag(own, latent.weight, num_tokens, group, bias=latent.bias)
            with self.tp.timed("rms_norm"):
                q_a, *kv = latent.normed(columns)
        return (queries if latent.q_norm is None else q_a), torch.cat(kv, dim=-1), residual


def _rms_norm(rows: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return F.rms_norm(rows, norm.weight.shape, norm.weight, norm.variance_epsilon)


# ---- the modules that replace transformers' ----


class _Stream(NamedTuple):
    """What travels between decoder layers in the place of hidden states."""

    partial: torch.Tensor  # [batch, length, hidden_size]: this rank's part of a sum
    residual: torch.Tensor  # [rows, hidden_size]: all rows or this rank's, as the way has it


class _VocabParallelEmbedding(nn.Module):
    """This rank's part of the vocabulary. Called from outside of a forward, on all ranks, it returns whole rows."""

    def __init__(self, tp: TensorParallel, embedding: nn.Embedding):
        super().__init__()
        self.tp = tp
        self.vocab_size = embedding.num_embeddings
        self.own = tp.share(self.vocab_size)
        self.weight = sharding.cut(embedding.weight, self.own)

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


class _LatentProjection(nn.Module):
    """q_a and kv_a as one replicated projection, and the two latent norms."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        projections = [p for p in (attention.q_a_proj, attention.kv_a_proj_with_mqa) if p is not None]
        self.weight = sharding.frozen(torch.cat([p.weight for p in projections]))
        self.bias = None if projections[0].bias is None else sharding.frozen(torch.cat([p.bias for p in projections]))
        self.q_norm, self.kv_norm = attention.q_a_layernorm, attention.kv_a_layernorm
        norms = [norm for norm in (self.q_norm, self.kv_norm) if norm is not None]
        self.norms_fuse = self.bias is None and len({norm.variance_epsilon for norm in norms}) == 1
        q_columns, kv_columns = (0 if norm is None else norm.weight.shape[0] for norm in (self.q_norm, self.kv_norm))
        self.widths = [q_columns, kv_columns, self.weight.shape[0] - q_columns - kv_columns]

    def normed(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_a, kv_a, k_pe = columns.split(self.widths, dim=-1)
        return q_a if self.q_norm is None else _rms_norm(q_a, self.q_norm), _rms_norm(kv_a, self.kv_norm), k_pe


class _Handed(nn.Module):
    """Stands in for kv_a_proj_with_mqa: the attention calls it, and gets what the layer has computed already."""

    def __init__(self):
        super().__init__()
        self.latent = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        latent, self.latent = self.latent, None
        return latent


class _DecoderLayer(nn.Module):
    """A layer from partial sum to partial sum. Both blocks end in one; the next norm's op completes it."""

    def __init__(self, tp: TensorParallel, layer: nn.Module):
        super().__init__()
        self.tp = tp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.latent = _LatentProjection(self.self_attn)
        self.handed = _Handed()
        sharding.shard_attention(tp, self.self_attn, self.handed)
        if hasattr(self.mlp, "experts"):
            sharding.shard_experts(tp, self.mlp.experts)
            sharding.shard_mlp(tp, self.mlp.shared_experts)
        else:
            sharding.shard_mlp(tp, self.mlp)

    def forward(self, hidden_states: torch.Tensor | _Stream, **kwargs) -> _Stream:
        first = not isinstance(hidden_states, _Stream)
        partial, residual = _Stream(hidden_states, None) if first else hidden_states
        shape, program = partial.shape[:2], self.tp.program
        rows = partial.flatten(0, 1)
        queries, kv, residual = program.attention_input(rows, residual, self.input_layernorm, self.latent)
        self.handed.latent = kv.unflatten(0, shape)
        attended, *_ = self.self_attn(hidden_states=queries.unflatten(0, shape), **kwargs)
        rows, residual = program.norm_rows(attended.flatten(0, 1), residual, self.post_attention_layernorm)
        return _Stream(self.mlp(rows.unflatten(0, shape)), residual)


class _FinalNorm(nn.Module):
    """Completes the last layer's sum and normalises all rows, on every rank."""

    def __init__(self, tp: TensorParallel, norm: nn.Module):
        super().__init__()
        self.tp, self.norm = tp, norm

    def forward(self, stream: _Stream) -> torch.Tensor:
        rows, _ = self.tp.program.norm_rows(stream.partial.flatten(0, 1), stream.residual, self.norm)
        return rows.unflatten(0, stream.partial.shape[:2])


# ---- what is refused ----


def _check_model(model, world_size: int) -> tuple[torch.dtype, torch.device]:
    """Everything that is refused, in one place and before the first change. Returns the model's dtype and device."""
    if not isinstance(model, (DeepseekV2ForCausalLM, DeepseekV3ForCausalLM)):
        raise ValueError(f"parallelize takes a DeepseekV2ForCausalLM or DeepseekV3ForCausalLM, got {type(model)}")
    if isinstance(model.model.norm, _FinalNorm):
        raise ValueError("the model is parallelized already")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("parallelize takes unquantised weights, and this model has a quantization_config")
    devices, dtypes = ({getattr(p, what) for p in model.parameters()} for what in ("device", "dtype"))
    if len(devices) != 1 or len(dtypes) != 1:
        raise ValueError(
            f"the model's parameters must share one device and dtype, got {', '.join(map(str, devices | dtypes))}"
        )
    if next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(f"the model is on {next(iter(devices))}; load its weights on cpu or cuda first")
    for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "vocab_size"):
        if getattr(model.config, name) < world_size:
            raise ValueError(f"{world_size} ranks are more than {name}={getattr(model.config, name)} can be split over")
    return dtypes.pop(), devices.pop()
