"""Tiny models of transformers, for the tests of tp_fused.integrations.transformers."""

import copy
import os

import tokenizers
import torch
import transformers

from tp_fused.integrations.transformers import parallelize

VOCAB_SIZE = 61  # what 2, 3 and 4 ranks cannot share out evenly; so are the heads and the columns below
SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=56,
    intermediate_size=50,
    num_hidden_layers=3,
    num_attention_heads=7,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MLA_SIZES = dict(
    SIZES,
    moe_intermediate_size=28,
    num_key_value_heads=7,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
)
# Sparse attention of 5 keys; the index has heads and columns of its own.
INDEXED = dict(index_topk=5, index_head_dim=16, index_n_heads=3)
# Kimi-K2's proportions to DeepSeek-V3: half the heads, more and narrower experts in one group, the same latents.
KIMI_K2 = dict(
    hidden_size=112,
    intermediate_size=288,
    moe_intermediate_size=32,
    num_attention_heads=8,
    num_key_value_heads=8,
    n_routed_experts=24,
    num_experts_per_tok=8,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.827,
    rope_parameters=dict(
        rope_type="yarn",
        rope_theta=50000.0,
        factor=32.0,
        original_max_position_embeddings=64,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
)
DEEPSEEK = {
    "v3": ("DeepseekV3", dict(n_group=2, topk_group=1)),
    # With a bias the latent norms do not fuse into the projection.
    "v3_bias": ("DeepseekV3", dict(n_group=1, topk_group=1, attention_bias=True)),
    "v2": ("DeepseekV2", dict(mlp_bias=True)),
    "v2_lite": ("DeepseekV2", dict(q_lora_rank=None)),
}
OTHER_MLA = {
    "kimi_k2": ("DeepseekV3", KIMI_K2),
    "v32": ("DeepseekV32", dict(INDEXED, n_group=1, topk_group=1)),
    "glm4_moe_lite": ("Glm4MoeLite", dict(mlp_layer_types=["dense", "sparse", "sparse"])),
    # Layers 1 and 2 attend to the keys that layer 0 chose.
    "glm_moe_dsa": ("GlmMoeDsa", dict(INDEXED, indexer_types=["full", "shared", "full"])),
}
HEADS = {
    # One key-value head for all ranks; four ranks share out three; and heads that are as many as queries.
    "llama": ("Llama", dict(num_key_value_heads=1, mlp_bias=True, attention_bias=True)),
    "mistral": ("Mistral", dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8, sliding_window=6)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=7)),
    "qwen3": (
        "Qwen3",
        dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
        | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
}
# Python 3.10 gets an older release of transformers, which lacks some.
OTHER_MLA = {kind: model for kind, model in OTHER_MLA.items() if hasattr(transformers, f"{model[0]}ForCausalLM")}


def make_model(kind: str, device: str = "cpu", **changes) -> transformers.PreTrainedModel:
    """The same weights on every rank and device; none of them, norms and biases included, could be left out."""
    name, own = {**DEEPSEEK, **OTHER_MLA, **HEADS}[kind]
    sizes = SIZES if kind in HEADS else MLA_SIZES
    config = getattr(transformers, f"{name}Config")(**{**sizes, **own, **changes})
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Of tied weights the logits would be as much larger.
                scale = "embed" in name and not config.tie_word_embeddings
                parameter.normal_(std=1.0 if scale else parameter.shape[-1] ** -0.5)
            elif "norm" in name and "bias" not in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.uniform_(0.0, 0.2)
    return model.to(device)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each of VOCAB_SIZE words."""
    words = ["<unk>", "who", "are", "you", *map(str, range(VOCAB_SIZE - 4))]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def make_ids(shape, device: str = "cpu") -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(2)).to(device)


def make_both(kind: str, backend: str | None, device: str, max_num_tokens: int = 64, **changes):
    """On a rank: the unsharded model, a parallelized copy and what `parallelize` returned."""
    if backend is None:
        os.environ.pop("TP_FUSED_BACKEND", None)
    else:
        os.environ["TP_FUSED_BACKEND"] = backend
    whole = make_model(kind, device, **changes)
    model = copy.deepcopy(whole)
    return whole, model, parallelize(model, max_num_tokens=max_num_tokens, timeout_s=20.0)
