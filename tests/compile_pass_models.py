"""Tensor-parallel decoders for the tests of the pass: transformers' own modules and plain all-reduces.

Every rank makes the whole model from the same seed, and cuts its shards out of it.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from transformers import DeepseekV3Config, GemmaConfig, LlamaConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.llama import modeling_llama as llama

HIDDEN, LAYERS, VOCAB, HEADS = 96, 2, 40, 6  # heads for 2 and 3 ranks
Q_LORA, KV_LORA, ROPE = 24, 16, 8
SHARED = dict(
    hidden_size=HIDDEN,
    vocab_size=VOCAB,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    intermediate_size=48,
    rms_norm_eps=1e-5,
    attn_implementation="sdpa",
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


def all_reduced(module, given, output):
    return funcol.wait_tensor(funcol.all_reduce(output, "sum", dist.group.WORLD))


def all_reduced_in_place(module, given, output):
    dist.all_reduce(output)
    return output


def own_part(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.tensor_split(weight, dist.get_world_size(), dim)[dist.get_rank()].clone()


def cut(linear: nn.Linear, dim: int) -> None:
    linear.weight = nn.Parameter(own_part(linear.weight.data, dim))


class Decoder(nn.Module):
    """Embedding, layers, norm and lm_head; the embedding is split by vocabulary and its output is all-reduced, too."""

    def __init__(self, config, layer_class, norm_class, rotary_class, hook):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer_class(config, index) for index in range(config.num_hidden_layers))
        self.norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = rotary_class(config)
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            spread = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
            if parameter.dim() == 1:
                parameter.data += 1
        for layer in self.layers:
            self.shard(layer, hook)
        self.register_buffer("start", own_part(torch.arange(config.vocab_size), 0)[:1])
        self.embed_tokens.weight = nn.Parameter(own_part(self.embed_tokens.weight.data, 0))
        self.requires_grad_(False)

    def embed(self, ids):
        local = ids - self.start
        theirs = (local < 0) | (local >= self.embed_tokens.weight.shape[0])
        rows = self.embed_tokens(local.masked_fill(theirs, 0)).masked_fill(theirs.unsqueeze(-1), 0)
        return funcol.wait_tensor(funcol.all_reduce(rows, "sum", dist.group.WORLD))

    def forward(self, ids, positions):
        hidden = self.embed(ids)
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_ids=positions, position_embeddings=rotary, attention_mask=None)
        return self.lm_head(self.norm(hidden))

    def shard(self, layer, hook) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.shard_attention(attention)
        cut(attention.o_proj, 1)
        attention.o_proj.register_forward_hook(hook)
        for part in (mlp, *([mlp.shared_experts] if hasattr(mlp, "shared_experts") else [])):
            if hasattr(part, "gate_proj"):
                for linear, dim in ((part.gate_proj, 0), (part.up_proj, 0), (part.down_proj, 1)):
                    cut(linear, dim)
        if hasattr(mlp, "experts"):
            halves = [own_part(half, 1) for half in mlp.experts.gate_up_proj.data.chunk(2, 1)]
            mlp.experts.gate_up_proj = nn.Parameter(torch.cat(halves, 1))
            mlp.experts.down_proj = nn.Parameter(own_part(mlp.experts.down_proj.data, 2))
            mlp.experts.register_forward_hook(hook)  # as transformers' plan does: two reductions, then a sum
            mlp.shared_experts.down_proj.register_forward_hook(hook)
        else:
            mlp.down_proj.register_forward_hook(hook)


class Llama(Decoder):
    LAYERS = LAYERS

    def __init__(self, hook=all_reduced):
        config = LlamaConfig(**SHARED | {"num_hidden_layers": self.LAYERS}, head_dim=16)
        super().__init__(config, llama.LlamaDecoderLayer, llama.LlamaRMSNorm, llama.LlamaRotaryEmbedding, hook)

    def shard_attention(self, attention) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            cut(getattr(attention, name), 0)


class LlamaLayer(Llama):
    """One layer has a reduction after the embedding, after attention, which feeds the MLP, and after the MLP."""

    LAYERS = 1


class GemmaLayer(Decoder):
    def __init__(self, hook=all_reduced):
        config = GemmaConfig(**SHARED | {"num_hidden_layers": 1}, head_dim=16)
        super().__init__(config, gemma.GemmaDecoderLayer, gemma.GemmaRMSNorm, gemma.GemmaRotaryEmbedding, hook)

    shard_attention = Llama.shard_attention


class Deepseek(Decoder):
    """The first layer is dense, the second one has experts."""

    DENSE, LAYERS = 1, LAYERS

    def __init__(self, hook=all_reduced):
        config = DeepseekV3Config(
            **SHARED | {"num_hidden_layers": self.LAYERS},
            moe_intermediate_size=24,
            q_lora_rank=Q_LORA,
            kv_lora_rank=KV_LORA,
            qk_rope_head_dim=ROPE,
            qk_nope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=self.DENSE,
            experts_implementation="batched_mm",
        )
        rotary = deepseek.DeepseekV3RotaryEmbedding
        super().__init__(config, deepseek.DeepseekV3DecoderLayer, deepseek.DeepseekV3RMSNorm, rotary, hook)

    def shard_attention(self, attention) -> None:
        cut(attention.q_b_proj, 0)
        cut(attention.kv_b_proj, 0)
        attention.num_heads //= dist.get_world_size()


class Experts(Deepseek):
    """Its second layer alone: all that Deepseek has and Llama has not, in half the time."""

    DENSE, LAYERS = 0, 1
