"""Long random runs: valid calls of all ops over all that they take, every result compared bit for bit.

    python3 -m tools.soak --world-size 4 --calls 100000
    tools/with_mps.sh python3 -m tools.soak --device cuda --world-size 2 3 4 6 8 --seconds 90

What is called follows from the seed (tests/soak_calls.py), what is compared with what is told in tests/soak_ranks.py.
World sizes come one after the other, each with a list of calls of its own. At the first wrong result, fault or hang it
says which call, which ranks and rows, and the command that repeats the calls that led there, and exits with 1.
"""

import argparse
import dataclasses
import json
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from programs import ALL_OPS
from ranks import Pool
from soak_calls import Sequence
from soak_ranks import LIMIT_S, Injection, Report, Wrong, run_segment

from tp_fused.launch import choose_device
from tp_fused.native import _C

WORLD_SIZES = {"cpu": [4], "cuda": [2, 3, 4, 6, 8]}
CALLS = {"cpu": 100_000, "cuda": 10_000_000}
PROGRESS_S = 30.0


@dataclasses.dataclass
class Outcome:
    """Of one world size. calls: by op; one op on all ranks of its group is one call."""

    world_size: int
    calls: Counter = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0
    wrong: list[Wrong] = dataclasses.field(default_factory=list)  # described; the first is the earliest
    num_wrong: int = 0
    repeat: str | None = None  # the command


def soak(pool: Pool, sequence: Sequence, start: int, calls: int, seconds: float, injection=None) -> Outcome:
    """Makes calls start..start + calls - 1 of a sequence, or until the time is over or something is wrong."""
    outcome, begin, number = Outcome(sequence.world_size), time.monotonic(), start
    told = begin
    while number < start + calls and outcome.seconds < seconds and not outcome.wrong:
        first, length = number, sequence.segment_calls
        number = min(start + calls, (first // length + 1) * length)
        try:
            reports = pool.run(run_segment, sequence, first, number, injection, timeout_s=LIMIT_S)
        except Exception as error:  # a rank died or hung
            pool.close()
            rank = getattr(error, "rank", "?")
            outcome.wrong = [Wrong(number - 1, rank, f"it, or a call before it: {type(error).__name__}: {error}")]
            outcome.num_wrong = 1
        else:
            add(outcome, sequence, first, reports)
        outcome.seconds = time.monotonic() - begin
        if outcome.wrong:
            outcome.repeat = repeat(sequence, first, outcome.wrong[0].number - first + 1, injection)
        elif time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            _progress(outcome)
    _progress(outcome)
    return outcome


def _progress(outcome: Outcome) -> None:
    rate = outcome.calls.total() / max(outcome.seconds, 1e-9)
    print(f"W={outcome.world_size}: {outcome.calls.total()} calls, {outcome.seconds:.0f} s, {rate:.0f}/s", flush=True)


def add(outcome: Outcome, sequence: Sequence, first: int, reports: list[Report]) -> None:
    """What the ranks report of a segment."""
    segment = sequence.segment(first // sequence.segment_calls)
    wrong = [wrong for report in reports for wrong in report.wrong]
    for kind, version in sorted({key for report in reports for key in report.digests}):
        digests = {rank: report.digests.get((kind, version)) for rank, report in enumerate(reports)}
        members = segment.spaces[segment.kinds[kind].space].ranks
        different = [rank for rank in members if digests[rank] != digests[members[0]]]
        if different and not wrong:
            steps = segment.steps[first - segment.first :]
            number = first + next(i for i, step in enumerate(steps) if (step.kind, step.version) == (kind, version))
            wrong.append(Wrong(number, different[0], f"its result has other bits than rank {members[0]}'s"))
    for report in reports:
        outcome.calls += report.calls
    outcome.wrong = sorted(wrong, key=lambda one: (one.number, one.rank))
    outcome.num_wrong = max(len(wrong), sum(report.num_wrong for report in reports))


def repeat(sequence: Sequence, start: int, calls: int, injection=None) -> str:
    """The command that makes these calls again."""
    words = ["tools/with_mps.sh"] if sequence.device == "cuda" else []
    words += [f"{sys.executable} -m tools.soak", f"--device {sequence.device} --world-size {sequence.world_size}"]
    words += [f"--seed {sequence.seed} --start {start} --calls {calls}"]
    words += [f"--only {' '.join(sequence.only)}"] if sequence.only else []
    words += [f"--repeat-share {sequence.repeat_share}"] if sequence.repeat_share != Sequence.repeat_share else []
    words += [] if sequence.subgroups else ["--no-subgroups"]
    words += [f"--inject {injection}"] if injection else []
    return " ".join(words)


def describe(sequence: Sequence, outcome: Outcome) -> str:
    """What went wrong, and how to see it again."""
    segment = sequence.segment(outcome.wrong[0].number // sequence.segment_calls)
    lines = [f"W={sequence.world_size}, seed {sequence.seed}: {outcome.num_wrong} wrong results, the first ones:"]
    for number in sorted({wrong.number for wrong in outcome.wrong})[:5]:
        lines.append(f"call {number}: {segment.describe(number)}")
        for one in (one for one in outcome.wrong if one.number == number):
            first_line, _, traceback = one.message.partition("\n")
            lines.append(f"    rank {one.rank}: {first_line}")
            if traceback:
                lines.append(traceback)
    return "\n".join([*lines, "These calls again:", f"    {outcome.repeat}"])


def summary(outcomes: list[Outcome]) -> str:
    """One line."""
    told = []
    for outcome in outcomes:
        ops = ", ".join(f"{op} {outcome.calls[op]}" for op in ALL_OPS if outcome.calls[op])
        told.append(f"W={outcome.world_size}: {outcome.calls.total()} ({ops})")
    calls, seconds = sum(o.calls.total() for o in outcomes), sum(o.seconds for o in outcomes)
    return f"{calls} calls, {sum(o.num_wrong for o in outcomes)} wrong, in {seconds:.0f} s; {'; '.join(told)}"


def write(path: str, sequences: list[Sequence], outcomes: list[Outcome]) -> None:
    """A small summary: what has been run, on what, with which result."""
    device = sequences[0].device
    made = [
        {
            **dataclasses.asdict(sequence),
            "calls": outcome.calls.total(),
            "ops": {op: outcome.calls[op] for op in ALL_OPS if outcome.calls[op]},
            "wrong": outcome.num_wrong,
            "seconds": round(outcome.seconds, 1),
            "repeat": outcome.repeat,
        }
        for sequence, outcome in zip(sequences, outcomes, strict=False)
    ]
    about = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "calls": sum(one["calls"] for one in made),
        "wrong": sum(one["wrong"] for one in made),
        "world_sizes": made,
    }
    Path(path).write_text(json.dumps(about, indent=1) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--world-size", type=int, nargs="+", help="default: 4, on cuda 2 3 4 6 8")
    add("--calls", type=int, help="for each world size; default: 100000, on cuda as many as there is time for")
    add("--seconds", type=float, help="for each world size, to the segment; default: none, on cuda 90")
    add("--seed", type=int, help="default: another one every time")
    add("--start", type=int, default=0, help="the number of the first call")
    add("--only", nargs="+", choices=ALL_OPS, default=(), metavar="OP", help="call nothing else")
    add("--repeat-share", type=float, default=Sequence.repeat_share, help="of the calls; the others are mixed")
    add("--subgroups", action=argparse.BooleanOptionalAction, default=True, help="workspaces of some of the ranks, too")
    add("--json", metavar="PATH", help="leave a summary there")
    add(
        "--inject",
        type=Injection.parse,
        metavar="WHAT:CALL:RANK",
        help="make an error, to see it found: a bit, rows, raise or exit",
    )
    options = parser.parse_args(arguments)
    for size in options.world_size or ():
        if not 1 <= size <= _C.MAX_RANKS:
            parser.error(f"--world-size must be 1 to {_C.MAX_RANKS}, got {size}")
    for name, least in (("calls", 1), ("start", 0)):
        given = getattr(options, name)
        if given is not None and given < least:
            parser.error(f"--{name} must be at least {least}, got {given}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be over 0, got {options.seconds}")
    if not 0 <= options.repeat_share <= 1:
        parser.error(f"--repeat-share must be 0 to 1, got {options.repeat_share}")
    try:
        choose_device(options.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if options.device == "cuda" and not _C.cuda_compiled():
        parser.error("--device: cuda was asked for, but this build has no CUDA kernels")
    options.world_size = options.world_size or WORLD_SIZES[options.device]
    if options.seconds is None:
        options.seconds = 90.0 if options.device == "cuda" and options.calls is None else float("inf")
    options.calls = CALLS[options.device] if options.calls is None else options.calls
    options.seed = random.randrange(2**31) if options.seed is None else options.seed
    return options


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    options = parse(arguments)
    print(f"seed {options.seed}", flush=True)
    sequences, outcomes = [], []
    for world_size in options.world_size:
        sequence = Sequence(
            options.seed, world_size, options.device, tuple(options.only), options.repeat_share, options.subgroups
        )
        with Pool(world_size, options.device) as pool:
            outcome = soak(pool, sequence, options.start, options.calls, options.seconds, options.inject)
        sequences.append(sequence)
        outcomes.append(outcome)
        if outcome.wrong:
            print(describe(sequence, outcome), flush=True)
            break
    if options.json:
        write(options.json, sequences, outcomes)
    print(summary(outcomes), flush=True)
    return 1 if outcomes[-1].wrong else 0


if __name__ == "__main__":
    sys.exit(main())
