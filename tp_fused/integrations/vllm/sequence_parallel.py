"""The layers of DeepSeek-V3.2 in vLLM's sequence-parallel form, for CUDA.

    vLLM:   norm of own rows -> all-gather -> projections of all rows -> attention -> reduce-scatter -> norm -> experts
    here:   norm of own rows -> qkv_a_proj_ag -> attention -> rs_rmsnorm -> experts

What is between layers stays vLLM's: hidden states and residual are this rank's rows, in shares padded to one size, on
which the experts' all-to-all counts, and the experts' output is complete. So whatever reads them there, such as a
speculative drafter, reads what it would without the plugin. Of a token count that the ranks divide, vLLM's shares are
the ops' (partition.py).

Of its hidden states the attention asks two projections, the latent's and the indexer's, and else the number of rows
alone. It is given both outputs, side by side, in place of the hidden states, and each projection hands out its columns.
"""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear, DeepseekV2MLP, DeepseekV2MoE
from vllm.models.deepseek_v32.attention import DeepseekV32Attention, DeepseekV32Indexer
from vllm.models.deepseek_v32.nvidia.model import DeepseekV32DecoderLayer

from ... import ops, projections
from . import workspace
from .workspace import calls


def replace_layers(model: nn.Module, vllm_config) -> None:
    """Collective where the model is served."""
    reason = _refusal(model, vllm_config)
    if reason is None:
        max_num_tokens = _padded(vllm_config.scheduler_config.max_num_batched_tokens)
        latent_size = max(sum(_columns(layer.self_attn)) for layer in model.layers)
        reason = workspace.make(vllm_config, max_num_tokens, model.config.hidden_size, latent_size)
    if reason is not None:
        workspace.say_left(reason)
        return
    for layer in model.layers:
        _ScatteredLayer.take(layer, get_tp_group().device_group.group_name)


def _padded(num_tokens: int) -> int:
    """As sp_shard and sp_reduce_scatter pad."""
    return num_tokens + -num_tokens % get_tensor_model_parallel_world_size()


# ---- what is refused ----


def _refusal(model: nn.Module, vllm_config) -> str | None:
    """Everything that is not served, by what is the same on all ranks."""
    parallel = vllm_config.parallel_config
    not_served = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "a residual that is not scattered (vLLM scatters it with tensor, expert and data parallelism together)": (
            not parallel.use_sequence_parallel_moe
        ),
        "context parallelism": workspace.is_context_parallel(parallel),
        "weights that are offloaded": workspace.is_offloading(vllm_config),
        "LoRA": vllm_config.lora_config is not None,
        "batches in two halves": parallel.use_ubatching,
        "elastic expert parallelism": parallel.enable_elastic_ep,
        "torch.compile (pass -cc.mode=0)": int(vllm_config.compilation_config.mode or 0) == 1,
        "batch invariance": workspace.is_batch_invariant(),
        "an unknown kind of layer": not all(map(_is_known, model.layers)),
    }
    return next((what for what, found in not_served.items() if found), None)


def _is_known(layer: nn.Module) -> bool:
    if type(layer) is not DeepseekV32DecoderLayer or type(layer.mlp) not in (DeepseekV2MLP, DeepseekV2MoE):
        return False
    attention = layer.self_attn
    if type(attention) is not DeepseekV32Attention or type(attention.indexer) not in (DeepseekV32Indexer, type(None)):
        return False
    linears = _linears(attention)
    if any(type(linear) not in _HANDING or linear.bias is not None for linear in linears):
        return False
    if any("forward" in vars(module) for module in (layer, *linears)):
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return layer.use_sequence_parallel and all(map(workspace.is_plain, norms))


# ---- the projections ----


def _linears(attention: nn.Module) -> list[nn.Module]:
    """What projects hidden states; layers that take another's top-k have no indexer."""
    indexer = attention.indexer
    return [attention.fused_qkv_a_proj, *([] if indexer is None else [indexer.wk_weights_proj])]


def _columns(attention: nn.Module) -> list[int]:
    return [sum(linear.output_sizes) for linear in _linears(attention)]


class _Handing:
    """Hands out its columns of what the attention has been given; `project` does what vLLM's own does."""

    columns: slice

    def forward(self, projected):
        return projected[:, self.columns], None

    def project(self, rows) -> torch.Tensor:
        return super().forward(rows)[0]


class _HandingLatent(_Handing, DeepSeekV2FusedQkvAProjLinear):
    pass


class _HandingIndexer(_Handing, MergedColumnParallelLinear):
    pass


_HANDING = {DeepSeekV2FusedQkvAProjLinear: _HandingLatent, MergedColumnParallelLinear: _HandingIndexer}


def _join(linears: list[nn.Module]) -> list[torch.Tensor] | None:
    """The rows of one weight, which those of the projections become, or None where one is quantised: then vLLM's own
    kernels run. It is done before weights are loaded, so memory is not held twice."""
    weights = [getattr(linear, "weight", None) for linear in linears]
    if any(type(linear.quant_method).__name__ != "UnquantizedLinearMethod" for linear in linears):
        return None
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return None
    joined = torch.cat([weight.data for weight in weights])
    parts = joined.split([weight.shape[0] for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part
    return [joined, *parts]


# ---- the layer ----


class _ScatteredLayer(DeepseekV32DecoderLayer):
    """Takes this rank's rows of the hidden states and of the residual, and leaves both, as vLLM's."""

    @classmethod
    def take(cls, layer: nn.Module, group_name: str) -> None:
        layer.__class__ = cls
        layer.group_name = group_name
        layer.linears = linears = _linears(layer.self_attn)
        layer.joined = _join(linears)
        begin = 0
        for linear, width in zip(linears, _columns(layer.self_attn), strict=True):
            linear.__class__ = _HANDING[type(linear)]
            linear.columns = slice(begin, begin := begin + width)

    def forward(self, positions, hidden_states, residual, attn_in=None):
        num_tokens = positions.shape[0]
        if residual is None:
            residual = hidden_states
            rows = self.input_layernorm(hidden_states) if attn_in is None else attn_in
        else:
            rows, residual = self.input_layernorm(hidden_states, residual)
        projected = self._project_all(rows.contiguous(), _padded(num_tokens))[:num_tokens]
        partial = self.self_attn(positions=positions, hidden_states=projected)
        if partial.shape[0] < _padded(num_tokens):
            partial = F.pad(partial, (0, 0, 0, _padded(num_tokens) - num_tokens))
        norm = self.post_attention_layernorm
        calls["rs_rmsnorm"] += 1
        rows, residual = ops.rs_rmsnorm(
            partial.contiguous(), residual.contiguous(), norm.weight, norm.variance_epsilon, self.group_name
        )
        if isinstance(self.mlp, DeepseekV2MoE):
            return self.mlp(rows, already_sequence_parallel=True), residual
        return self.mlp(rows), residual

    def _project_all(self, rows, num_tokens: int) -> torch.Tensor:
        """All columns that the attention asks for, of all rows."""
        if self._is_joined(rows):
            calls["qkv_a_proj_ag"] += 1
            return projections.qkv_a_proj_ag(rows, self.joined[0], num_tokens, self.group_name)
        calls["all_gather_rows"] += 1
        projected = torch.cat([linear.project(rows) for linear in self.linears], dim=1)
        return ops.all_gather_rows(projected, num_tokens, self.group_name)

    def _is_joined(self, rows) -> bool:
        """Not where weights were quantised or replaced after they had been joined."""
        if self.joined is None or self.joined[0].dtype != rows.dtype:
            return False
        parts = zip(self.linears, self.joined[1:], strict=True)
        return all(linear.weight.data_ptr() == part.data_ptr() for linear, part in parts)
