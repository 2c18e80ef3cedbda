"""DeepSeek-V3 in transformers' fine-grained fp8, parallelized, beside the unsharded fp8 model."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

from fp8_models import ALL_EXPERTS, make_both
from tiny_models import make_ids

from tp_fused import ops, partition, projections, prologue, reference

pytestmark = pytest.mark.preload(
    "transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers.integrations.finegrained_fp8"
)

WAYS = ("all_reduce", "transport", "fused")


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
    """Heads 4, 2, 2; intermediate columns 256, 256, 128, and of experts 256, 128, 128."""
    pool.run(routed, device)


def no_tokens(device: str) -> list:
    """Runs on a rank: what the attention's input is made of no rows, in each way."""
    _, model, tp = make_both(device, **ALL_EXPERTS)
    layer, made = model.model.layers[0], []
    for way in WAYS:
        tp.way = way
        empty = torch.empty(0, 256, dtype=torch.bfloat16, device=device)
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
        ("plain", {"mla_prologue_fp8": 2, "rs_rmsnorm_ag": 3}),
        ("ue8m0", {"mla_prologue_fp8, rounded": 2, "rs_rmsnorm_ag": 3}),
        ("eps", {"rs_rmsnorm_fp8": 2, "qkv_a_proj_ag_norm_fp8": 2, "rs_rmsnorm_ag": 3}),
        ("bias", {"rs_rmsnorm_fp8": 2, "qkv_a_proj_ag_fp8": 2, "rs_rmsnorm_ag": 3}),
        ("no q_lora", {"qkv_a_proj_ag_norm_fp8": 2, "rs_rmsnorm_ag": 5}),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_fp8_ops_serve_the_layers(pool, device, case, calls, world_size):
    assert pool.run(count, device, case) == [calls] * 2
