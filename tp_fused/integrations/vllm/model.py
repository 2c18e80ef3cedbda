"""vLLM's DeepSeek-V2 and V3, from partial sum to partial sum.

    vLLM:   input norm -> attention (all-reduces) -> norm -> MLP (all-reduces), all tokens and the residual on each rank
    here:   rs_rmsnorm, qkv_a_proj_ag -> attention -> rs_rmsnorm_ag -> MLP, the residual scattered

Blocks keep vLLM's modules, weights and names; they leave their last reduction out. A layer's projection runs before its
attention, which is handed the latent. Whether a model is served is decided once, when it has been built, the same on
all ranks: a model whose blocks leave partial sums has no way back.
"""

import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models import deepseek_v2

from ... import ops, projections
from ...native import _C
from . import workspace
from .workspace import calls


class DeepseekV2ForCausalLM(deepseek_v2.DeepseekV2ForCausalLM):
    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _scatter(self.model, vllm_config)


class DeepseekV3ForCausalLM(deepseek_v2.DeepseekV3ForCausalLM):
    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _scatter(self.model, vllm_config)


def _scatter(model: nn.Module, vllm_config) -> None:
    """Collective where the model is served."""
    config, max_num_tokens = model.config, vllm_config.scheduler_config.max_num_batched_tokens
    reason = _refusal(model, vllm_config)
    if reason is None:
        latent_size = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim
        reason = workspace.make(vllm_config, max_num_tokens, config.hidden_size, latent_size)
    if reason is not None:
        workspace.say_left(reason)
        return
    group_name = get_tp_group().device_group.group_name
    for layer in model.layers:
        _ScatteredLayer.take(layer, group_name)
    model.norm.__class__, model.norm.group_name = _ScatteredNorm, group_name


# ---- what is refused ----


def _refusal(model: nn.Module, vllm_config) -> str | None:
    """Everything that is not served, by what is the same on all ranks."""
    parallel, config = vllm_config.parallel_config, model.config
    not_served = {
        "one rank": parallel.tensor_parallel_size == 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "expert parallelism": parallel.enable_expert_parallel,
        "context parallelism": workspace.is_context_parallel(parallel),
        "speculation": vllm_config.speculative_config is not None,
        "weights that are offloaded": workspace.is_offloading(vllm_config),
        "LoRA": vllm_config.lora_config is not None,
        "torch.compile (pass -cc.mode=0)": int(vllm_config.compilation_config.mode or 0) != 0,
        "float16, which vLLM scales": vllm_config.model_config.dtype == torch.float16,
        "batch invariance": workspace.is_batch_invariant(),
        "a model without q_lora_rank": getattr(config, "q_lora_rank", None) is None,
        "a sparse-attention indexer": model.is_v32,
        "an unknown kind of layer": not all(map(_is_known, model.layers)) or type(model.norm) is not RMSNorm,
    }
    return next((what for what, found in not_served.items() if found), None)


def _is_known(layer: nn.Module) -> bool:
    if type(layer) is not deepseek_v2.DeepseekV2DecoderLayer or "forward" in vars(layer):
        return False
    if layer.use_sequence_parallel_moe:
        return False
    if type(layer.self_attn) is not deepseek_v2.DeepseekV2MLAAttention or layer.self_attn.mla_attn.g_proj is not None:
        return False
    if not all(map(workspace.is_plain, (layer.input_layernorm, layer.post_attention_layernorm))):
        return False
    if type(layer.mlp) is deepseek_v2.DeepseekV2MLP:
        return True
    experts = getattr(layer.mlp, "experts", None)
    return hasattr(getattr(experts, "moe_config", None), "skip_final_all_reduce")


# ---- the modules ----


class _Handed(nn.Module):
    """Stands in for the attention's latent projection, whose output the layer has computed already."""

    latent = None

    def forward(self, hidden_states):
        latent, self.latent = self.latent, None
        return latent, None


class _ScatteredLayer(deepseek_v2.DeepseekV2DecoderLayer):
    """Takes a partial sum and this rank's rows of the residual, and leaves both; the first layer takes the embedding,
    which is full."""

    @classmethod
    def take(cls, layer: nn.Module, group_name: str) -> None:
        layer.__class__ = cls
        layer.group_name = group_name
        layer.world_size = get_tp_group().world_size
        layer.handed = layer.self_attn.mla_attn.fused_qkv_a_proj = _Handed()
        layer.self_attn.fused_qkv_a_proj._cpu_skip_gemm_dispatch = True  # on a CPU vLLM keeps no weight it has packed
        layer.self_attn.o_proj.reduce_results = False
        if isinstance(layer.mlp, deepseek_v2.DeepseekV2MLP):
            layer.mlp.down_proj.reduce_results = False
        else:
            layer.mlp.experts.moe_config.skip_final_all_reduce = True

    def forward(self, positions, hidden_states, residual, llama_4_scaling=None):
        if residual is None:
            residual = hidden_states
            self.handed.latent = self.self_attn.fused_qkv_a_proj(self.input_layernorm(hidden_states))[0]
        else:
            self.handed.latent, residual = self._latent(hidden_states.contiguous(), residual)
        # Of the hidden states the attention asks the number of rows alone.
        partial = self.self_attn(positions, hidden_states, llama_4_scaling)
        rows, residual = _norm_all(partial.contiguous(), residual, self.post_attention_layernorm, self.group_name)
        return self.mlp(rows), residual

    def _latent(self, partial, residual):
        linear, norm, num_tokens = self.self_attn.fused_qkv_a_proj, self.input_layernorm, partial.shape[0]
        columns = sum(linear.output_sizes)
        weight = getattr(linear, "weight", None)
        plain = type(linear.quant_method).__name__ == "UnquantizedLinearMethod" and weight.dtype == partial.dtype
        plain = plain and tuple(weight.shape) == (columns, partial.shape[1]) and weight.is_contiguous()
        # As mla_prologue and mla_prologue_fp8: of few tokens all ranks take all normed rows.
        gathers = _C.gathers_normed_rows(num_tokens, columns, self.world_size)
        if gathers:
            rows, residual = _norm_all(partial, residual, norm, self.group_name)
        else:
            calls["rs_rmsnorm"] += 1
            rows, residual = ops.rs_rmsnorm(partial, residual, norm.weight, norm.variance_epsilon, self.group_name)
        if plain:
            calls["qkv_a_proj_ag"] += 1
            latent = projections.qkv_a_proj_ag(rows, weight, num_tokens, self.group_name, complete=gathers)
            return latent, residual
        latent = linear(rows)[0]  # quantised: by vLLM's own kernel
        if not gathers:
            calls["all_gather_rows"] += 1
            latent = ops.all_gather_rows(latent, num_tokens, self.group_name)
        return latent, residual


class _ScatteredNorm(RMSNorm):
    """The final norm, of the last layer's partial sum."""

    def forward(self, hidden_states, residual):
        return _norm_all(hidden_states.contiguous(), residual, self, self.group_name)


def _norm_all(partial, residual, norm, group_name: str):
    calls["rs_rmsnorm_ag"] += 1
    return ops.rs_rmsnorm_ag(partial, residual, norm.weight, norm.variance_epsilon, group_name)
