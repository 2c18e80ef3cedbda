"""What a run shows: the header, one line a size as nccl-tests prints them, the progress bar and the JSON file."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import tp_fused

from .baselines import BASELINES
from .results import variant_meaning
from .timing import HostTime

FORMAT = 1  # of the JSON file: raised when a key changes its meaning
_SETTINGS = (
    "NCCL_",
    "TORCH_SYMM_MEM_",
    "NVSHMEM_",
    "FLASHINFER_",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)  # that what is timed depends on


def machine(context, copy_bytes_per_s: float, link_bytes_per_s: float | None) -> dict:
    """What a number has to name to be worth anything."""
    cuda = context.device.type == "cuda"
    return {
        "device": context.device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": min(torch.cuda.device_count(), context.world_size) if cuda else 0,
        "ranks_per_gpu": context.ranks_per_card,
        "driver": _driver() if cuda else None,
        "flashinfer": _installed("flashinfer-python"),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tp_fused": tp_fused.__version__,
        "commit": _commit(),
        "backend": context.workspace.backend,
        "reason": context.workspace.reason,
        "copy_gb_s": copy_bytes_per_s * 1e-9,
        "link_gb_s": link_bytes_per_s and link_bytes_per_s * 1e-9,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str | None:
    try:
        version = re.search(r"\d+\.\d+[\d.]*", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return version and version.group()


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """TP_FUSED_COMMIT where it is set; the checkout's commit, "-dirty" where files differ from it; else None."""
    if named := os.environ.get("TP_FUSED_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def result_row(case, programs: dict, samples: dict, wrong: int | None, host: HostTime | None, bandwidths) -> dict:
    """One line of the table, as the JSON file holds it.

    host: None but on CUDA. bandwidths: of copies on all cards together, and between two cards or None, in bytes a
    second.
    """
    copy, link = bandwidths
    fused = samples["fused"].median
    algbw = case.bytes / fused * 1e-9
    busbw = algbw * bus_factor(case.bus_passes, case.context.world_size)
    results = {name: {"median_us": sample.median * 1e6, "p99_us": sample.p99 * 1e6} for name, sample in samples.items()}
    for name, program in programs.items():
        if program.case is not None:
            results[name]["copy_share"] = program.case.memory_bytes / samples[name].median / copy
        if program.way is not None:
            results[name]["way"] = program.way
    return {
        "op": case.op,
        "tokens": case.num_tokens,
        "bytes": case.bytes,
        "memory_bytes": case.memory_bytes,
        "iterations": len(samples["fused"].seconds),
        "programs": results,
        "host_us": None if host is None else host.slowest * 1e6,
        "host_us_fastest": None if host is None else host.fastest * 1e6,
        "host_empty_us": None if host is None else host.empty * 1e6,
        "algbw_gb_s": algbw,
        "busbw_gb_s": busbw,
        "link_share": None if link is None else busbw * 1e9 / link,
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

    def __init__(self, options, context, copy_bytes_per_s: float, link_bytes_per_s: float | None):
        self.options = options
        self._sharing = context.place_of_rank.sentence()
        self._cuda, self._linked = context.device.type == "cuda", link_bytes_per_s is not None
        self.document = {
            "format": FORMAT,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "argv": list(options.argv),
            "machine": machine(context, copy_bytes_per_s, link_bytes_per_s),
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

    def header(self) -> None:
        machine, options = self.document["machine"], self.options
        device = f"{machine['cpu']}, {machine['cores']} cores"
        if machine["gpu"]:
            device = f"{machine['gpus']} x {machine['gpu']}; {device}"
        shape = f"hidden {options.hidden}, latent {options.latent}, {options.dtype}"
        print(f"# tp_fused {machine['tp_fused']}, {options.world_size} ranks, {shape}")
        print(f"# machine: {device}; torch {machine['torch']}; commit {machine['commit'] or 'unknown'}")
        if self._sharing:
            print(f"# {self._sharing}; NCCL wants a card a rank: no programs over torch.distributed")
        print(f"# memory: {machine['copy_gb_s']:.2f} GB/s read and written by large copies")
        if self._linked:
            print(f"# link: {machine['link_gb_s']:.2f} GB/s by copies out of another card's memory, all cards at once")
        print("# times in us: median of the slowest rank's; GB/s of 1e9 bytes; x: how many times as long as fused")
        if self._cuda:
            print(
                "# host: us that an eager call keeps the CPU; empty: in turn with it, torch.empty for each output and"
            )
            print(
                "# the launch of an empty kernel; %copy: the bytes of memory that the op needs over its time, of what"
            )
            print("# large copies reach; %link: busbw of what copies between cards reach")

    def table(self, op: str, baselines: tuple[str, ...], left_out: dict[str, str], explanation: str) -> None:
        self._others = (*self.options.variants, *baselines)
        columns = "".join(f" |{name:>10} {'x':>6}" for name in self._others)
        first, *rest = explanation.splitlines()
        print(f"\n# {first if first.startswith(op) else f'{op}: {first}'}")
        for line in rest:
            print(f"# {line}")
        for name in self.options.variants:
            print(f"# {name}: the fused op, {variant_meaning(name)}")
        for name in baselines:
            print(f"# {name}: {BASELINES[name].meaning}")
        for name, reason in left_out.items():
            print(f"# {name}: left out: {reason}")
        measured = f" {'host':>6} {'empty':>6} {'%link' if self._linked else '%copy':>6}" if self._cuda else ""
        print(
            f"#{'tokens':>7} {'bytes':>12} {'time':>10} {'p99':>10} {'algbw':>7} {'busbw':>7} {'#wrong':>7}{measured}"
            f"{columns}"
        )

    def row(self, row: dict) -> None:
        fused = row["programs"]["fused"]
        line = f" {row['tokens']:>7} {row['bytes']:>12} {fused['median_us']:>10.1f} {fused['p99_us']:>10.1f}"
        line += f" {row['algbw_gb_s']:>7.2f} {row['busbw_gb_s']:>7.2f}"
        line += f" {'N/A' if row['wrong'] is None else row['wrong']:>7}"
        if self._cuda:
            share = row["link_share"] if self._linked else fused["copy_share"]
            line += f" {row['host_us']:>6.1f} {row['host_empty_us']:>6.1f} {100 * share:>6.1f}"
        for name in self._others:
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
