"""A slice of the long random runs, what they are made of, and that they find what is wrong."""

import itertools
import json
import re
from collections import Counter

import pytest
import torch
from programs import ALL_OPS, PROJECTING, REDUCING
from ranks import Pool
from soak_calls import PROFILES, SEGMENT_CALLS, Sequence
from soak_ranks import Report, Wrong

from tools import soak

DEVICES = ["cpu", "cuda"]


@pytest.mark.parametrize(
    ("world_size", "segment"),
    [pytest.param(2, 1, marks=pytest.mark.cuda), (4, 2), pytest.param(8, 4, marks=pytest.mark.cuda)],
)
def test_a_slice(device, world_size, segment):
    sequence = Sequence(seed=21, world_size=world_size, device=device)
    length = sequence.segment_calls
    calls = length if device == "cuda" else 400  # what a few busy cores do in seconds
    with Pool(world_size, device) as pool:  # of its own: other tests' groups are none of its business
        outcome = soak.soak(pool, sequence, segment * length, calls, seconds=60)
    assert not outcome.wrong, soak.describe(sequence, outcome)
    assert outcome.calls.total() >= calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--world-size 0", "--world-size must be 1 to 8, got 0"),
        ("--world-size 2 9", "--world-size must be 1 to 8, got 9"),
        ("--calls 0", "--calls must be at least 1, got 0"),
        ("--seconds -1", "--seconds must be over 0, got -1.0"),
        ("--seconds nan", "--seconds must be over 0, got nan"),
        ("--start -1", "--start must be at least 0, got -1"),
        ("--repeat-share 2", "--repeat-share must be 0 to 1, got 2.0"),
        ("--device cuda", "--device: cuda was asked for, but torch sees no card"),
    ],
)
def test_options_that_call_nothing(monkeypatch, capsys, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        soak.main(options.split())
    assert message in capsys.readouterr().err


# ---- that errors are found ----


def run(capsys, command: str) -> tuple[int, str]:
    code = soak.main(command.split())
    return code, capsys.readouterr().out


def repeated(output: str) -> str:
    """The arguments of the command that is told in the output."""
    return output.split("These calls again:")[1].splitlines()[1].split("tools.soak ")[1]


def told(output: str) -> list[str]:
    """The lines that say what is wrong: the call, and what was wrong with it on which rank."""
    return output.split("the first ones:\n")[1].split("These calls again:")[0].splitlines()


@pytest.mark.parametrize(
    ("what", "message"),
    [("bit", r"1 of \d+ rows wrong"), ("rows", r"2 of \d+ rows wrong"), ("raise", "injected")],
    ids=["bit", "rows", "raise"],
)
def test_an_error_is_found_and_its_command_repeats_it(device, capsys, tmp_path, what, message):
    path, start = tmp_path / "soak.json", SEGMENT_CALLS[device]
    where = f"--device {device} --world-size 2 --seed 7 --start {start} --calls 60"
    spoiled = f"--only reduce_scatter_rows all_gather_rows --inject {what}:{start + 30}:1"
    code, output = run(capsys, f"{where} {spoiled} --json {path}")
    assert code == 1 and "seed 7" in output, output
    wrong = told(output)[1]
    assert wrong.startswith("    rank 1: ") and re.search(message, wrong), output
    summary = json.loads(path.read_text())
    assert summary["wrong"] >= 1 and f"--seed 7 --start {start} " in summary["world_sizes"][0]["repeat"]

    code, again = run(capsys, repeated(output))
    assert code == 1 and told(again)[:2] == told(output)[:2]

    if what == "bit":
        code, output = run(capsys, repeated(output).split("--inject")[0])
        assert code == 0 and " calls, 0 wrong, " in output


def test_a_rank_that_dies_is_a_failure(capsys):
    code, output = run(capsys, "--world-size 2 --seed 7 --calls 60 --inject exit:30:1")
    assert code == 1 and "RankDied: the process of rank 1 ended with exit code 3" in output
    assert "--seed 7 --start 0 --calls 60 --inject exit:30:1" in output


def test_results_that_differ_from_rank_to_rank_are_a_failure():
    """Where only the first result of each rank is known to be near enough."""
    sequence = Sequence(seed=0, world_size=2)
    segment = sequence.segment(0)
    step = next(step for step in segment.steps if segment.kinds[step.kind].call.op in PROJECTING)
    number = next(
        i for i, other in enumerate(segment.steps) if (other.kind, other.version) == (step.kind, step.version)
    )
    reports = [Report(Counter(), digests={(step.kind, step.version): (digest,)}) for digest in (1, 1, 2)]
    same, different = soak.Outcome(2), soak.Outcome(2)
    soak.add(same, sequence, 0, reports[:2])
    soak.add(different, sequence, 0, reports[1:])
    assert not same.wrong and different.num_wrong == 1
    assert different.wrong == [Wrong(number, 1, "its result has other bits than rank 0's")]


# ---- what is called ----


@pytest.mark.parametrize("kind", DEVICES)
def test_a_segment_follows_from_the_sequence(kind):
    one, same, other = (Sequence(seed, 3, kind).segment(5) for seed in (1, 1, 2))
    assert (one.kinds, one.steps, one.spaces) == (same.kinds, same.steps, same.spaces)
    assert one.kinds != other.kinds and one.steps != other.steps
    assert len(one.steps) == SEGMENT_CALLS[kind] and one.first == 5 * SEGMENT_CALLS[kind]


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_everything_is_called_sooner_or_later(kind, world_size):
    segments = [Sequence(0, world_size, kind).segment(index) for index in range(90)]
    kinds = [(segment.spaces[made.space], made) for segment in segments for made in segment.kinds]
    calls = [made.call for _, made in kinds]
    forms = {(made.call.op, made.call.dtype, made.call.residual, made.in_place is None) for _, made in kinds}
    for op, dtype in itertools.product(ALL_OPS, (torch.bfloat16, torch.float16, torch.float32)):
        residuals = (None, "full", "slice") if op in REDUCING else (None,)
        for residual, staged in itertools.product(residuals, (True, False) if op in REDUCING else (True,)):
            assert (op, dtype, residual, staged) in forms
    assert {torch.uint8, torch.float8_e4m3fn} <= {call.dtype for call in calls}
    counts, widths = {call.num_tokens for call in calls}, {call.hidden_size for call in calls}
    assert {0, 1, world_size - 1, world_size, world_size + 1, 12345} <= counts and {8, 16384} <= widths
    assert any(made.call.num_tokens == space.max_num_tokens for space, made in kinds)
    for option in ("complete", "keep_output", "bias", "scale_layout", "group_size"):
        assert len({call.options[option] for call in calls if option in call.options}) >= 2
    assert len({space.ranks for space, _ in kinds}) == (1 if world_size == 2 else 3)
    assert any(made.captured for _, made in kinds) == (kind == "cuda")


@pytest.mark.parametrize("kind", DEVICES)
def test_calls_fit_their_workspaces(kind):
    for segment in (Sequence(3, 4, kind).segment(index) for index in range(40)):
        for made in segment.kinds:
            call, space = made.call, segment.spaces[made.space]
            assert call.num_tokens <= space.max_num_tokens
            if call.op in PROJECTING:
                size = 2 if call.op.endswith("_fp8") else call.dtype.itemsize
                assert sum(call.latent) * size <= space.row_bytes
            if call.op in REDUCING or call.op == "all_gather_rows":
                assert call.hidden_size * call.dtype.itemsize <= space.row_bytes
            assert call.hidden_size >= 1 and (kind == "cpu" or call.hidden_size % 8 == 0)
            assert made.in_place is None or (call.op in REDUCING and made.in_place % 16 == 0)
            assert not made.captured or kind == "cuda"


@pytest.mark.parametrize("kind", DEVICES)
def test_every_op_is_repeated_at_every_size_of_workspace(kind):
    sizes = range(len(PROFILES[kind]))
    segments = [(index % len(sizes), Sequence(0, 3, kind).segment(index)) for index in range(20 * len(sizes))]
    repeated = {
        (segment.kinds[step.kind].call.op, size) for size, segment in segments for step in segment.steps if step.repeat
    }
    assert repeated == set(itertools.product(ALL_OPS, sizes))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_as_many_calls_repeat_one_as_are_asked_for(share):
    segment = Sequence(0, 3, "cpu", repeat_share=share).segment(2)
    assert len(segment.steps) == SEGMENT_CALLS["cpu"]
    assert sum(step.repeat is not None for step in segment.steps) == pytest.approx(share * len(segment.steps), abs=8)
