"""DeepSeek-V2 and V3 of transformers, parallelized, against the unsharded model in one process."""

import copy
import io

import pytest
import torch
import torch.distributed as dist

import tp_fused
from tp_fused import partition

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

import fp8_models
from tiny_models import DEEPSEEK, MLA_SIZES, VOCAB_SIZE, make_both, make_ids, make_model
from transformers import GPT2Config, GPT2LMHeadModel

from tp_fused.integrations.transformers import parallelize

pytestmark = pytest.mark.preload(
    "transformers.models.deepseek_v2.modeling_deepseek_v2", "transformers.models.deepseek_v3.modeling_deepseek_v3"
)

WAYS = ("all_reduce", "transport", "fused")
# ---- logits ----


SHAPES = [(1, 1), (1, 5), (2, 13)]


def differences(kind: str, backend: str, device: str) -> list[dict[str, float]]:
    """Runs on a rank: how far all logits are from the unsharded model's, by shape of the tokens."""
    whole, model, tp = make_both(kind, backend, device)
    found = []
    for shape in SHAPES:
        ids = make_ids(shape, device)
        expected = whole(ids).logits
        found.append({"rounding": 32 * torch.finfo(expected.dtype).eps * expected.abs().max().item()})
        for way in WAYS:
            tp.way = way
            logits = model(ids).logits
            assert torch.equal(logits.argmax(-1), expected.argmax(-1)), (way, shape)
            found[-1][way] = (logits - expected).abs().max().item()
    return found


@pytest.mark.parametrize("kind", DEEPSEEK)
@pytest.mark.parametrize(("world_size", "reference"), [(1, False), (2, False), (3, False), (4, False), (3, True)])
def test_logits_equal_the_unsharded_model(pool, device, reference, kind):
    """test_ops.py has both backends at every world size; here the reference one has to serve all that models call."""
    for of_rank in pool.run(differences, kind, "reference" if reference else device, device):
        for shape, found in zip(SHAPES, of_rank, strict=True):
            assert found["all_reduce"] < 1e-4, shape
            for way in ("transport", "fused"):
                assert found[way] <= max(2 * found["all_reduce"], found["rounding"]), (way, shape)


def generate(kind: str, device: str, way: str) -> None:
    """Runs on a rank: prefill and decode through the cache, a padded batch of prompts."""
    whole, model, tp = make_both(kind, None, device)
    tp.way = way
    ids = make_ids((2, 9), device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **arguments), whole.generate(ids, **arguments))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", DEEPSEEK)
@pytest.mark.parametrize("world_size", [3])
def test_generate_equals_the_unsharded_model(pool, device, kind, way):
    pool.run(generate, kind, device, way)


def chunked(device: str) -> None:
    """Runs on a rank: a prompt in two forwards through one cache."""
    whole, model, _ = make_both("v3", None, device)
    ids = make_ids((1, 20), device)
    first = model(ids[:, :13], use_cache=True)
    second = model(ids[:, 13:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits, whole(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("world_size", [2])
def test_chunked_prefill(pool, device):
    pool.run(chunked, device)


def embeds(device: str, way: str) -> None:
    """Runs on a rank: embeddings of the caller, whole on every rank and in any layout, are not added up."""
    whole, model, tp = make_both("v3", None, device)
    tp.way = way
    inputs = whole.model.embed_tokens(make_ids((5, 2), device)).transpose(0, 1)
    before = inputs.clone()
    expected = whole(inputs_embeds=inputs.contiguous()).logits
    torch.testing.assert_close(model(inputs_embeds=inputs).logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(inputs, before)
    hidden = model.model(None, None, None, None, inputs).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), expected, atol=1e-4, rtol=0)
    assert torch.equal(model.get_input_embeddings()(make_ids((5, 2), device)), inputs.transpose(0, 1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [3])
def test_embeddings_of_the_caller(pool, device, way):
    pool.run(embeds, device, way)


def no_layers(kind: str, device: str) -> None:
    """Runs on a rank."""
    whole, model, tp = make_both(kind, None, device, num_hidden_layers=0)
    ids = make_ids((2, 7), device)
    for way in WAYS:
        tp.way = way
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "v3"])
@pytest.mark.parametrize("world_size", [2])
def test_a_model_of_no_layers(pool, device, kind):
    pool.run(no_layers, kind, device)


def other_dtypes(kind: str, device: str, way: str) -> tuple[list[str], bool]:
    """Runs on a rank: what is said of another dtype than the model's; and whether its own is taken."""
    made = fp8_models.make_both(device, **fp8_models.ALL_EXPERTS) if kind == "fp8" else make_both(kind, None, device)
    _, model, tp = made
    tp.way, ids, own = way, make_ids((2, 4), device), model.lm_head.weight.dtype
    other, said = torch.bfloat16 if own == torch.float32 else torch.float16, []
    rows = model.get_input_embeddings()(ids)
    for inputs, dtype in (({"input_ids": ids}, other), ({"inputs_embeds": rows.to(other)}, None)):
        try:
            with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
                model(**inputs)
        except ValueError as error:
            said.append(str(error))
    with torch.autocast(device, torch.bfloat16, enabled=own == torch.bfloat16):
        same = torch.equal(model(ids).logits, model(inputs_embeds=rows).logits)
    return said, same


@pytest.mark.parametrize("way", ["all_reduce", "fused"])
@pytest.mark.parametrize("kind", ["llama", "v3", "fp8"])
@pytest.mark.parametrize("world_size", [2])
def test_another_dtype_is_told(pool, device, kind, way):
    own, other = ("bfloat16", "float16") if kind == "fp8" else ("float32", "bfloat16")
    for (autocast, embeds), same in pool.run(other_dtypes, kind, device, way):
        assert f"torch.autocast to torch.{other} is on, and the model is in torch.{own}" in autocast
        assert f"inputs_embeds are torch.{other}, the model's hidden states torch.{own}" in embeds
        assert same


# ---- what is where ----


def residual_rows(device: str) -> dict[str, list[int]]:
    """Runs on a rank: rows of the residual that each layer leaves."""
    _, model, tp = make_both("v3", None, device)
    rows = {way: [] for way in WAYS}
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, stream: rows[tp.way].append(stream.residual.shape[0]))
    for way in WAYS:
        tp.way = way
        model(make_ids((2, 7), device))
    return rows


@pytest.mark.parametrize("world_size", [4])
def test_residual_stays_scattered(pool, device, world_size):
    for rank, rows in enumerate(pool.run(residual_rows, device)):
        own = partition.row_count(14, rank, world_size)
        assert rows == {"all_reduce": [14] * 3, "transport": [14] * 3, "fused": [own] * 3}


def shares(device: str) -> tuple:
    """Runs on a rank: (heads, dense columns, expert columns with their padding, latent rows)."""
    _, model, _ = make_both("v3", None, device)
    dense, sparse = model.model.layers[0], model.model.layers[1]
    experts = sparse.mlp.experts
    heads = dense.self_attn.kv_b_proj.weight.shape[0] // (MLA_SIZES["qk_nope_head_dim"] + MLA_SIZES["v_head_dim"])
    assert heads == dense.self_attn.num_heads
    assert experts.gate_up_proj.shape[1] == 2 * experts.down_proj.shape[2]
    return heads, dense.mlp.down_proj.in_features, experts.down_proj.shape[2], dense.latent.weight.shape[0]


@pytest.mark.parametrize("world_size", [3])
def test_shares_follow_the_row_rule(pool, device):
    latent = 24 + 16 + 8
    assert pool.run(shares, device) == [(3, 17, 12, latent), (2, 17, 12, latent), (2, 16, 12, latent)]


# ---- a fault must show ----


def drop_one_rank(device: str, way: str) -> float:
    """Runs on a rank: the largest difference when rank 1's part is missing from one reduction."""
    whole, model, tp = make_both("v3", None, device)
    tp.way = way
    ids = make_ids((1, 9), device)

    def forget(module, args, output):
        return output if dist.get_rank() != 1 else torch.zeros_like(output)

    model.model.layers[-1].mlp.register_forward_hook(forget)
    return (model(ids).logits - whole(ids).logits).abs().max().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [2])
def test_a_dropped_partial_sum_shows(pool, device, way):
    assert all(difference > 0.1 for difference in pool.run(drop_one_rank, device, way))


def refuse(case: str, device: str) -> None:
    """Runs on a rank: raises what `parallelize` or the forward raises."""
    if case == "class":
        parallelize(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8)), max_num_tokens=8)
    if case == "heads":
        parallelize(make_model("v3", device, num_attention_heads=2, num_key_value_heads=2), max_num_tokens=8)
    if case == "dtypes":
        model = make_model("v3", device)
        model.lm_head.half()
        parallelize(model, max_num_tokens=8)
    if case == "meta":
        parallelize(make_model("v3", device).to("meta"), max_num_tokens=8)
    if case == "group":
        parallelize(make_model("v3", device), dist.new_group())
    if case == "way":
        parallelize(make_model("v3", device), max_num_tokens=8, way="fusd")
    whole, model, tp = make_both("v3", None, device, max_num_tokens=8)
    if case == "twice":
        parallelize(model, max_num_tokens=8)
    if case == "quantised":
        whole.config.quantization_config = {"quant_method": "gptq"}
        parallelize(whole, max_num_tokens=8)
    if case == "closed":
        tp_fused.groups.get_workspace(tp.group.group_name, torch.device(device)).close()
    if case in ("long", "long_all_reduce"):
        tp.way = "fused" if case == "long" else "all_reduce"
    ids = make_ids((3, 3) if case.startswith("long") else (1, 8), device)
    if case in ("above", "below"):
        ids[0, 3] = VOCAB_SIZE if case == "above" else -1
    model(ids, output_hidden_states=case == "hidden_states")


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("class", ValueError, "takes a DeepseekV2ForCausalLM, .*, got .*GPT2"),
        ("heads", ValueError, "3 ranks are more than num_attention_heads=2"),
        ("dtypes", ValueError, "must share one device and dtype, .* got .*float"),
        ("meta", ValueError, "the model is on meta"),
        ("group", ValueError, "has no workspace for .* tensors; call tp_fused.init"),
        ("way", ValueError, "way must be one of all_reduce, transport, fused, got 'fusd'"),
        ("twice", ValueError, "parallelized already"),
        ("quantised", ValueError, "unquantised weights and .* fine-grained fp8, .* quant_method 'gptq'"),
        ("closed", ValueError, "has no workspace"),
        ("long", ValueError, r"9 tokens \(3, 3\) is over max_num_tokens=8"),
        ("long_all_reduce", ValueError, r"9 tokens \(3, 3\) is over max_num_tokens=8"),
        ("above", IndexError, "index out of range"),
        ("below", IndexError, "index out of range"),
        ("hidden_states", ValueError, "output_hidden_states"),
    ],
)
@pytest.mark.parametrize("world_size", [3])
def test_what_cannot_run_raises_on_every_rank(pool, device, case, error, message):
    if error is IndexError and device == "cuda":
        pytest.skip("a token id out of range is an assertion of torch's own on the card, and the process's last")
    for outcome in pool.outcomes(refuse, case, device):
        with pytest.raises(error, match=message):
            raise outcome


def copies(kind: str, device: str, folder: str) -> tuple[bool, list[str]]:
    """Runs on a rank: whether a copy of the model computes the same, and what saving them says."""
    _, model = make_both(kind, device, device)[:2]
    ids, copied = make_ids((1, 9), device), copy.deepcopy(model)
    same = torch.equal(copied(ids).logits, model(ids).logits)
    said = []
    whole = (model, model.model, model.base_model, copied, copied.model)
    for save in (lambda _: torch.save(model, io.BytesIO()), *(one.save_pretrained for one in whole), model.push_to_hub):
        try:
            save(f"{folder}/saved")
        except (NotImplementedError, TypeError) as error:
            said.append(str(error))
    return same, said


@pytest.mark.parametrize("kind", ["llama", "v3"])
@pytest.mark.parametrize("world_size", [2])
def test_a_model_is_copied_but_not_saved(pool, device, tmp_path, kind, world_size):
    for same, said in pool.run(copies, kind, device, str(tmp_path)):
        assert same
        assert len(said) == 7 and all("save it before parallelize" in words for words in said)
    assert not (tmp_path / "saved").exists()
