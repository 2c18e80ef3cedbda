"""DeepSeek-V3 models small enough to run on CPU processes, and their prompt."""

from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, FineGrainedFP8Config
from transformers.initialization import no_init_weights
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

VOCAB_SIZE = 256  # token ids are bytes

PRESETS = {
    # Every kind of layer, in seconds.
    "tiny": dict(
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        n_routed_experts=4,
        q_lora_rank=96,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
    ),
    # A seventh of DeepSeek-V3's widths: the replicated projection weighs as much in a layer as it does there. Values
    # are as wide as keys, or torch's fused attention on CPU would not take them.
    "small": dict(
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=16,
        n_routed_experts=8,
        q_lora_rank=224,
        kv_lora_rank=72,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=48,
    ),
    # "tiny" and "small" in fp8: whole blocks of 128 for four ranks, and kv_a ending within one, as DeepSeek-V3's does.
    "tiny-fp8": dict(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        n_routed_experts=4,
        q_lora_rank=128,
        kv_lora_rank=48,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=128,
    ),
    "small-fp8": dict(
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        n_routed_experts=8,
        q_lora_rank=256,
        kv_lora_rank=72,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=128,
    ),
    # What tp_fused touches at DeepSeek-V3's own widths; two layers, few heads, few and narrow experts.
    "v3-layer": dict(
        hidden_size=7168,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        n_routed_experts=4,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    ),
    # The same, with columns for eight ranks to share in blocks of 128, as fp8 needs.
    "v3-layer-fp8": dict(
        hidden_size=7168,
        intermediate_size=2048,
        moe_intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
        n_routed_experts=4,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    ),
}


def make_config(preset: str, num_tokens: int) -> DeepseekV3Config:
    sizes = PRESETS[preset]
    return DeepseekV3Config(
        **sizes,
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=sizes["num_attention_heads"],
        first_k_dense_replace=1,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        max_position_embeddings=max(4096, num_tokens),
        bos_token_id=None,
        eos_token_id=None,
    )


def make_model(config: DeepseekV3Config, seed: int, dtype: torch.dtype, device: torch.device) -> DeepseekV3ForCausalLM:
    """The same random model on every rank that asks with the same seed.

    Each projection is scaled to keep its input's size, so that every block moves the residual and every logit hangs on
    all of it; norm weights differ from one another, so that one left out or swapped shows.
    """
    with no_init_weights():  # all are set below
        model = DeepseekV3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.normal_(std=scale, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.to(device=device, dtype=dtype).eval()


def quantise(model: DeepseekV3ForCausalLM, scale_fmt: str = "float") -> None:
    """Makes the model one in transformers' fine-grained fp8, as DeepSeek's checkpoints are: e4m3, blocks of 128 x 128.

    scale_fmt: "float", or "ue8m0" for scales that are powers of two, as DeepSeek-V3.1's.
    """
    whole = dict(model.named_parameters())
    config = FineGrainedFP8Config(scale_fmt=scale_fmt)
    FineGrainedFP8HfQuantizer(config, pre_quantized=True).preprocess_model(model)
    model.config.quantization_config = config
    made = dict(model.named_parameters())  # of which those of replaced modules have no values yet
    values = {name: whole[name] for name, parameter in made.items() if parameter.is_meta and name in whole}
    for name in [name for name in values if made[name].dtype == torch.float8_e4m3fn]:
        values[name], values[f"{name}_scale_inv"] = quantise_blocks(whole[name], made[f"{name}_scale_inv"].dtype)
    for name, value in values.items():
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, torch.nn.Parameter(value.detach(), requires_grad=False))


def quantise_blocks(weight: torch.Tensor, stored: torch.dtype, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values, the scale of each block, in the dtype that it is stored as) of weights [..., rows, columns]."""
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % size, 0, -rows % size))
    blocks = padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [..., block, row, block, column]
    scale = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / 448
    if stored == torch.float8_e8m0fnu:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    q = (blocks / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return q.flatten(-4, -3).flatten(-2)[..., :rows, :columns].contiguous(), scale.to(stored)


def read_prompt(path: Path, num_tokens: int) -> tuple[torch.Tensor, str]:
    """`num_tokens` bytes of a file as token ids [1, num_tokens], and in words what was taken."""
    text = path.read_bytes()
    if not text:
        raise ValueError(f"{path} is empty")
    times = -(-num_tokens // len(text))
    ids = torch.frombuffer(bytearray((text * times)[:num_tokens]), dtype=torch.uint8).long()
    if times > 1:
        taken = f"{path.name}, {len(text)} bytes, repeated to {num_tokens} tokens"
    else:
        taken = f"the first {num_tokens} of {len(text)} bytes of {path.name}"
    return ids.unsqueeze(0), taken
