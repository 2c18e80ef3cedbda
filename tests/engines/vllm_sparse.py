"""vLLM's own DeepSeek-V3.2 for CUDA, on CPU ranks: what `test_vllm_sequence_parallel.py` runs on every rank.

vLLM's: model, layers, attention, norms, linears, the router and the shared experts, the loading of weights, all that is
between the blocks. Stand-ins, of the same signatures and in plain torch: two Triton kernels, the indexer's scores and
its top-k, sparse attention, and the routed experts with their all-to-all.
"""

import os
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

ENGINE = Path(__file__).resolve().parents[2] / "build/engines/vllm"
MAX_TOKENS = 45  # which neither 2 nor 4 divides
CONFIG = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": 96,
    "hidden_size": 160,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.5,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "index_topk": 6,
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk_pattern": "FFSF",  # the third layer has no indexer
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
}
NUM_LAYERS = CONFIG["num_hidden_layers"]


# ---- stand-ins ----


def _rms_norm(rows, weight, eps):
    return F.rms_norm(rows, weight.shape, weight, eps)


def _rotated(rows, positions, cos_sin):
    """Some rotation that depends on the position; heads, if there are any, alike."""
    cos, sin = cos_sin[positions].float().chunk(2, dim=-1)
    if rows.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    one, other = rows[..., : 2 * cos.shape[-1]].chunk(2, dim=-1)
    turned = torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
    return torch.cat([turned, rows[..., turned.shape[-1] :]], dim=-1)


def fused_norm_rope(
    positions, q_c, q_weight, q_eps, kv_c, kv_weight, kv_eps, k_pe, cos_sin, index_k, index_weight, index_bias,
    index_eps, index_cos_sin, topk_indices_buffer, *, slot_mapping, indexer_slot_mapping, indexer_k_cache,
    mla_kv_cache, has_indexer, kv_c_out, k_pe_out, **_,
):  # fmt: skip
    kv_c_out.copy_(_rms_norm(kv_c, kv_weight, kv_eps))
    k_pe_out.copy_(_rotated(k_pe, positions, cos_sin))
    mla_kv_cache[slot_mapping] = torch.cat([kv_c_out, k_pe_out], dim=-1)
    if has_indexer:
        normed = F.layer_norm(index_k, index_weight.shape, index_weight, index_bias, index_eps)
        indexer_k_cache[indexer_slot_mapping] = _rotated(normed, positions, index_cos_sin)
        topk_indices_buffer[: len(positions)] = -1
    return _rms_norm(q_c, q_weight, q_eps)


def fused_q(
    positions, q_pe, cos_sin, index_q, index_cos_sin, ql_nope, q_scale, index_weights, softmax_scale, head_scale,
    has_indexer=True, **_,
):  # fmt: skip
    """Nothing is quantised."""
    mqa_q = _rotated(q_pe, positions, cos_sin)
    if not has_indexer:
        return None, None, mqa_q
    return _rotated(index_q, positions, index_cos_sin), index_weights.float() * softmax_scale * head_scale, mqa_q


def sparse_attn_indexer(
    hidden_states, prefix, kv_cache, q, q_scale, k, weights, block, fmt, topk_tokens, head_dim, max_model_len,
    total_seq_lens, topk_indices_buffer, **_,
):  # fmt: skip
    """The batch is one sequence."""
    num_tokens = q.shape[0]
    scores = torch.einsum("thd,sd,th->ts", q, kv_cache[:num_tokens], weights)
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    found = scores.topk(min(topk_tokens, num_tokens), dim=-1)
    topk_indices_buffer[:num_tokens, : found.indices.shape[1]] = found.indices.masked_fill(found.values.isinf(), -1)


class SparseImpl:
    is_sparse, supports_dense_mha_prefill, supports_quant_query_input = True, False, False
    dcp_world_size = pcp_world_size = 1

    def __init__(self, *, scale, topk_indices_buffer, kv_lora_rank, **_):
        self.scale, self.topk_indices_buffer, self.kv_lora_rank = scale, topk_indices_buffer, kv_lora_rank

    def prepare_for_batch(self, attn_metadata):
        pass

    def record_logical_topk_ready(self):
        pass

    def process_weights_after_loading(self, act_dtype):
        pass

    def forward_mqa(self, q, kv_cache, attn_metadata, layer):
        """Each token sees those that the indexer has found."""
        q = torch.cat(q, dim=-1)
        keys, found = kv_cache[: len(q)], self.topk_indices_buffer[: len(q)].long()
        seen = torch.zeros(len(q), len(q) + 1, dtype=torch.bool).scatter_(1, found.masked_fill(found < 0, len(q)), True)
        scores = torch.einsum("thd,sd->ths", q, keys) * self.scale
        scores = scores.masked_fill(~seen[:, None, :-1], -torch.inf)
        return scores.softmax(-1) @ keys[:, : self.kv_lora_rank], None


class SparseBackend:
    @staticmethod
    def get_name():
        return "STAND_IN"

    @staticmethod
    def get_impl_cls():
        return SparseImpl

    @staticmethod
    def is_mla():
        return True


class Experts(nn.Module):
    """Rows go to the ranks that have their experts, all of them; the sums come back to the rows' ranks. As vLLM's
    all-to-all, it counts on shares of one size; what it returns is complete."""

    def __init__(self, *, shared_experts, gate, num_experts, top_k, hidden_size, intermediate_size, prefix, **options):
        super().__init__()
        assert options["reduce_results"] is False
        self.is_sequence_parallel = options["is_sequence_parallel"]
        self.shared_experts, self.gate, self.top_k = shared_experts, gate, top_k
        self.scale = options["routed_scaling_factor"]
        from vllm.distributed import get_tp_group

        self.group = get_tp_group().device_group
        seeded = torch.Generator().manual_seed(sum(map(ord, prefix)))
        shape = (num_experts, hidden_size, intermediate_size)
        self.up = torch.randn(shape, generator=seeded) / hidden_size**0.5
        self.down = torch.randn(shape, generator=seeded).transpose(1, 2).contiguous() / intermediate_size**0.5
        self.sizes = []  # of the shares, in the calls

    def forward(self, hidden_states, router_logits):
        self.sizes.append(len(hidden_states))
        if not self.is_sequence_parallel:  # all rows are here, and the sum stays partial
            return self.of_own_experts(hidden_states) + self.shared_experts(hidden_states)
        rank, world_size = self.group.rank(), self.group.size()
        shares = hidden_states.new_empty(world_size * len(hidden_states), hidden_states.shape[1])
        dist.all_gather_into_tensor(shares, hidden_states.contiguous(), group=self.group)
        outputs = self.of_own_experts(shares)
        dist.all_reduce(outputs, group=self.group)
        own = outputs[rank * len(hidden_states) : (rank + 1) * len(hidden_states)]
        return own + self.shared_experts(hidden_states)

    def of_own_experts(self, shares):
        logits = self.gate(shares)[0]
        chosen = (logits.sigmoid() + self.gate.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        weights = logits.sigmoid().gather(1, chosen)
        weights = self.scale * weights / weights.sum(-1, keepdim=True)
        outputs = torch.zeros_like(shares)
        for expert in range(self.group.rank(), len(self.up), self.group.size()):
            share = weights.masked_fill(chosen != expert, 0).sum(-1, keepdim=True)
            outputs += share * (F.silu(shares @ self.up[expert]) @ self.down[expert])
        return outputs


def fused_embed_norm(input_ids, embed_table, chain_weight, eps):
    rows = embed_table[input_ids]
    return rows, _rms_norm(rows, chain_weight, eps)


# ---- the engine's process ----


class Engine:
    """This process becomes a rank of vLLM."""

    def __init__(self, folder: str):
        sys.path.insert(0, str(ENGINE))
        os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
        # Ranks that differ in it gather through torch.distributed; vLLM's own way on CPUs dies of a gather of no rows.
        os.environ["VLLM_DIST_IDENT"] = str(dist.get_rank())
        import vllm.models.deepseek_v32 as entry
        from vllm.config import set_current_vllm_config
        from vllm.distributed import parallel_state
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.attention import mla_attention
        from vllm.model_executor.model_loader.utils import process_weights_after_loading
        from vllm.model_executor.models import deepseek_v2, registry
        from vllm.models.deepseek_v32 import attention
        from vllm.models.deepseek_v32.nvidia import model

        self.set_config, self.model, self.groups = set_current_vllm_config, model, parallel_state
        self.arguments = {
            "model": folder,
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "max_model_len": 64,
            "max_num_batched_tokens": MAX_TOKENS,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "enable_prefix_caching": False,
        }
        self.engine_args, self.process_weights = EngineArgs, process_weights_after_loading
        # What vLLM's entry module does where there is CUDA.
        entry.DeepseekV32ForCausalLM = entry.GlmMoeDsaForCausalLM = model.DeepseekV32ForCausalLM
        attention.fused_norm_rope, attention.fused_q = fused_norm_rope, fused_q
        attention.sparse_attn_indexer = sparse_attn_indexer
        model.fused_embed_norm = fused_embed_norm
        mla_attention.get_attn_backend = lambda *_, **__: SparseBackend
        deepseek_v2.FusedMoEFactory = Experts
        registry._run_in_subprocess = lambda function: function()

    def divide(self, data: int) -> None:
        """The ranks into `data` replicas, whose ranks are tensor-parallel."""
        world_size, rank = dist.get_world_size(), dist.get_rank()
        self.arguments["tensor_parallel_size"], self.replica = world_size // data, rank * data // world_size
        config = self.config(data_parallel_size=data)
        self.groups.destroy_model_parallel()
        with self.set_config(config):
            self.groups.init_distributed_environment(world_size, rank, local_rank=rank, backend="gloo")
            self.groups.initialize_model_parallel(world_size // data, backend="gloo")

    def config(self, **changes):
        """For tensor, expert and data parallelism together; of the replicas there may be one alone. It is set
        afterwards, since vLLM has not started the processes."""
        config = self.engine_args(**self.arguments).create_engine_config()
        for name, value in {"data_parallel_size": 2, "enable_expert_parallel": True, **changes}.items():
            owners = (config.parallel_config, config.compilation_config, config)
            setattr(next(owner for owner in owners if hasattr(owner, name)), name, value)
        return config

    def build(self, make=None, prepare=None, **changes):
        """A model as vLLM builds and loads it; `make` is its class, by default vLLM's own."""
        config = self.config(**changes)
        with self.set_config(config):
            made = (make or self.model.DeepseekV32ForCausalLM)(vllm_config=config)
            if prepare is not None:
                prepare(made, config)
        made.vllm_config = config
        assert made.load_weights(checkpoint()) == {name for name, _ in made.named_parameters()}
        for module in made.modules():
            module._cpu_skip_gemm_dispatch = True  # as on CUDA, linears multiply by the weight that was loaded
        self.process_weights(made, config.model_config, torch.device("cpu"))
        for layer in made.model.layers:
            attention = layer.self_attn
            attention.kv_cache = torch.zeros(MAX_TOKENS, CONFIG["kv_lora_rank"] + CONFIG["qk_rope_head_dim"])
            if attention.indexer is not None:
                attention.indexer.k_cache.kv_cache = torch.zeros(MAX_TOKENS, CONFIG["index_head_dim"])
        return made

    @torch.inference_mode()
    def forward(self, model, num_tokens: int, inputs_embeds=None):
        """Hidden states of all tokens, and those between layers where they are asked for."""
        from vllm.forward_context import ForwardContext, override_forward_context

        layers = model.vllm_config.compilation_config.static_forward_context
        metadata = types.SimpleNamespace(num_actual_tokens=num_tokens, num_decode_tokens=0, prefill=None)
        context = ForwardContext(
            no_compile_layers=layers,
            attn_metadata=dict.fromkeys(layers, metadata),
            slot_mapping=dict.fromkeys(layers, torch.arange(num_tokens)),
        )
        input_ids = (torch.arange(num_tokens) * 5 + 11) % CONFIG["vocab_size"]
        with self.set_config(model.vllm_config), override_forward_context(context):
            return model(input_ids, torch.arange(num_tokens), inputs_embeds=inputs_embeds)


def checkpoint():
    """The published names, whole weights, the same on every rank."""
    c, seeded = CONFIG, torch.Generator().manual_seed(0)
    hidden, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    q_columns, kv_columns = heads * (c["qk_nope_head_dim"] + rope), heads * (c["qk_nope_head_dim"] + c["v_head_dim"])

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=seeded) / columns**0.5

    def norm(size):
        return 1 + 0.2 * torch.randn(size, generator=seeded)

    def mlp(prefix, width):
        yield f"{prefix}.gate_proj.weight", matrix(width, hidden)
        yield f"{prefix}.up_proj.weight", matrix(width, hidden)
        yield f"{prefix}.down_proj.weight", matrix(hidden, width)

    yield "model.embed_tokens.weight", torch.randn(c["vocab_size"], hidden, generator=seeded)
    yield "model.norm.weight", norm(hidden)
    yield "lm_head.weight", matrix(c["vocab_size"], hidden)
    for index in range(NUM_LAYERS):
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        yield f"{layer}.input_layernorm.weight", norm(hidden)
        yield f"{layer}.post_attention_layernorm.weight", norm(hidden)
        yield f"{attention}.q_a_proj.weight", matrix(c["q_lora_rank"], hidden)
        yield f"{attention}.kv_a_proj_with_mqa.weight", matrix(c["kv_lora_rank"] + rope, hidden)
        yield f"{attention}.q_a_layernorm.weight", norm(c["q_lora_rank"])
        yield f"{attention}.kv_a_layernorm.weight", norm(c["kv_lora_rank"])
        yield f"{attention}.q_b_proj.weight", matrix(q_columns, c["q_lora_rank"])
        yield (
            f"{attention}.kv_b_proj.weight",
            matrix(kv_columns, c["kv_lora_rank"]),
        )
        yield f"{attention}.o_proj.weight", matrix(hidden, heads * c["v_head_dim"])
        if c["index_topk_pattern"][index] == "F":
            indexer = f"{attention}.indexer"
            yield f"{indexer}.wq_b.weight", matrix(c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"])
            yield f"{indexer}.wk.weight", matrix(c["index_head_dim"], hidden)
            yield f"{indexer}.weights_proj.weight", matrix(c["index_n_heads"], hidden)
            yield f"{indexer}.k_norm.weight", norm(c["index_head_dim"])
            yield f"{indexer}.k_norm.bias", norm(c["index_head_dim"]) - 1
        if index < c["first_k_dense_replace"]:
            yield from mlp(f"{layer}.mlp", c["intermediate_size"])
        else:
            yield f"{layer}.mlp.gate.weight", matrix(c["n_routed_experts"], hidden)
            yield f"{layer}.mlp.gate.e_score_correction_bias", norm(c["n_routed_experts"]) - 1
            yield from mlp(f"{layer}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
