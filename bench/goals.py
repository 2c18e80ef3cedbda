"""What one card with eight ranks on it has to reach: `python -m bench goals`, which `make gpu-bench` calls."""

from collections.abc import Callable
from pathlib import Path

from . import decode
from .bounds import HIDDEN, Goal, at_least, at_most, fastest, section, share, speedup, table, times, write
from .catalog import ENGINES, SCATTERED
from .options import Options
from .suite import Launch, compile_flashinfer, run

# ---- no cliffs ----

# As many bytes as 2048 tokens of 7168, in rows that fill shared memory more and more.
WIDTHS = {8192: 1792, 10240: 1434, 12288: 1195, 16384: 896}
STEPS = (128, 256, 512, 1024, 2048)  # a token more than which is no step up
REDUCTIONS = ("rs_rmsnorm", "rs_rmsnorm_ag")


def _bandwidth_beside(program: str) -> Callable[[dict, dict], float]:
    return lambda row, narrow: share(program)(row) / share(program)(narrow)


def _above_the_line(program: str) -> Callable[[dict, dict, dict], float]:
    """The time, in that of the line through the times of fewer and of more tokens."""

    def above(row: dict, fewer: dict, more: dict) -> float:
        time, low, high = (fastest(at, (program,)) for at in (row, fewer, more))
        part = (row["tokens"] - fewer["tokens"]) / (more["tokens"] - fewer["tokens"])
        return time / (low + part * (high - low))

    return above


def _evenness(op: str, program: str) -> list[Goal]:
    where = "in place" if program == "fused" else program
    what, measure = f"{where}, bandwidth, in that of {HIDDEN} columns", _bandwidth_beside(program)
    wide = [
        Goal(f"{hidden} columns {what}", 8, op, tokens, measure, 0.85, True, hidden, ((HIDDEN, STEPS[-1]),))
        for hidden, tokens in WIDTHS.items()
    ]
    what, measure = f"{where}, time, in that of the line between its neighbours", _above_the_line(program)
    steps = [Goal(what, 8, op, at + 1, measure, 1.15, False, beside=((HIDDEN, at), (HIDDEN, 2 * at))) for at in STEPS]
    return wide + steps


# ---- fp8 ----

FP8_GOALS = [
    *(
        at_most(0.85, "time, in that of the bf16 form", ranks, "rs_rmsnorm_ag_fp8", tokens, times("rs_rmsnorm_ag"))
        for ranks in (8, 4)
        for tokens in (4096, 16384)
    ),
    at_most(
        *(0.80, "time, in that of qkv_a_proj_ag_fp8 + norms, quantisation, split", 8, "qkv_a_proj_ag_norm_fp8", 16384),
        times("ag_fp8+norm"),
    ),
    *(
        at_most(bound, "time, in that of the bf16 form", 8, "mla_prologue_fp8", tokens, times("mla_prologue"))
        for tokens, bound in ((64, 0.75), (4096, 0.80), (16384, 0.75))
    ),
    at_most(0.75, "time, in that of fp8, scattered, unfused", 8, "mla_prologue_fp8", 16384, times(*SCATTERED)),
]


GOALS = [
    at_least(0.95, "in place, of the copy bandwidth", 8, "rs_rmsnorm", 16384, share("fused")),
    at_least(0.92, "the same with 8 blocks a rank", 8, "rs_rmsnorm", 16384, share("ctas8")),
    at_least(0.78, "in place, of the copy bandwidth", 8, "rs_rmsnorm", 1024, share("fused")),
    at_least(0.88, "staged, its own bytes, of the copy bandwidth", 8, "rs_rmsnorm", 16384, share("staged")),
    at_most(1.7, "time, in bare barriers", 8, "rs_rmsnorm", 64, times("barrier")),
    at_least(1.15, "speedup over reduce_scatter_rows + add-norm", 8, "rs_rmsnorm", 16384, speedup("own")),
    at_least(1.1, "speedup over reduce_scatter_rows + add-norm", 8, "rs_rmsnorm", 512, speedup("own")),
    at_least(1.25, "speedup over reduce_scatter_rows + add-norm", 8, "rs_rmsnorm", 64, speedup("own")),
    at_most(1.03, "time, in that of the bf16 form", 8, "rs_rmsnorm_fp8", 16384, times("rs_rmsnorm")),
    at_least(1.0, "speedup over symm_mem.reduce_scatter_out alone", 4, "rs_rmsnorm", 16384, speedup("symm")),
    at_least(1.9, "speedup over two_shot_all_reduce_ + add-norm", 4, "rs_rmsnorm_ag", 16384, speedup("twoshot")),
    at_least(1.3, "speedup over two_shot_all_reduce_ + add-norm", 4, "rs_rmsnorm_ag", 512, speedup("twoshot")),
    at_most(0.76, "time, in that of cuBLAS + all-gather", 8, "qkv_a_proj_ag", 16384, times("own", "copies")),
    at_most(1.22, "time, in that of cuBLAS alone", 8, "qkv_a_proj_ag", 16384, times("gemm")),
    at_most(0.82, "time, in that of cuBLAS + all-gather", 8, "qkv_a_proj_ag", 4096, times("own", "copies")),
    at_most(0.90, "time, in that of cuBLAS + all-gather", 8, "qkv_a_proj_ag", 512, times("own", "copies")),
    at_most(0.90, "time, in that of cuBLAS + all-gather", 8, "qkv_a_proj_ag", 64, times("own", "copies")),
    at_most(
        0.75, "time, in that of _scaled_mm + all-gather", 8, "qkv_a_proj_ag_fp8", 16384, times("scaled_mm", "copies")
    ),
    at_most(0.85, "time, in that of qkv_a_proj_ag + norms + split", 8, "qkv_a_proj_ag_norm", 16384, times("ag+norm")),
    at_most(0.20, "time, in that of what engines do", 8, "chain", 16384, times(*ENGINES)),
    at_least(0.70, "speed, of cuBLAS's", 1, "qkv_a_proj_ag", 512, speedup("gemm")),
    *(at_least(0.85, "speed, of cuBLAS's", 1, "qkv_a_proj_ag", rows, speedup("gemm")) for rows in (2048, 4096, 16384)),
    *(
        at_least(1.0, "speed, of _scaled_mm's", 1, "qkv_a_proj_ag_fp8", rows, speedup("gemm"))
        for rows in (512, 2048, 4096, 16384)
    ),
    *(goal for op in REDUCTIONS for program in ("fused", "staged") for goal in _evenness(op, program)),
    *(goal for goal in _evenness("qkv_a_proj_ag", "fused") if goal.hidden == HIDDEN),
    *FP8_GOALS,
    *decode.GOALS,
]


def _even_sections() -> dict[str, Options]:
    sections = {}
    for op in (*REDUCTIONS, "qkv_a_proj_ag"):
        reduces = op in REDUCTIONS
        sizes = {HIDDEN: (*STEPS, 2 * STEPS[-1], *(at + 1 for at in STEPS))}
        sizes |= {hidden: (tokens,) for hidden, tokens in WIDTHS.items() if reduces}
        for hidden, tokens in sizes.items():
            options = {"hidden": hidden, "variants": ("staged",) * reduces, "baselines": (), "compile": False}
            sections[f"{op}_{hidden}_even"] = section(8, op, *sorted(tokens), **options, budget_s=0.3)
    return sections


LAUNCHES = [
    Launch(
        "eight",
        130,
        {
            "rs_rmsnorm": section(
                8,
                "rs_rmsnorm",
                *(64, 512, 1024, 16384),
                variants=("staged", "ctas8"),
                baselines=("own", "barrier"),
            ),
            "rs_rmsnorm_fp8": section(8, "rs_rmsnorm_fp8", 16384, baselines=("rs_rmsnorm",)),
            "qkv_a_proj_ag": section(8, "qkv_a_proj_ag", 64, 512, 4096, 16384, baselines=("own", "copies", "gemm")),
            "qkv_a_proj_ag_norm": section(8, "qkv_a_proj_ag_norm", 16384, baselines=("ag+norm",)),
            "chain": section(8, "chain", 16384, baselines=(*ENGINES, "own-rs")),
            "qkv_a_proj_ag_fp8": section(
                8, "qkv_a_proj_ag_fp8", 16384, baselines=("scaled_mm", "copies", "gemm", "barrier")
            ),
        },
    ),
    Launch(
        "four",
        70,
        {
            "rs_rmsnorm": section(4, "rs_rmsnorm", 16384, baselines=("symm",)),
            "rs_rmsnorm_ag": section(4, "rs_rmsnorm_ag", 512, 16384, baselines=("twoshot",)),
            "rs_rmsnorm_ag_fp8": section(
                4, "rs_rmsnorm_ag_fp8", 4096, 16384, baselines=("rs_rmsnorm_ag",), budget_s=0.3
            ),
        },
    ),
    Launch(
        "one",
        50,
        {
            "qkv_a_proj_ag": section(1, "qkv_a_proj_ag", 512, 2048, 4096, 16384, baselines=("gemm",)),
            "qkv_a_proj_ag_fp8": section(1, "qkv_a_proj_ag_fp8", 512, 2048, 4096, 16384, baselines=("gemm",)),
        },
    ),
    Launch("even", 110, _even_sections()),
    Launch(
        "fp8",
        100,
        {
            "rs_rmsnorm_ag_fp8": section(
                *(8, "rs_rmsnorm_ag_fp8", 4096, 16384), baselines=("rs_rmsnorm_ag",), variants=("staged",), budget_s=0.3
            ),
            "qkv_a_proj_ag_norm_fp8": section(
                *(8, "qkv_a_proj_ag_norm_fp8", 16384), baselines=("own", "ag_fp8+norm"), budget_s=0.3
            ),
            "mla_prologue_fp8": section(
                *(8, "mla_prologue_fp8", 64, 4096, 16384), baselines=("mla_prologue", *SCATTERED), budget_s=0.3
            ),
        },
    ),
    *decode.LAUNCHES,
]


# decode names all launches of that name.
NAMES = tuple(dict.fromkeys(name for launch in LAUNCHES for name in (launch.name.partition("-")[0], launch.name)))


def launches(names: tuple[str, ...] = NAMES) -> list[Launch]:
    return [launch for launch in LAUNCHES if launch.name.startswith(names)]


def check(launches: list[Launch], results: Path) -> None:
    """Runs the launches, prints the goals, and keeps them beside the results."""
    if any(launch in decode.BESIDE_FLASHINFER for launch in launches):
        compile_flashinfer()
    documents = run(launches, results)
    write("goals", documents, results, goals=table(GOALS, documents))
