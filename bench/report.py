"""What a run shows: the header, one line a size as nccl-tests prints them, the progress bar and the JSON file."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import tp_fused

FORMAT = 1  # of the JSON file: raised when a key changes its meaning


def machine(context, copy_bytes_per_s: float) -> dict:
    """What a number has to name to be worth anything."""
    cuda = context.device.type == "cuda"
    return {
        "device": context.device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": min(torch.cuda.device_count(), context.world_size) if cuda else 0,
        "ranks_per_gpu": context.ranks_per_card,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tp_fused": tp_fused.__version__,
        "commit": _commit(),
        "backend": context.workspace.backend,
        "reason": context.workspace.reason,
        "copy_gb_s": copy_bytes_per_s * 1e-9,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The checkout's commit, "-dirty" where files differ from it; None outside of a checkout."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def result_row(case, samples: dict, wrong: int | None) -> dict:
    """One line of the table, as the JSON file holds it."""
    fused = samples["fused"].median
    algbw = case.bytes / fused * 1e-9
    return {
        "op": case.op,
        "tokens": case.num_tokens,
        "bytes": case.bytes,
        "memory_bytes": case.memory_bytes,
        "iterations": len(samples["fused"].seconds),
        "programs": {
            name: {"median_us": sample.median * 1e6, "p99_us": sample.p99 * 1e6} for name, sample in samples.items()
        },
        "algbw_gb_s": algbw,
        "busbw_gb_s": algbw * bus_factor(case.bus_passes, case.context.world_size),
        "speedup": {name: sample.median / fused for name, sample in samples.items() if name != "fused"},
        "wrong": wrong,
    }


def bus_factor(passes: int, world_size: int) -> float:
    """nccl-tests' factor: the share of the bytes that crosses a rank's link, once or, as in an all-reduce, twice."""
    return passes * (world_size - 1) / world_size


class Report:
    """Rank 0's: prints lines to stdout, the progress to stderr when that is a terminal, and keeps the JSON file.

    The file is written anew after every size, so that a run that ends early leaves what it has measured. The progress
    bar is drawn between samples only: a thread that drew it would take its time from the ranks.
    """

    def __init__(self, options, context, copy_bytes_per_s: float):
        self.options = options
        self.document = {
            "format": FORMAT,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "argv": list(options.argv),
            "machine": machine(context, copy_bytes_per_s),
            "options": {key: value for key, value in vars(options).items() if key not in ("argv", "json")},
            "results": [],
        }
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        terminal = Console(stderr=True)
        self._progress = Progress(
            *columns,
            console=terminal,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            disable=not terminal.is_terminal,
        )
        self._task = self._progress.add_task("", total=len(options.ops) * len(options.tokens))

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exception):
        self._progress.stop()

    def header(self, explanation: str) -> None:
        machine, options = self.document["machine"], self.options
        device = f"{machine['cpu']}, {machine['cores']} cores"
        if machine["gpu"]:
            device = f"{machine['gpus']} x {machine['gpu']}; {device}"
        shape = f"hidden {options.hidden}, latent {options.latent}, {options.dtype}"
        print(f"# tp_fused {machine['tp_fused']}, {options.world_size} ranks, {shape}")
        print(f"# machine: {device}; torch {machine['torch']}; commit {machine['commit'] or 'unknown'}")
        for line in explanation.splitlines():
            print(f"# {line}")
        if machine["ranks_per_gpu"] > 1:
            print(
                f"# {machine['ranks_per_gpu']} ranks share a card: without MPS they take turns and times mean nothing;"
            )
            print("# NCCL wants a card a rank, so the programs over torch.distributed are left out")
        print(f"# memory: {machine['copy_gb_s']:.2f} GB/s read and written by large copies")
        print("# times in us: median of the slowest rank's; GB/s of 1e9 bytes; dist: unfused over torch.distributed;")
        print("# own: unfused over tp_fused's transport; x: how many times as long as fused")

    def table(self, op: str, baselines: tuple[str, ...]) -> None:
        self._baselines = baselines
        columns = "".join(f" |{name:>10} {'x':>6}" for name in baselines)
        print(f"\n# {op}")
        print(f"#{'tokens':>7} {'bytes':>12} {'time':>10} {'p99':>10} {'algbw':>7} {'busbw':>7} {'#wrong':>7}{columns}")

    def row(self, row: dict) -> None:
        fused = row["programs"]["fused"]
        line = f" {row['tokens']:>7} {row['bytes']:>12} {fused['median_us']:>10.1f} {fused['p99_us']:>10.1f}"
        line += f" {row['algbw_gb_s']:>7.2f} {row['busbw_gb_s']:>7.2f}"
        line += f" {'N/A' if row['wrong'] is None else row['wrong']:>7}"
        for name in self._baselines:
            if name in row["programs"]:
                line += f" |{row['programs'][name]['median_us']:>10.1f} {row['speedup'][name]:>6.2f}"
            else:
                line += f" |{'-':>10} {'-':>6}"
        print(line, flush=True)
        self.document["results"].append(row)
        self._write()

    def stage(self, description: str, advance: int = 0) -> None:
        self._progress.update(self._task, description=description, advance=advance)
        self._progress.refresh()

    def _write(self) -> None:
        if self.options.json is None:
            return
        path = Path(self.options.json)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(self.document, indent=1) + "\n")
        temporary.replace(path)
