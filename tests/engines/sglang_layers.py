"""A small decoder on SGLang's own boundary code, on the CPU: what `sglang_ranks.py` runs on every rank.

SGLang's: the embedding, the norms, the latent projection, and all that is between the blocks of a layer. Made up, and
short: what is inside the blocks. Weights follow from a seed, so every rank can compute the whole model in plain torch.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, HIDDEN, Q_LORA, KV_LORA, ROPE, HEADS = 96, 256, 24, 16, 8, 4
LATENT = Q_LORA + KV_LORA + ROPE
EPS = 1e-5


class Weights:
    """Of the whole model, the same on every rank."""

    def __init__(self, num_layers: int, dtype: torch.dtype):
        seeded = torch.Generator().manual_seed(num_layers)

        def matrix(*shape):
            return (torch.randn(*shape, generator=seeded) / shape[-1] ** 0.5).to(dtype)

        def norm(size):
            return (1 + 0.1 * torch.randn(size, generator=seeded)).to(dtype)

        self.embedding = torch.randn(VOCABULARY, HIDDEN, generator=seeded).to(dtype)
        self.final_norm = norm(HIDDEN)
        self.layers = [
            types.SimpleNamespace(
                input_norm=norm(HIDDEN),
                latent=matrix(LATENT, HIDDEN),
                q_norm=norm(Q_LORA),
                kv_norm=norm(KV_LORA),
                mix=matrix(HEADS * 8, LATENT),
                out=matrix(HIDDEN, HEADS * 8),
                mlp_norm=norm(HIDDEN),
                up=matrix(HEADS * 12, HIDDEN),
                down=matrix(HIDDEN, HEADS * 12),
            )
            for _ in range(num_layers)
        ]

    def forward(self, input_ids=None, embeddings=None) -> torch.Tensor:
        """The model in plain torch, in fp32."""
        residual = (self.embedding[input_ids] if embeddings is None else embeddings).float()
        for layer in self.layers:
            rows = rms_norm(residual, layer.input_norm)
            q_a, kv_a, k_pe = F.linear(rows, layer.latent.float()).split([Q_LORA, KV_LORA, ROPE], dim=-1)
            latent = torch.cat([rms_norm(q_a, layer.q_norm), rms_norm(kv_a, layer.kv_norm), k_pe], dim=-1)
            residual = residual + F.linear(attend(latent, layer.mix.float()), layer.out.float())
            up = F.silu(F.linear(rms_norm(residual, layer.mlp_norm), layer.up.float()))
            residual = residual + F.linear(up, layer.down.float())
        return rms_norm(residual, self.final_norm)


def rms_norm(rows, weight):
    return F.rms_norm(rows.float(), weight.shape, weight.float(), EPS)


def attend(latent, mix):
    """Causal: a token sees those before it, and none of the padding behind it."""
    mixed = torch.tanh(F.linear(latent, mix))
    return mixed.cumsum(0) / torch.arange(1, mixed.shape[0] + 1).unsqueeze(1)


class Attention(nn.Module):
    """What SGLang's hooks ask of a layer's attention; it leaves a partial sum."""

    def __init__(self, weights, rank: int, world_size: int, quant_config=None):
        super().__init__()
        from sglang.srt.layers.linear import ReplicatedLinear
        from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

        self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim = Q_LORA, KV_LORA, ROPE
        self.use_min_latency_fused_a_gemm = self._use_min_latency_fused_a_gemm = False
        self.fused_qkv_a_proj_with_mqa = ReplicatedLinear(HIDDEN, LATENT, bias=False, quant_config=quant_config)
        if quant_config is None:
            self.fused_qkv_a_proj_with_mqa.weight.data.copy_(weights.latent)
        self.q_norm, self.kv_norm = norm(weights.q_norm), norm(weights.kv_norm)
        own = slice(rank * 8 * HEADS // world_size, (rank + 1) * 8 * HEADS // world_size)
        self.mix, self.out = weights.mix[own], weights.out[:, own]
        self.prepare_qkv_latent = types.MethodType(DeepseekV2AttentionMLA.prepare_qkv_latent, self)
        self.latent = None  # the last one: for the tests

    def forward(self, hidden_states, attn_tp_context, num_tokens):
        if num_tokens == 0:  # as SGLang's: an empty batch asks for no latent
            return hidden_states
        self.latent = attn_tp_context.fetch_qkv_latent()
        q_a, kv_a, k_pe = self.latent.split([Q_LORA, KV_LORA, ROPE], dim=-1)
        q_a, kv_a = self.q_norm(q_a.contiguous()), self.kv_norm(kv_a.contiguous())
        return F.linear(attend(torch.cat([q_a, kv_a, k_pe], dim=-1), self.mix), self.out)


class MLP(nn.Module):
    """It leaves a partial sum."""

    def __init__(self, weights, rank: int, world_size: int):
        super().__init__()
        own = slice(rank * 12 * HEADS // world_size, (rank + 1) * 12 * HEADS // world_size)
        self.up, self.down = weights.up[own], weights.down[:, own]

    def forward(self, rows):
        return F.linear(F.silu(F.linear(rows, self.up)), self.down)


def norm(weight):
    from sglang.srt.layers.layernorm import RMSNorm

    made = RMSNorm(weight.shape[0], eps=EPS)
    made.weight.data.copy_(weight)
    return made


def embedding(weights):
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    made = VocabParallelEmbedding(VOCABULARY, HIDDEN)
    made.weight_loader(made.weight, weights.embedding)
    return made


def batch(input_ids, mode: str = "EXTEND"):
    """The fields of a ForwardBatch that the boundary code asks for."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return types.SimpleNamespace(
        forward_mode=ForwardMode[mode],
        input_ids=input_ids,
        can_run_tbo=False,
        residual_stream=None,
        attn_cp_metadata=None,
    )
