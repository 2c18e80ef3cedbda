"""examples/deepseek_v3_prefill.py, the demo: what it measures, judges and refuses, and how it ends."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs transformers (the test extra)")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import deepseek_v3_prefill as demo  # noqa: E402
from presets import read_prompt  # noqa: E402

pytestmark = pytest.mark.preload("transformers.models.deepseek_v3.modeling_deepseek_v3")

WAYS = ("all_reduce", "transport", "fused")


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.md"
    path.write_text("A rank may own no rows and still takes part. Größe, naïve.\n", encoding="utf-8")
    return path


def run_demo(path: str, num_tokens: int, dtype: str, spoil: str | None) -> int:
    """Runs on a rank: the demo's exit code, with one rank's logits spoilt."""
    os.environ.pop("TP_FUSED_BACKEND", None)
    preset = "tiny-fp8" if dtype == "fp8" else "tiny"
    arguments = f"--preset {preset} --repeats 1 --num-tokens {num_tokens} --dtype {dtype} --text-file {path}".split()
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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
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
    for progress in ("building the model ...", "checking fused ...", "timing, round 2 of 2 ..."):
        assert progress in done.stderr.splitlines()
    assert "OK" in done.stdout
    assert "tp_fused transport" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
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
        (result(0.7, range(33)), result(1.3, range(66)), torch.float8_e4m3fn, None),
        (result(0.9), result(0.9), torch.float8_e4m3fn, "all_reduce, rank 0: mean_difference"),
        (result(0.5), result(1.1), torch.float8_e4m3fn, "fused, rank 0: mean_difference"),
        (result(0.5, range(34)), result(0.5), torch.float8_e4m3fn, "all_reduce, rank 0: another argmax at 34 of 100"),
        (result(0.5, range(3)), result(0.5, range(21)), torch.float8_e4m3fn, None),
        (
            result(0.5, range(3)),
            result(0.5, range(22)),
            torch.float8_e4m3fn,
            "fused, rank 0: another argmax at 22 of 100",
        ),
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
    assert summary["fused"]["speedup"] == 2.0  # 6 beside 3


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
    "arguments",
    [
        *("--num-tokens 0", "--world-size 9", "--repeats 0", "--text-file none", "--json none/out.json"),
        "--seed 99999999999999999999",
    ],
)
def test_demo_refuses(text_file, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        demo.parse_arguments(["--preset", "tiny", "--text-file", str(text_file), *arguments.split()])
    assert exit.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err
    assert isinstance(demo.parse_arguments(["--text-file", str(text_file)]), argparse.Namespace)
