"""Draws time and bandwidth over tokens, with the unfused programs and the floor in the same axes."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from .report import short_commit

LABELS = {
    "fused": "tp_fused",
    "dist": "unfused, torch.distributed",
    "own": "unfused, tp_fused's transport",
    "allreduce": "all-reduce, all rows on every rank",
}
STYLES = {"fused": "o-", "dist": "s--", "own": "^--", "allreduce": "v--"}


def load(path: Path) -> dict | None:
    """A run's JSON file; None for what `goals` or `multi` has made of several, ValueError where it is neither."""
    try:
        document = json.loads(path.read_text())
        if "goals" in document or "blocks" in document:
            return None
        if document["machine"]["copy_gb_s"] <= 0 or not {"results", "options"} <= document.keys():
            raise KeyError("results, options or machine")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file that --json wrote ({error!r})") from None
    return document


def draw(paths: list[Path], output: Path) -> None:
    """One row of axes an op: time on the left, memory bandwidth on the right, a colour for every run."""
    runs = [run for run in map(load, paths) if run is not None]
    ops = list(dict.fromkeys(row["op"] for run in runs for row in run["results"]))
    if not ops:
        raise ValueError("no results in these files")
    figure, axes = plt.subplots(len(ops), 2, figsize=(14, 4.8 * len(ops)), squeeze=False, layout="constrained")
    for op, (time_axes, bandwidth_axes) in zip(ops, axes, strict=True):
        for index, run in enumerate(runs):
            rows = sorted((row for row in run["results"] if row["op"] == op), key=lambda row: row["tokens"])
            rows = [row for row in rows if row["tokens"] > 0]  # a logarithmic axis has no room for a bare barrier
            if rows:
                prefix = f"{_name(run)}: " if len(runs) > 1 else ""
                _curves(time_axes, bandwidth_axes, run, rows, prefix, color=f"C{index}" if len(runs) > 1 else None)
        for side, label in ((time_axes, "us a call (median of the slowest rank)"), (bandwidth_axes, "GB/s of memory")):
            side.set(title=op, xlabel="tokens", ylabel=label, yscale="log")
            side.set_xscale("log", base=2)
            for axis in (side.xaxis, side.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.yaxis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
            )
            side.grid(True, which="both", alpha=0.25)
            side.legend(fontsize=8)
    figure.suptitle("\n".join(_title(run) for run in runs), fontsize=10)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _curves(time_axes, bandwidth_axes, run: dict, rows: list[dict], prefix: str, color: str | None) -> None:
    copy = run["machine"]["copy_gb_s"]
    names = list(dict.fromkeys(name for row in rows for name in row["programs"] if name != "barrier"))
    for name in names:
        having = [row for row in rows if name in row["programs"]]
        tokens = [row["tokens"] for row in having]
        medians = [row["programs"][name]["median_us"] for row in having]
        style = {"label": prefix + LABELS.get(name, name), "markersize": 4, "color": color}
        (line,) = time_axes.plot(tokens, medians, STYLES.get(name, "d--"), **style)
        if name == "fused":
            p99 = [row["programs"][name]["p99_us"] for row in having]
            time_axes.fill_between(
                tokens, medians, p99, alpha=0.15, color=line.get_color(), label=prefix + "to its p99"
            )
        # The same bytes for all programs, those that the fused op needs: higher is faster, the floor is a flat line.
        rates = [row["memory_bytes"] / median * 1e-3 for row, median in zip(having, medians, strict=True)]
        bandwidth_axes.plot(tokens, rates, STYLES.get(name, "d--"), **style)
    tokens = [row["tokens"] for row in rows]
    floor = {"linestyle": ":", "color": color or "black", "label": f"{prefix}floor: its bytes at {copy:.4g} GB/s"}
    time_axes.plot(tokens, [row["memory_bytes"] / copy * 1e-3 for row in rows], **floor)
    bandwidth_axes.plot(tokens, [copy] * len(tokens), **floor)


def _name(run: dict) -> str:
    options = run["options"]
    zero_copy = ", zero-copy" if options["zero_copy"] else ""
    return f"{options['world_size']} ranks, {run['machine']['backend']}, {options['dtype']}{zero_copy}"


def _title(run: dict) -> str:
    machine = run["machine"]
    device = (
        f"{machine['gpus']} x {machine['gpu']}" if machine["gpu"] else f"{machine['cpu']}, {machine['cores']} cores"
    )
    what = f"{_name(run)}, hidden {run['options']['hidden']}"
    return f"{device}; {what}; torch {machine['torch']}; commit {short_commit(machine)}"
