"""DeepSeek-V3 in transformers' fine-grained fp8: parallelized and loaded by parts, beside the unsharded fp8 model."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

import safetensors.torch
import transformers
from tiny_models import make_ids, make_model

from tp_fused import ops, partition, projections, prologue, reference
from tp_fused.integrations.transformers import fp8_kernels, load_parallel, parallelize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from presets import quantise, quantise_blocks

pytestmark = pytest.mark.preload(
    "transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers.integrations.finegrained_fp8"
)

BF16, E4M3, E8M0 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu
WAYS = ("all_reduce", "transport", "fused")
# Two heads fill whole blocks of kv_b_proj and of o_proj; kv_a_proj_with_mqa ends within one, as DeepSeek-V3's.
SIZES = dict(
    hidden_size=256,
    intermediate_size=640,
    moe_intermediate_size=512,
    num_hidden_layers=3,
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


def make_whole(device: str = "cpu", scale_fmt: str = "float", dtype: torch.dtype = BF16, **changes):
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


def relative_difference(logits, expected) -> float:
    assert logits.shape == expected.shape and logits.isfinite().all()
    return ((logits.float() - expected.float()).norm() / expected.float().norm()).item()


def check_ways(tp, expected: torch.Tensor, logits, largest: float) -> None:
    """Of each way, `logits()` beside the unsharded model's."""
    found = {}
    for way in WAYS:
        tp.way = way
        found[way] = relative_difference(logits(), expected)
    assert found["all_reduce"] < largest, found
    for way in ("transport", "fused"):
        assert found[way] <= max(2 * found["all_reduce"], 0.01), found


# ---- logits ----


def compare(device: str, scale_fmt: str) -> None:
    """Runs on a rank: prefill of any length, and decode through the cache."""
    whole, model, tp = make_both(device, scale_fmt, **ALL_EXPERTS)
    for shape in ((1, 1), (1, 5), (2, 13)):
        ids = make_ids(shape, device)
        check_ways(tp, whole(ids).logits, lambda ids=ids: model(ids).logits, 0.35)
    ids = make_ids((2, 9), device)

    def decode(model) -> torch.Tensor:
        first = model(ids[:, :7], use_cache=True)
        logits = [first.logits]
        for index in (7, 8):
            logits.append(model(ids[:, index : index + 1], past_key_values=first.past_key_values).logits)
        return torch.cat(logits, dim=1)

    check_ways(tp, decode(whole), lambda: decode(model), 0.35)


@pytest.mark.parametrize(("world_size", "scale_fmt"), [(2, "float"), (2, "ue8m0"), (4, "float")])
def test_logits_beside_the_unsharded_fp8_model(pool, device, scale_fmt, world_size):
    pool.run(compare, device, scale_fmt)


def routed(device: str) -> None:
    """Runs on a rank: with experts that are chosen, of which a rounding may choose others."""
    whole, model, tp = make_both(device)
    ids = make_ids((2, 25), device)
    check_ways(tp, whole(ids).logits, lambda: model(ids).logits, 0.5)


@pytest.mark.parametrize("world_size", [3])
def test_experts_that_are_chosen(pool, device, world_size):
    """Heads 4, 2, 2; intermediate columns 256, 256, 128."""
    pool.run(routed, device)


def no_tokens(device: str) -> list:
    """Runs on a rank: what the attention's input is made of no rows, in each way."""
    _, model, tp = make_both(device, **ALL_EXPERTS)
    layer, made = model.model.layers[0], []
    for way in WAYS:
        tp.way = way
        empty = torch.empty(0, 256, dtype=BF16, device=device)
        outputs = tp.program.attention_input(empty, None, layer.input_layernorm, layer.latent)
        made.append([tuple(output.shape) for output in outputs])
    return made


@pytest.mark.parametrize("world_size", [2])
def test_no_tokens(pool, device, world_size):
    assert pool.run(no_tokens, device) == [[[(0, 128), (0, 48), (0, 64), (0, 256)]] * 3] * 2


def first_latent(device: str, scale_fmt: str) -> None:
    """Runs on a rank: the first layer's queries and keys are the unsharded model's, but for roundings.

    There ranks add nothing up that rounds, so that a scale in the wrong place shows.
    """
    whole, model, tp = make_both(device, scale_fmt, **ALL_EXPERTS)
    seen = []

    def note(module, args):
        seen.append(args[0].detach().clone())

    for one in (whole, model):
        attention = one.model.layers[0].self_attn
        for linear in (attention.q_b_proj, attention.kv_b_proj):
            linear.register_forward_pre_hook(note)
    ids = make_ids((1, 33), device)
    whole(ids)
    expected = list(seen)
    for way in WAYS:
        tp.way = way
        seen.clear()
        model(ids)
        for made, right in zip(seen, expected, strict=True):
            assert (made.float() - right.float()).norm() < 0.02 * right.float().norm(), way


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("world_size", [2])
def test_the_first_latent_is_the_unsharded_models(pool, device, scale_fmt, world_size):
    pool.run(first_latent, device, scale_fmt)


def shards(device: str) -> None:
    """Runs on a rank: what its weights stand for are parts of what the whole ones stand for."""
    whole, model, _ = make_both(device)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def values(weight, scale) -> torch.Tensor:
        if weight.dim() == 3:
            return torch.stack([values(*expert) for expert in zip(weight, scale, strict=True)])
        return reference.dequantize(weight, scale, (128, 128))

    def share(size: int, unit: int) -> slice:
        own = partition.row_slice(-(-size // unit), rank, world_size)
        return slice(own.start * unit, min(own.stop * unit, size))

    heads = share(8, 2)
    for ours, theirs in zip(model.model.layers, whole.model.layers, strict=True):
        compared = []
        for name, size, columns in (("q_b_proj", 128, False), ("kv_b_proj", 128, False), ("o_proj", 64, True)):
            own = slice(heads.start * size, heads.stop * size)
            compared.append((ours.self_attn, theirs.self_attn, name, own, columns))
        dense = [(ours.mlp, theirs.mlp)]
        if hasattr(ours.mlp, "experts"):
            dense = [(ours.mlp.shared_experts, theirs.mlp.shared_experts)]
            both = (ours.mlp.experts, theirs.mlp.experts)
            own = share(512, 128)
            parts = [values(one.gate_up_proj, one.gate_up_proj_scale_inv).chunk(2, dim=1) for one in both]
            for part, right in zip(*parts, strict=True):
                assert torch.equal(part, right[:, own])
            parts = [values(one.down_proj, one.down_proj_scale_inv) for one in both]
            assert torch.equal(parts[0], parts[1][:, :, own])
        for mine, right in dense:
            own = share(right.intermediate_size, 128)
            compared += [
                (mine, right, name, own, name == "down_proj") for name in ("gate_proj", "up_proj", "down_proj")
            ]
        for mine, right, name, own, columns in compared:
            part, right = (
                values(one.weight, one.weight_scale_inv) for one in (getattr(mine, name), getattr(right, name))
            )
            assert torch.equal(part, right[:, own] if columns else right[own]), name


@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_are_parts_of_the_whole(pool, device, world_size):
    pool.run(shards, device)


# ---- which ops ----

COUNTED = {
    prologue: ("mla_prologue", "mla_prologue_fp8"),
    ops: ("rs_rmsnorm", "rs_rmsnorm_fp8", "rs_rmsnorm_ag"),
    projections: ("qkv_a_proj_ag_norm_fp8", "qkv_a_proj_ag_fp8"),
}


def count(device: str, case: str) -> dict:
    """Runs on a rank: which ops a fused forward calls, how often, and with round_scales or without."""
    changes = {"bias": dict(attention_bias=True), "no q_lora": dict(q_lora_rank=None)}.get(case, {})
    whole, model, tp = make_both(device, "ue8m0" if case == "ue8m0" else "float", **ALL_EXPERTS, **changes)
    if case == "eps":  # another than the latent norms have
        for layer in (*whole.model.layers, *model.model.layers):
            layer.input_layernorm.variance_epsilon = 1e-5
    calls, originals = {}, []
    for module, names in COUNTED.items():
        for name in names:
            original = getattr(module, name)

            def counted(*args, original=original, name=name, **options):
                key = f"{name}, rounded" if options.get("round_scales") else name
                calls[key] = calls.get(key, 0) + 1
                return original(*args, **options)

            originals.append((module, name, original))
            setattr(module, name, counted)
    try:
        ids = make_ids((1, 7), device)
        logits = model(ids).logits
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
    check_ways(tp, whole(ids).logits, lambda: logits if tp.way == "fused" else model(ids).logits, 0.35)
    return calls


@pytest.mark.parametrize(
    ("case", "calls"),
    [
        ("plain", {"mla_prologue_fp8": 3, "rs_rmsnorm_ag": 4}),
        ("ue8m0", {"mla_prologue_fp8, rounded": 3, "rs_rmsnorm_ag": 4}),
        ("eps", {"rs_rmsnorm_fp8": 3, "qkv_a_proj_ag_norm_fp8": 3, "rs_rmsnorm_ag": 4}),
        ("bias", {"rs_rmsnorm_fp8": 3, "qkv_a_proj_ag_fp8": 3, "rs_rmsnorm_ag": 4}),
        ("no q_lora", {"qkv_a_proj_ag_norm_fp8": 3, "rs_rmsnorm_ag": 7}),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_fp8_ops_serve_the_layers(pool, device, case, calls, world_size):
    assert pool.run(count, device, case) == [calls] * 2


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


@pytest.mark.parametrize("stored", [torch.float32, E8M0], ids=str)
def test_products_of_rows_and_of_experts(stored):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 200, generator=generator).to(BF16)
    weight, scale = quantise_blocks(torch.randn(3, 136, 200, generator=generator), stored)
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
def test_weights_of_the_tests_are_as_transformers_reads_them(stored):
    """`quantise`, which makes the models here and in the demo, beside transformers' own way back."""
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    q, scale = quantise_blocks(weight, stored)
    read = transformers.integrations.finegrained_fp8.Fp8Dequantize(None)._dequantize_one(q, scale, torch.float32)
    assert (read - weight).abs().max() < weight.abs().max() / 16
    assert q.dtype == E4M3
