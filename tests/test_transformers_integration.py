"""DeepSeek-V2 and V3 of transformers, parallelized, against the unsharded model in one process; and the demo."""

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tp_fused
from tp_fused import partition

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tp_fused.integrations.transformers import parallelize

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import deepseek_v3_prefill as demo  # noqa: E402
from presets import read_prompt  # noqa: E402

WAYS = ("all_reduce", "transport", "fused")
VOCAB_SIZE = 61  # what 2, 3 and 4 ranks cannot share out evenly; so are the heads and the columns below
SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=56,
    intermediate_size=50,
    moe_intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=7,
    num_key_value_heads=7,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    bos_token_id=None,
    eos_token_id=None,
)
MODELS = {
    "v3": (DeepseekV3ForCausalLM, DeepseekV3Config, dict(q_lora_rank=24, n_group=2, topk_group=1)),
    # With a bias the latent norms do not fuse into the projection.
    "v3_bias": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        dict(q_lora_rank=24, n_group=1, topk_group=1, attention_bias=True),
    ),
    "v2": (DeepseekV2ForCausalLM, DeepseekV2Config, dict(q_lora_rank=24, mlp_bias=True)),
    "v2_lite": (DeepseekV2ForCausalLM, DeepseekV2Config, dict(q_lora_rank=None)),
}


def make_model(kind: str, device: str = "cpu", **changes):
    """The same weights on every rank; none of them, norms and biases included, is one that could be left out."""
    model_class, config_class, own = MODELS[kind]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SIZES, **own, **changes})).to(device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    return model


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


# ---- logits ----


def differences(kind: str, backend: str, device: str, shape) -> dict[str, float]:
    """Runs on a rank: how far all logits are from the unsharded model's."""
    whole, model, tp = make_both(kind, backend, device)
    ids = make_ids(shape, device)
    expected = whole(ids).logits
    found = {"rounding": 32 * torch.finfo(expected.dtype).eps * expected.abs().max().item()}
    for way in WAYS:
        tp.way = way
        logits = model(ids).logits
        assert torch.equal(logits.argmax(-1), expected.argmax(-1)), way
        found[way] = (logits - expected).abs().max().item()
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 13)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_logits_equal_the_unsharded_model(pool, backend, device, world_size, kind, shape):
    for found in pool.run(differences, kind, backend, device, shape):
        assert found["all_reduce"] < 1e-4
        for way in ("transport", "fused"):
            assert found[way] <= max(2 * found["all_reduce"], found["rounding"]), way


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
@pytest.mark.parametrize("kind", MODELS)
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [3])
def test_embeddings_of_the_caller(pool, device, way):
    pool.run(embeds, device, way)


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
    heads = dense.self_attn.kv_b_proj.weight.shape[0] // (SIZES["qk_nope_head_dim"] + SIZES["v_head_dim"])
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
        small = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=8)
        parallelize(LlamaForCausalLM(LlamaConfig(**small)), max_num_tokens=8)
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
        whole.config.quantization_config = {"quant_method": "fp8"}
        parallelize(whole, max_num_tokens=8)
    if case == "closed":
        tp_fused.workspace.get_workspace(tp.group.group_name, torch.device(device)).close()
    if case in ("long", "long_all_reduce"):
        tp.way = "fused" if case == "long" else "all_reduce"
    ids = make_ids((3, 3) if case.startswith("long") else (1, 8), device)
    if case in ("above", "below"):
        ids[0, 3] = VOCAB_SIZE if case == "above" else -1
    model(ids, output_hidden_states=case == "hidden_states")


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("class", ValueError, "takes a DeepseekV2ForCausalLM or DeepseekV3ForCausalLM, got .*Llama"),
        ("heads", ValueError, "3 ranks are more than num_attention_heads=2"),
        ("dtypes", ValueError, "must share one device and dtype, got .*float"),
        ("meta", ValueError, "the model is on meta"),
        ("group", ValueError, "has no workspace for .* tensors; call tp_fused.init"),
        ("way", ValueError, "way must be one of all_reduce, transport, fused, got 'fusd'"),
        ("twice", ValueError, "parallelized already"),
        ("quantised", ValueError, "unquantised"),
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


# ---- the demo ----


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.md"
    path.write_text("A rank may own no rows and still takes part. Größe, naïve.\n", encoding="utf-8")
    return path


def run_demo(path: str, num_tokens: int, dtype: str, spoil: str | None) -> int:
    """Runs on a rank: the demo's exit code, with one rank's logits spoilt."""
    os.environ.pop("TP_FUSED_BACKEND", None)
    arguments = f"--preset tiny --repeats 1 --num-tokens {num_tokens} --dtype {dtype} --text-file {path}".split()
    args = demo.parse_arguments([*arguments, "--world-size", str(dist.get_world_size())])
    compare, calls = demo.compare, []

    def spoilt(logits, expected):
        calls.append(None)
        if dist.get_rank() == 1 and list(demo.WAYS)[len(calls) - 1] == spoil:
            logits = logits.roll(1, dims=0)
        return compare(logits, expected)

    demo.compare = spoilt
    try:
        demo.run(args)
    except SystemExit as exit:
        return exit.code
    finally:
        demo.compare = compare
    return 0


@pytest.mark.parametrize("num_tokens", [1, 5, 129])
@pytest.mark.parametrize("world_size", [1, 3])
def test_demo_any_token_count(pool, text_file, num_tokens):
    assert set(pool.run(run_demo, str(text_file), num_tokens, "float32", None)) == {0}


@pytest.mark.parametrize("spoil", [None, *WAYS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world_size", [2])
def test_demo_exits_with_1_on_every_rank_when_one_rank_is_wrong(pool, text_file, dtype, spoil):
    assert set(pool.run(run_demo, str(text_file), 129, dtype, spoil)) == {0 if spoil is None else 1}


@pytest.mark.timeout(180)
def test_demo_from_the_command_line(text_file, tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--preset", "tiny", "--world-size", "2", "--num-tokens", "37", "--repeats", "2"]
    command = [sys.executable, EXAMPLES / "deepseek_v3_prefill.py", *arguments, "--text-file", text_file]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*command, "--json", output], capture_output=True, text=True, timeout=150, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout
    assert "tp_fused transport" in done.stdout
    written = json.loads(output.read_text())
    assert written["ok"]
    assert list(written["ways"]) == list(WAYS)
    for way in written["ways"].values():
        assert sum(way["ms"].values()) == pytest.approx(2 * way["ms"]["total"])  # the parts, and their sum
        assert way["tokens_per_s"] == pytest.approx(37e3 / way["ms"]["total"])
        assert way["flipped_positions"] == []


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (-9, "a rank ended: rank 1 was killed")])
def test_demo_passes_a_failure_on(monkeypatch, text_file, code, expected):
    def launch(run, world_size, args):
        raise torch.multiprocessing.ProcessExitedException("rank 1 was killed", 1, 0, exit_code=code)

    monkeypatch.setattr(demo, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["demo", "--text-file", str(text_file)])
    with pytest.raises(SystemExit) as exit:
        demo.main()
    assert exit.value.code == expected


def result(difference: float, flipped=()) -> dict:
    kinds = dict.fromkeys(("max_difference", "mean_difference"), difference)
    return {**kinds, "worst_position": 3, "flipped": list(flipped)}


@pytest.mark.parametrize(
    ("today", "fused", "dtype", "words"),
    [
        (result(1e-5), result(1.9e-5), torch.float32, None),
        (result(1e-5), result(2.1e-5), torch.float32, "fused, rank 0: max_difference of the logits is 2.1e-05"),
        (result(0.0), result(1e-6), torch.float32, None),  # today's way on one rank rounds as the whole model
        (result(0.0), result(1e-4), torch.float32, "more than 1.53e-05; worst at position 3"),
        (result(0.1), result(0.1), torch.float32, "all_reduce, rank 0"),
        (result(1e-5), result(float("inf")), torch.float32, "fused, rank 0"),
        (result(1e-5), result(1e-5, [7]), torch.float32, "fused, rank 0: another argmax at 1 of 100 positions, the"),
        (result(0.03, [7]), result(0.03, [8, 9]), torch.bfloat16, None),
        (result(0.03, [7]), result(0.03, [6, 8, 9]), torch.bfloat16, "another argmax at 3 of 100 positions"),
        (result(0.1), result(0.3), torch.bfloat16, "fused, rank 0: mean_difference"),
    ],
)
def test_demo_judges(today, fused, dtype, words):
    wrong = demo.judge({"all_reduce": [today], "fused": [fused]}, num_tokens=100, largest_logit=4.0, dtype=dtype)
    assert len(wrong) == (words is not None)
    assert all(words in line for line in wrong)


def test_demo_compares():
    expected = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert demo.compare(expected, expected)["max_difference"] == 0
    found = demo.compare(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), expected)
    assert found["max_difference"] == torch.inf
    assert found["worst_position"] == 1
    swapped = demo.compare(expected.flip(1), expected)
    assert swapped == {"max_difference": 2, "mean_difference": 1.5, "worst_position": 1, "flipped": [0, 1]}


def test_demo_summarizes_the_slowest_rank():
    def run(total, communication):
        return {"communication": communication, "rms_norm": 0.0, "qkv_a_proj": 0.0, "total": total}

    today = [[run(4.0, 1.0), run(9.0, 1.0), run(6.0, 1.0)], [run(5.0, 3.0), run(2.0, 3.0), run(6.0, 3.0)]]
    fused = [[run(2.0, 1.0), run(3.0, 1.0), run(6.0, 1.0)], [run(2.5, 2.0), run(3.0, 2.0), run(1.0, 2.0)]]
    summary = demo.summarize({"all_reduce": today, "fused": fused})
    assert summary["all_reduce"]["total"] == 6.0
    assert summary["all_reduce"]["communication"] == 2.0
    assert summary["all_reduce"]["rest"] == 4.0
    assert summary["fused"]["total"] == 3.0
    assert summary["fused"]["speedup"] == 2.0  # of 2, 3 and 1


@pytest.mark.parametrize(
    ("num_tokens", "ids", "words"),
    [(2, [97, 98], "first 2 of 3 bytes"), (7, [97, 98, 99] * 2 + [97], "repeated to 7 tokens")],
)
def test_demo_prompt(tmp_path, num_tokens, ids, words):
    (tmp_path / "abc").write_text("abc")
    prompt, taken = read_prompt(tmp_path / "abc", num_tokens)
    assert prompt.tolist() == [ids]
    assert words in taken


@pytest.mark.parametrize(
    "arguments", ["--num-tokens 0", "--world-size 9", "--repeats 0", "--text-file none", "--json none/out.json"]
)
def test_demo_refuses(text_file, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        demo.parse_arguments(["--preset", "tiny", "--text-file", str(text_file), *arguments.split()])
    assert exit.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err
    assert isinstance(demo.parse_arguments(["--text-file", str(text_file)]), argparse.Namespace)
