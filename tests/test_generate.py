"""examples/generate.py: what it says, how it ends, and what it refuses."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

from ranks import run_program
from tiny_models import make_both, make_ids, make_model, make_tokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import generate  # noqa: E402


def run_example(arguments: list[str], spoil: bool) -> tuple[int, dict]:
    """Runs on a rank: the exit code, and what was found; with a token of tp_fused's way spoilt."""
    os.environ.pop("TP_FUSED_BACKEND", None)
    args = generate.parse_arguments([*arguments, "--world-size", str(dist.get_world_size())])
    talk, shown, show = generate.talk, {}, generate.show

    def spoilt(*args):
        result = talk(*args)
        if spoil and shown.setdefault("calls", 0):
            result["answers"][0][0] ^= 1
        shown["calls"] = 1
        return result

    def kept(say, found, *rest):
        shown["found"] = found
        show(say, found, *rest)

    generate.talk, generate.show = spoilt, kept
    try:
        generate.run(args)
        code = 0
    except SystemExit as exit:
        code = exit.code
    finally:
        generate.talk, generate.show = talk, show
    return code, shown["found"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world_size", [3])
def test_both_ways_say_the_same(pool, dtype):
    arguments = ["--prompt", "Who?", "And what else?", "Aha.", "--num-tokens", "5", "--dtype", dtype]
    for code, found in pool.run(run_example, arguments, False):
        assert code == 0
        assert [len(answer) for answer in found["fused"]["answers"]] == [5, 5, 5]
        if dtype == "float32":
            assert found["fused"]["answers"] == found["all_reduce"]["answers"]


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 1), ("bfloat16", 0)])
@pytest.mark.parametrize("world_size", [2])
def test_another_token_ends_it_with_1(pool, dtype, expected):
    arguments = ["--prompt", "Who?", "--num-tokens", "3", "--dtype", dtype]
    assert [code for code, _ in pool.run(run_example, arguments, True)] == [expected] * 2


def against_transformers(kind: str, device: str) -> None:
    """Runs on a rank: two turns, each continued as transformers' own generate continues all that was said."""
    whole, model, _ = make_both(kind, None, device)
    turns = [make_ids((1, 9), device), make_ids((1, 4), device)]
    found = generate.talk(model, turns, 6, torch.device(device))
    said = torch.empty(1, 0, dtype=torch.long, device=device)
    for turn, answer in zip(turns, found["answers"], strict=True):
        said = torch.cat([said, turn], 1)
        # Without a mask it takes tokens that happen to be the padding's for padding.
        arguments = {"attention_mask": torch.ones_like(said), "pad_token_id": 0}
        said = whole.generate(said, max_new_tokens=6, do_sample=False, **arguments)
        assert said[0, -6:].tolist() == answer


@pytest.mark.parametrize("kind", ["v3", "llama", "mistral"])
@pytest.mark.parametrize("world_size", [2])
def test_a_conversation_is_transformers_own(pool, device, kind):
    pool.run(against_transformers, kind, device)


def sliding(device: str) -> tuple[str, list[int]]:
    """Runs on a rank: why a cache with a window is not captured, and that it decodes all the same."""
    _, model, _ = make_both("mistral", None, device)
    conversation = generate.Conversation(model, 32, torch.device(device), graphs=True)
    ids = make_ids((1, 9), device)
    conversation.warm_up(ids)
    conversation.prefill(ids)
    return conversation.why_eager, conversation.decode(4).tolist()


@pytest.mark.parametrize("world_size", [2])
def test_a_sliding_window_is_decoded_eagerly(pool, device):
    for why, tokens in pool.run(sliding, device):
        assert "sliding window" in why and len(tokens) == 4


@pytest.mark.preload("transformers.models.qwen3.modeling_qwen3")
def test_the_program_with_a_stored_model(tmp_path):
    make_model("qwen3").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--prompt", "who are you", "--num-tokens", "4", "--device", "cpu"]
    printed = run_program(EXAMPLES / "generate.py", tmp_path, 2, *arguments)
    assert "> who are you" in printed
    for title in generate.WAYS.values():
        assert f"{title}: decoded eagerly, no GPU\n" in printed
        assert re.search(rf"^{title} +[\d.]+ +[\d.]+  eager$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-tokens", "0"], "--num-tokens must be at least 1, got 0"),
        (["--world-size", "0"], "--world-size must be at least 1, got 0"),
        (["--seed", "99999999999999999999"], "--seed must fit into 64 bits, got 99999999999999999999"),
        (["--prompt", "Hello", ""], "--prompt: a turn is empty"),
        (["--model", "nowhere"], "--model: there is no nowhere/config.json"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        generate.parse_arguments(arguments)
    assert message in capsys.readouterr().err
