"""Prefills a DeepSeek-V3 on several ranks in three ways, times their parts, and checks them against one process.

    python examples/deepseek_v3_prefill.py                        4 ranks, started here
    torchrun --nproc-per-node 2 examples/deepseek_v3_prefill.py   torchrun's ranks

On GPUs where there are any (`--device`). Where they are fewer than ranks, ranks share them: torch.distributed is then
gloo's, through the host, and without MPS (`tools/with_mps.sh`) the timings mean nothing.

The model is a DeepseekV3ForCausalLM of transformers with random weights, tensor-parallel; the prompt is a text's bytes.
The ways share the sharded weights and run in turn, so that what else the machine does hits all of them. Exits with 1
when the logits of any way, on any rank, are not the unsharded model's.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing.forkserver
import os
import platform
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__" and "RANK" not in os.environ:
    # The server that `launch` takes ranks from. It imports what they need while this process does, which takes seconds.
    multiprocessing.set_forkserver_preload(["tp_fused.integrations.transformers", "tp_fused.frozen"])
    multiprocessing.forkserver.ensure_running()

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from presets import PRESETS, make_config, make_model, quantise, read_prompt
from tqdm import tqdm

import tp_fused
from tp_fused.integrations.transformers import parallelize
from tp_fused.integrations.transformers.fp8_kernels import supply_kernels
from tp_fused.launch import choose_device, launch, take_device

TODAY = "all_reduce"
WAYS = {
    TODAY: "today, torch.distributed",
    "transport": "today, tp_fused transport",
    "fused": "tp_fused",
}
PARTS = ("communication", "rms_norm", "qkv_a_proj")
WIDTHS = (8, 9, 8, 8, 8, 6, 8)  # of the table's columns: 80 with the first

# ---- measuring ----


class PartTimer:
    """Seconds spent in each part of a forward; what `TensorParallel.timer` wants."""

    def __init__(self, device: torch.device):
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.parts = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str):
        start = self.now()
        yield
        self.parts[part] += self.now() - start

    def now(self) -> float:
        self.synchronize()
        return time.perf_counter()


def prefill(model, tp, way: str, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of one prefill on this rank: its parts and the total.

    As in an engine, the cache is filled and only the last position's logits are computed.
    """
    dist.barrier(group=tp.group)
    tp.way, tp.timer = way, PartTimer(ids.device)
    start = tp.timer.now()
    model(ids, use_cache=True, logits_to_keep=1)
    total = tp.timer.now() - start
    parts, tp.timer = tp.timer.parts, None
    return {**parts, "total": total}


def summarize(runs: dict[str, list[list[dict[str, float]]]]) -> dict[str, dict[str, float]]:
    """Of runs[way][rank][round], each way's round of median total, and its speedup over today's way.

    A round takes as long as its slowest rank. Its parts are means over the ranks, because one rank's waiting is
    another's work; "rest" is what they leave of the total. The speedup is that of the totals.
    """
    totals = {way: [max(run["total"] for run in ranks) for ranks in zip(*runs[way], strict=True)] for way in runs}
    summary = {}
    for way, rounds in totals.items():
        chosen = rounds.index(statistics.median_low(rounds))
        parts = {part: statistics.fmean(rank[chosen][part] for rank in runs[way]) for part in PARTS}
        summary[way] = {
            **parts,
            "rest": rounds[chosen] - sum(parts.values()),
            "total": rounds[chosen],
            "speedup": statistics.median_low(totals[TODAY]) / rounds[chosen],
        }
    return summary


# ---- checking ----


def compare(logits: torch.Tensor, expected: torch.Tensor) -> dict:
    """How the logits [num_tokens, vocab_size] of one way on one rank differ from the unsharded model's."""
    difference = (logits.float() - expected.float()).abs().amax(-1)
    difference = difference.where(difference.isfinite(), torch.inf)
    return {
        "max_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "worst_position": difference.argmax().item(),
        "flipped": (logits.argmax(-1) != expected.argmax(-1)).nonzero().flatten().tolist(),
    }


def judge(found: dict[str, list[dict]], num_tokens: int, largest_logit: float, dtype: torch.dtype) -> list[str]:
    """What is wrong with found[way][rank] of `compare`, in words; nothing when the check passes.

    In float32 the argmax must be the unsharded model's at every position, and the largest difference at most twice
    that of today's way; that one's own at most 0.1 % of the largest logit.

    In lower precision two experts, or two logits, that are nearly tied may swap, in any way of computing them, and the
    largest difference tells nothing. There the mean over positions takes its place, today's at most 10 % of the largest
    logit, and the argmax may differ at twice as many positions as in today's way, or at 1 % and one more. In fp8 a
    difference of bf16's size moves some elements by a step of e4m3, which is 6 to 12 %: today's mean is at most 20 %
    there, its argmax may differ at a third of the positions, and the others' at a fifth or twice as many.

    No bound is below some roundings of the largest logit, in fp8 below 10 % of it: today's way may round exactly as the
    unsharded model does (on one rank it does).
    """
    exact, fp8 = dtype == torch.float32, dtype == torch.float8_e4m3fn
    measure, share, roundings = ("max_difference", 1e-3, 32) if exact else ("mean_difference", 0.2 if fp8 else 0.1, 4)
    floor = (0.1 if fp8 else roundings * torch.finfo(dtype).eps) * largest_logit
    twice_today = 2 * max(result[measure] for result in found[TODAY])
    few = num_tokens // (5 if fp8 else 100) + 1
    most_flips = 0 if exact else max(2 * max(len(result["flipped"]) for result in found[TODAY]), few)
    most_flips_today = most_flips if exact else num_tokens // (3 if fp8 else 10)
    wrong = []
    for way, ranks in found.items():
        bound = share * largest_logit if way == TODAY else max(twice_today, floor)
        for rank, result in enumerate(ranks):
            if not result[measure] <= bound:
                wrong.append(
                    f"{way}, rank {rank}: {measure} of the logits is {result[measure]:.3g}, more than {bound:.3g}; "
                    f"worst at position {result['worst_position']}"
                )
            if len(result["flipped"]) > (most_flips_today if way == TODAY else most_flips):
                wrong.append(
                    f"{way}, rank {rank}: another argmax at {len(result['flipped'])} of {num_tokens} positions, the "
                    f"first {result['flipped'][0]}"
                )
    return wrong


# ---- the job ----


def run(args: argparse.Namespace) -> None:
    """What every rank does."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    fp8 = args.dtype == "fp8"
    place, dtype = take_device(args.device), torch.bfloat16 if fp8 else getattr(torch, args.dtype)
    device = place.device
    transformers.logging.set_verbosity_error()
    ids, taken = read_prompt(args.text_file, args.num_tokens)
    ids = ids.to(device)
    say = print if rank == 0 else lambda *_: None
    say(f"DeepSeek-V3 prefill: {args.preset}, {args.dtype}, {world_size} ranks, {args.num_tokens} tokens")
    say(taken)
    if place.sentence():
        say(place.sentence())
    steps = 3 + len(WAYS) + args.repeats
    with torch.inference_mode(), tqdm(total=steps, disable=None if rank == 0 else True, leave=False) as bar:

        def step(what: str) -> None:
            """Begins one: a bar on a terminal, a line elsewhere."""
            bar.set_description(what)
            bar.update()
            if rank == 0 and bar.disable:
                print(f"{what} ...", file=sys.stderr, flush=True)

        step("building the model")
        model = make_model(make_config(args.preset, args.num_tokens), args.seed, dtype, device)
        if fp8:
            quantise(model)
            supply_kernels()  # for the unsharded model, which is transformers' own
        step("unsharded model")
        expected = unsharded_logits(model, ids)
        step("sharding")
        tp = parallelize(model, place.group, max_num_tokens=args.num_tokens, check_tokens="first")
        found, runs = {}, {way: [] for way in WAYS}
        for way in WAYS:  # also the warm-up
            step(f"checking {way}")
            tp.way = way
            found[way] = compare(model(ids).logits[0], expected)
        for repeat in range(args.repeats):
            step(f"timing, round {repeat + 1} of {args.repeats}")
            for offset in range(len(WAYS)):
                way = list(WAYS)[(repeat + offset) % len(WAYS)]
                runs[way].append(prefill(model, tp, way, ids))
    everyone = [None] * world_size
    dist.all_gather_object(everyone, (found, runs))
    found, runs = ({way: [kind[way] for kind in kinds] for way in WAYS} for kinds in zip(*everyone, strict=True))
    times = summarize(runs)
    wrong = judge(found, args.num_tokens, expected.abs().max().item(), torch.float8_e4m3fn if fp8 else dtype)
    if rank == 0:
        backend = get_backend(tp)
        print_times(times, args, backend)
        print_check(found, wrong, expected)
        if args.json:
            args.json.write_text(json.dumps(as_json(args, backend, times, found, wrong), indent=2) + "\n")
    sys.stdout.flush()
    dist.barrier()  # whoever exits with an error ends the others, and rank 0 shall have said why
    if wrong:
        raise SystemExit(1)


def get_backend(tp) -> str:
    workspace = tp_fused.groups.get_workspace(tp.group.group_name, tp.device)
    return f"{workspace.backend} ({workspace.reason}); torch.distributed: {dist.get_backend(tp.group)}"


def unsharded_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """All logits [num_tokens, vocab_size] of the whole model, computed by rank 0 with every core."""
    logits = torch.empty(ids.shape[1], model.config.vocab_size, dtype=model.dtype)
    if dist.get_rank() == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        logits.copy_(model(ids, use_cache=False).logits[0])
        torch.set_num_threads(threads)
    dist.broadcast(logits, src=0)
    return logits.to(ids.device)


def print_times(times: dict, args: argparse.Namespace, backend: str) -> None:
    print(f"\ntp_fused: {backend}\nMedians of {args.repeats} rounds, in ms:\n")
    heads = ("comm.", "RMSNorm", "qkv_a", "rest", "total", "tok/s", "speedup")
    print(f"{'':25}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    for way, title in WAYS.items():
        run = times[way]
        cells = [f"{run[part] * 1e3:.1f}" for part in (*PARTS, "rest", "total")]
        if way == "fused":
            cells = [cells[0] + "*", "*", cells[2] + "*", *cells[3:]]
        cells += [f"{args.num_tokens / run['total']:.0f}", f"{run['speedup']:.2f} x"]
        print(f"{title:25}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))
    print(
        "\n* One op does several of these: comm. holds rs_rmsnorm_ag, with its residual\n"
        "  addition and RMSNorm; qkv_a holds mla_prologue, which is all that comes\n"
        "  before the attention.\n"
        "Total: of the slowest rank. Parts: means over ranks; comm. has waiting in it.\n"
        "Speedup: of the totals. As in an engine, only the last token's logits are made."
    )


def print_check(found: dict, wrong: list[str], expected: torch.Tensor) -> None:
    num_tokens, largest = expected.shape[0], expected.abs().max().item()
    print(f"\nAll logits beside the unsharded model's, of which the largest is {largest:.3g}:")
    print("by how much they differ, and how many tokens have the same argmax; worst rank\n")
    for way, title in WAYS.items():
        most, mean = (max(result[kind] for result in found[way]) for kind in ("max_difference", "mean_difference"))
        same = num_tokens - max(len(result["flipped"]) for result in found[way])
        print(f"{title:25} {most:.1e} at most, {mean:.1e} on average, {same} of {num_tokens}")
    for line in wrong:
        print(f"WRONG  {line}", file=sys.stderr)
    print("\n" + ("MISMATCH: the logits are not the unsharded model's." if wrong else "OK"))


def as_json(args, backend: str, times: dict, found: dict, wrong: list[str]) -> dict:
    return {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tp_fused": tp_fused.__version__,
        },
        "backend": backend,
        "ways": {
            way: {
                "ms": {part: times[way][part] * 1e3 for part in (*PARTS, "rest", "total")},
                "tokens_per_s": args.num_tokens / times[way]["total"],
                "speedup": times[way]["speedup"],
                "max_difference": max(result["max_difference"] for result in found[way]),
                "mean_difference": max(result["mean_difference"] for result in found[way]),
                "flipped_positions": sorted({position for result in found[way] for position in result["flipped"]}),
            }
            for way in WAYS
        },
        "wrong": wrong,
        "ok": not wrong,
    }


# ---- the command line ----


def parse_arguments(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=formatter)
    readme = Path(__file__).resolve().parent.parent / "README.md"
    parser.add_argument("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", 4)), help="ranks (4)")
    parser.add_argument("--preset", choices=PRESETS, help="model (small, or small-fp8 with --dtype fp8)")
    parser.add_argument("--text-file", type=Path, default=readme, help="its bytes are the prompt (the README)")
    parser.add_argument("--num-tokens", type=int, default=1024, help="cut or repeat the text to this length (1024)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "fp8"), default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if any")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    args = parser.parse_args(argv)
    args.preset = args.preset or ("small-fp8" if args.dtype == "fp8" else "small")
    heads = PRESETS[args.preset]["num_attention_heads"]
    if not 1 <= args.world_size <= heads:
        parser.error(f"--world-size must be 1 to {heads} (the heads of {args.preset}), got {args.world_size}")
    for name in ("num_tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not -(2**63) <= args.seed < 2**64:
        parser.error(f"--seed must fit into 64 bits, got {args.seed}")
    if not args.text_file.is_file() or not args.text_file.stat().st_size:
        parser.error(f"--text-file {args.text_file} is missing or empty")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    return args


def main() -> None:
    args = parse_arguments()
    gc.freeze()  # when Python ends it would look through all that was imported, for a second
    try:
        launch(run, args.world_size, args)
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(1 if error.exit_code == 1 else f"a rank ended: {error}")


if __name__ == "__main__":
    main()
