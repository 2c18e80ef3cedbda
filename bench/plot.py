"""One picture for every op and run: its time over tokens, beside the unfused programs' and the floor."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from .catalog import OPS
from .results import device_name, load, short_commit

# Those that say most come first: of the others there is no room for.
LABELS = {
    "dist": "unfused, torch.distributed",
    "flashinfer": "FlashInfer's fused all-reduce, all rows on every rank",
    "twoshot": "unfused, torch's two-shot all-reduce",
    "own": "unfused, tp_fused's transport",
    "scaled_mm": "unfused, cuBLAS and tp_fused's gather",
    "copies": "unfused, cuBLAS and copies by the peers",
    "symm": "torch's symm_mem reduce-scatter alone",
    "gemm": "the product alone",
    "alone": "rs_rmsnorm alone",
    "chain": "rs_rmsnorm, qkv_a_proj_ag_norm",
    "ag+norm": "qkv_a_proj_ag, then norms and split",
    "ag_fp8+norm": "qkv_a_proj_ag_fp8, then norms, quantisation and split",
    "rs_rmsnorm": "rs_rmsnorm, without quantisation",
    "rs_rmsnorm_ag": "rs_rmsnorm_ag, without quantisation",
    "mla_prologue": "mla_prologue, in 16 bits",
    "oneshot": "unfused, torch's one-shot all-reduce",
    "allreduce": "all-reduce, all rows on every rank",
    "nccl-symm": "unfused, NCCL over symmetric windows",
    "staged": "tp_fused, input staged",
    "zero-copy": "tp_fused, input read in place",
    "own-rs": "scattered, unfused, tp_fused's transport",
    "dist-rs": "scattered, unfused, torch.distributed",
}
UNFUSED = {
    "dist": "torch.distributed",
    "own": "tp_fused's transport",
    "scaled_mm": "cuBLAS, then a gather",
    "twoshot": "torch's two-shot all-reduce",
    "rs_rmsnorm": "rs_rmsnorm",
    "rs_rmsnorm_ag": "rs_rmsnorm_ag",
    "mla_prologue": "mla_prologue",
    "ag+norm": "norms and split after it",
    "ag_fp8+norm": "norms, quantisation and split after it",
}
MOST_LINES = 6  # of a legend: tp_fused, the floor, and four more
COLORS = ("C1", "C2", "C4", "C5")


def draw(paths: list[Path], folder: Path) -> list[Path]:
    """The pictures, in `folder`. A file of one op gives its name to the picture, one of several adds the op's.

    Of an op at one token count there is nothing to draw.
    """
    pictures = {}
    for path in paths:
        run = load(path)
        for op in dict.fromkeys(row["op"] for row in run["results"]) if run is not None else ():
            # A logarithmic axis has no room for a bare barrier.
            rows = sorted((r for r in run["results"] if r["op"] == op and r["tokens"] > 0), key=lambda r: r["tokens"])
            alone = len({row["op"] for row in run["results"]}) == 1
            picture = folder / f"{path.stem}{'' if alone else f'_{op}'}.png"
            if picture in pictures:
                raise ValueError(f"{path} and {pictures[picture]} would both be drawn to {picture}")
            if len(rows) > 1:
                _draw(run, op, rows, picture)
                pictures[picture] = path
    if not pictures:
        raise ValueError("these files have no op at several token counts")
    return list(pictures)


def _draw(run: dict, op: str, rows: list[dict], picture: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    others = _others(rows)
    for (name, label), color in zip(others.items(), COLORS, strict=False):
        axes.plot(*_points(rows, name), "s--", label=label, color=color, markersize=4, linewidth=1.2)
    tokens, medians = _points(rows, "fused")
    compared = next((name for name in others if name in UNFUSED), None)
    label = f"tp_fused; x: speedup over {UNFUSED[compared]}" if compared else "tp_fused"
    axes.plot(tokens, medians, "o-", label=label, color="C0", markersize=5, linewidth=2)
    p99 = [row["programs"]["fused"]["p99_us"] for row in rows]
    axes.fill_between(tokens, medians, p99, alpha=0.15, color="C0", linewidth=0)
    floor, meaning = _floor(run, rows)
    axes.plot(tokens, floor, ":", label=meaning, color="black")
    if compared:
        _write_speedups(axes, rows, compared)
    axes.set(xlabel="tokens", ylabel="us a call: median of the slowest rank, shaded to its p99")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(tokens)
    axes.minorticks_off()
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(loc="upper left", fontsize=9)
    options, machine = run["options"], run["machine"]
    placed = ", input read in place" if options["zero_copy"] and "zero_copy" in OPS[op].options else ""
    figure.suptitle(f"{op}: {options['world_size']} ranks on {device_name(machine)}", fontsize=12)
    axes.set_title(
        f"hidden {options['hidden']}, {options['dtype']}{placed}; torch {machine['torch']}; commit "
        f"{short_commit(machine)}",
        fontsize=9,
    )
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _points(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    having = [row for row in rows if name in row["programs"]]
    return [row["tokens"] for row in having], [row["programs"][name]["median_us"] for row in having]


def _others(rows: list[dict]) -> dict[str, str]:
    """The programs that are drawn beside the op, with their labels: those of LABELS, in its order, then sweeps'."""
    timed = {name for row in rows for name in row["programs"]} - {"fused", "barrier"}
    known = [name for name in LABELS if name in timed]
    swept = sorted((name for name in timed if name.startswith("ctas")), key=lambda name: int(name[4:]))
    room = MOST_LINES - 2
    swept = swept[:: max(1, -(-len(swept) // room))]
    labels = LABELS | {name: f"tp_fused, at most {name[4:]} blocks" for name in swept}
    return {name: labels[name] for name in (*known, *swept)[:room]}


def _floor(run: dict, rows: list[dict]) -> tuple[list[float], str]:
    """What no program can be under: its bytes by memory and by link, and a barrier where one was timed."""
    machine = run["machine"]
    floor = [row["memory_bytes"] / machine["copy_gb_s"] * 1e-3 for row in rows]
    words = f"its bytes at {machine['copy_gb_s']:.0f} GB/s"
    if machine.get("link_gb_s") and all(row.get("busbw_gb_s") for row in rows):
        links = [row["programs"]["fused"]["median_us"] * row["busbw_gb_s"] / machine["link_gb_s"] for row in rows]
        floor = [max(pair) for pair in zip(floor, links, strict=True)]
        words += f", between cards {machine['link_gb_s']:.0f}"
    if all("barrier" in row["programs"] for row in rows):
        floor = [max(time, row["programs"]["barrier"]["median_us"]) for time, row in zip(floor, rows, strict=True)]
        words = f"a barrier, or {words}"
    return floor, f"floor: {words}"


def _write_speedups(axes: Axes, rows: list[dict], compared: str) -> None:
    """Under the op's points: how many times as long the other program takes."""
    place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": "C0"}
    place["bbox"] = {"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
    for row in rows:
        if compared in row["programs"]:
            fused, other = (row["programs"][name]["median_us"] for name in ("fused", compared))
            axes.annotate(f"{other / fused:.2f} x", (row["tokens"], fused), **place)
