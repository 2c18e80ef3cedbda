"""Models in transformers' fine-grained fp8: loaded by parts, refused by the name of a layer, and their products."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

import safetensors.torch
import transformers
from fp8_models import make_both, make_whole
from presets import quantise, quantise_blocks
from tiny_models import make_ids, make_model

from tp_fused import reference
from tp_fused.integrations.transformers import fp8_kernels, load_parallel, parallelize

pytestmark = pytest.mark.preload(
    "transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers.integrations.finegrained_fp8"
)

BF16, E4M3, E8M0 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu

# ---- loading ----


def save(folder: Path, scale_fmt: str) -> None:
    """As DeepSeek's repositories have it: each expert's projections by name, all scales fp32."""
    model = make_whole("cpu", scale_fmt)
    config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": ["DeepseekV3ForCausalLM"]}
    if scale_fmt == "float":
        del config["quantization_config"]["scale_fmt"]  # as DeepSeek-V3's config.json
    transformers.DeepseekV3Config.from_dict(config | {"architectures": ["DeepseekV3ForCausalLM"]}).save_pretrained(
        folder
    )
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.float() if tensor.dtype == E8M0 else tensor
        prefix, _, last = name.rpartition(".")
        kind = "weight_scale_inv" if last.endswith("_scale_inv") else "weight"
        if "gate_up_proj" in last or (prefix.endswith("experts") and "down_proj" in last):
            names = ("gate_proj", "up_proj") if "gate_up" in last else ("down_proj",)
            for expert, whole in enumerate(tensor):
                for projection, part in zip(names, whole.chunk(len(names)), strict=True):
                    state[f"{prefix}.{expert}.{projection}.{kind}"] = part.contiguous()
        else:
            state[name] = tensor.contiguous()
    safetensors.torch.save_file(state, folder / "model.safetensors")


def load(folder: str, device: str, scale_fmt: str) -> None:
    """Runs on a rank: loaded by parts it is the parallelized model, to the bit."""
    _, whole, _ = make_both(device, scale_fmt)
    model, _ = load_parallel(folder, max_num_tokens=64, timeout_s=20.0, device=device)
    expected, found = whole.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    held = sum(tensor.nbytes for tensor in found.values())
    assert held < 0.6 * sum(tensor.nbytes for tensor in make_whole(scale_fmt=scale_fmt).state_dict().values())
    ids = make_ids((2, 9), device)
    assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("world_size", [2])
def test_loaded_by_parts_it_is_the_same_model(pool, device, tmp_path, scale_fmt, world_size):
    save(tmp_path, scale_fmt)
    pool.run(load, str(tmp_path), device, scale_fmt)


def refuse_to_load(folder: str, device: str) -> None:
    """Runs on a rank."""
    load_parallel(folder, max_num_tokens=64, timeout_s=20.0, device=device)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("scale", r"lacks model.layers.1.mlp.experts.gate_up_proj_scale_inv, which DeepseekV3ForCausalLM has"),
        ("bf16", r"model.layers.0.self_attn.q_b_proj.weight is BF16 in .*, expected one of F8_E4M3"),
        ("odd scale", r"model.layers.0.self_attn.o_proj.weight_scale_inv: scales .* must be powers of two"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_what_cannot_be_loaded(pool, device, tmp_path, case, message, world_size):
    save(tmp_path, "ue8m0")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    if case == "scale":
        del state["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
    if case == "bf16":
        state["model.layers.0.self_attn.q_b_proj.weight"] = state["model.layers.0.self_attn.q_b_proj.weight"].to(BF16)
    if case == "odd scale":
        state["model.layers.0.self_attn.o_proj.weight_scale_inv"] *= 1.25
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for outcome in pool.outcomes(refuse_to_load, str(tmp_path), device):
        with pytest.raises(ValueError, match=message):
            raise outcome


# ---- what is refused ----


def refuse(device: str, case: str, changes: dict) -> None:
    """Runs on a rank: raises what `parallelize` raises, of a model that it has left as it was."""
    model = make_whole(device, dtype=torch.float32 if case == "float32" else BF16, **changes)
    first = model.model.layers[0].self_attn
    if case == "static":
        first.q_b_proj.activation_scheme = "static"
    if case == "block size":
        model.model.layers[1].mlp.experts.block_size = (64, 128)
    if case == "one latent":
        first.q_a_proj = torch.nn.Linear(256, 128, bias=False, dtype=BF16)
    if case == "gptq":
        model.config.quantization_config = {"quant_method": "gptq"}
    before = {name: (id(module), id(getattr(module, "weight", None))) for name, module in model.named_modules()}
    try:
        parallelize(model, max_num_tokens=64)
    finally:
        after = {name: (id(module), id(getattr(module, "weight", None))) for name, module in model.named_modules()}
        assert before == after


REFUSED = {
    "heads": (
        dict(num_attention_heads=2, num_key_value_heads=2),
        r"layers.0.self_attn.o_proj: blocks of 128 are whole for 2 heads together, and 2 heads are too few for 2 ranks",
    ),
    "columns": (dict(intermediate_size=128), r"layers.0.mlp.gate_proj: 128 intermediate columns are too few blocks"),
    "experts": (dict(moe_intermediate_size=192), r"layers.1.mlp.experts: gate and up projection, 192 rows each, share"),
    "shared": (dict(moe_intermediate_size=128), r"layers.1.mlp.experts: 128 intermediate columns are too few blocks"),
    "q_a": (
        dict(q_lora_rank=96),
        r"layers.0.self_attn.q_a_proj: 96 rows, which end within a block of 128; those of kv",
    ),
    "one latent": ({}, r"layers.0.self_attn: q_a_proj, kv_a_proj_with_mqa are multiplied as one, and not all of them"),
    "static": ({}, r"layers.0.self_attn.q_b_proj has fp8 weights with activation_scheme 'static'; 'dynamic' is taken"),
    "block size": ({}, r"layers.1.mlp.experts has fp8 weights of weight_block_size \(64, 128\); \(128, 128\) is taken"),
    "float32": ({}, r"beside fp8 weights the others must be bfloat16, got torch.float32"),
    "gptq": ({}, r"takes unquantised weights and transformers' fine-grained fp8, .* quant_method 'gptq'"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("world_size", [2])
def test_what_is_refused_names_the_layer_and_changes_nothing(pool, device, case, world_size):
    changes, message = REFUSED[case]
    for outcome in pool.outcomes(refuse, device, case, changes):
        with pytest.raises(ValueError, match=message):
            raise outcome


def grouped_heads(device: str) -> None:
    """Runs on a rank: a model without latents whose key-value heads of 64 rows cut a block."""
    os.environ.pop("TP_FUSED_BACKEND", None)
    fp8_kernels.supply_kernels()
    changes = dict(hidden_size=256, intermediate_size=256, num_attention_heads=8, head_dim=64)
    model = make_model("mistral", **changes, num_key_value_heads=2).to(BF16)
    quantise(model)
    parallelize(model.to(device), max_num_tokens=64)


@pytest.mark.parametrize("world_size", [2])
def test_heads_of_other_models_may_cut_a_block(pool, device, world_size):
    for outcome in pool.outcomes(grouped_heads, device):
        with pytest.raises(
            ValueError, match=r"0.self_attn.k_proj: rank 0 of 2 would have 0 to 64 of 128 for its heads"
        ):
            raise outcome


# ---- products where transformers has no kernels ----


def operands(num_rows: int, columns: int, experts: int, stored: torch.dtype) -> tuple:
    """Rows, and the weights of experts with their scales."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, columns, generator=generator).to(BF16)
    return rows, *quantise_blocks(torch.randn(experts, 136, columns, generator=generator), stored)


@pytest.mark.parametrize("stored", [torch.float32, E8M0], ids=str)
def test_products_of_rows_and_of_experts(stored):
    rows, weight, scale = operands(11, 200, 3, stored)
    kernels = fp8_kernels._Kernels(None)
    q, row_scale = reference.quantize_e4m3(rows, round_scales=stored == E8M0)
    exact = reference.dequantize(q, row_scale, (1, 128)).double()
    for expert in range(3):
        expected = exact @ reference.dequantize(weight[expert], scale[expert].float(), (128, 128)).double().t()
        made = kernels.matmul(rows.view(1, 11, 200), weight[expert], scale[expert], [128, 128], BF16)
        assert made.shape == (1, 11, 136)
        torch.testing.assert_close(made[0].double(), expected, rtol=2**-8, atol=1e-3)
    counts = torch.tensor([4, 0, 6])  # and a row of no expert here
    offsets = counts.cumsum(0).int()
    grouped = kernels.grouped_matmul(rows, weight, scale, offsets, counts, [128, 128])
    experts = torch.tensor([0] * 4 + [2] * 6 + [3])
    batched = kernels.batched_matmul(rows, weight, scale, [128, 128], experts)
    assert torch.equal(grouped, batched) and not grouped[10].any()
    for index in (0, 9):
        alone = kernels.matmul(rows, weight[experts[index]], scale[experts[index]], [128, 128], BF16)
        torch.testing.assert_close(grouped[index], alone[index])


@pytest.mark.parametrize("stored", [torch.float32, E8M0], ids=str)
def test_products_of_few_rows_are_those_of_many(stored):
    """Rows that are no more than the experts are multiplied one by one."""
    rows, weight, scale = operands(12, 256, 5, stored)
    kernels = fp8_kernels._Kernels(None)
    experts = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 4, 4, 5, 5])  # the last two of no expert here
    many = kernels.batched_matmul(rows, weight, scale, [128, 128], experts)
    few = torch.tensor([0, 3, 4, 8, 11])
    batched = kernels.batched_matmul(rows[few], weight, scale, [128, 128], experts[few])
    torch.testing.assert_close(batched, many[few])
    assert batched[:4].any(1).all() and not batched[4].any()
    counts = torch.bincount(experts[few], minlength=6)[:5]
    grouped = kernels.grouped_matmul(rows[few], weight, scale, counts.cumsum(0).int(), counts, [128, 128])
    assert torch.equal(grouped, batched)


@pytest.mark.parametrize("stored", [torch.float32, E8M0], ids=str)
def test_weights_of_the_tests_are_as_transformers_reads_them(stored):
    """`quantise`, which makes the models here and in the demo, beside transformers' own way back."""
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    q, scale = quantise_blocks(weight, stored)
    read = transformers.integrations.finegrained_fp8.Fp8Dequantize(None)._dequantize_one(q, scale, torch.float32)
    assert (read - weight).abs().max() < weight.abs().max() / 16
    assert q.dtype == E4M3
