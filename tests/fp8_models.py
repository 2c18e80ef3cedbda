"""Tiny DeepSeek-V3s in transformers' fine-grained fp8, for the tests of them."""

import copy
import os
import sys
from pathlib import Path

import torch
from tiny_models import make_model

from tp_fused.integrations.transformers import fp8_kernels, parallelize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from presets import quantise

# Two heads fill whole blocks of kv_b_proj and of o_proj; kv_a_proj_with_mqa ends within one, as DeepSeek-V3's.
SIZES = dict(
    hidden_size=256,
    intermediate_size=640,
    moe_intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    q_lora_rank=128,
    kv_lora_rank=48,
    qk_rope_head_dim=64,
    qk_nope_head_dim=64,
    v_head_dim=64,
    n_routed_experts=4,
)
# No two experts can swap where they are nearly tied: then differences are those of rounding.
ALL_EXPERTS = dict(n_routed_experts=2, num_experts_per_tok=2, n_group=1, topk_group=1)


def make_whole(device: str = "cpu", scale_fmt: str = "float", dtype: torch.dtype = torch.bfloat16, **changes):
    fp8_kernels.supply_kernels()
    model = make_model("v3", **{**SIZES, **changes})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():  # not the buffers, which `from_pretrained` leaves in fp32
        # Blocks of different size, so that one block's scale for another's shows.
        for dim in range(1, parameter.dim() + 1) if "proj" in name else ():
            count = parameter.shape[-dim]
            factors = torch.exp2(torch.rand(-(-count // 128), generator=generator) * 3 - 1.5).repeat_interleave(128)
            parameter.data *= factors[:count].view(-1, *[1] * (dim - 1))
        parameter.data = parameter.data.to(dtype)
    quantise(model, scale_fmt)
    return model.to(device)


def make_both(device: str, scale_fmt: str = "float", **changes):
    """On a rank: the unsharded model, a parallelized copy and what `parallelize` returned."""
    os.environ.pop("TP_FUSED_BACKEND", None)
    whole = make_whole(device, scale_fmt, **changes)
    model = copy.deepcopy(whole)
    return whole, model, parallelize(model, max_num_tokens=64, timeout_s=20.0)
