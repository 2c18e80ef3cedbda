"""What one card with eight ranks on it has to reach: `python -m bench goals`, which `make gpu-bench` calls."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .catalog import ENGINES
from .options import Options
from .results import file_name
from .suite import Launch, run


def _fastest(row: dict, names: tuple[str, ...]) -> float:
    return min(row["programs"][name]["median_us"] for name in names if name in row["programs"])


def _share(program: str) -> Callable[[dict], float]:
    return lambda row: row["programs"][program]["copy_share"]


def times(*names: str, program: str = "fused") -> Callable[[dict], float]:
    """The op's time, or a variant's, as a multiple of the fastest of these programs'."""
    return lambda row: _fastest(row, (program,)) / _fastest(row, names)


def speedup(*names: str) -> Callable[[dict], float]:
    return lambda row: _fastest(row, names) / _fastest(row, ("fused",))


HIDDEN = 7168  # DeepSeek-V3's


@dataclass(frozen=True)
class Goal:
    """A number that a row of results gives, or a few, and its bound."""

    what: str
    world_size: int
    op: str
    tokens: int
    measure: Callable[..., float]
    bound: float
    at_least: bool
    hidden: int = HIDDEN
    beside: tuple[tuple[int, int], ...] = ()  # (hidden, tokens) of rows that `measure` is given, too
    beside_op: str | None = None  # whose rows these are, where it is another op

    def measured(self, documents: list[dict]) -> float | None:
        """None where a row, or a program that it is compared with, is missing."""
        rows = {}
        for document in documents:
            options = document["options"]
            for row in document["results"]:
                place = (options["world_size"], row["op"], options.get("hidden", HIDDEN), row["tokens"])
                rows.setdefault(place, row)
        beside = ((self.beside_op or self.op, *place) for place in self.beside)
        places = ((self.op, self.hidden, self.tokens), *beside)
        with contextlib.suppress(KeyError, ValueError):
            return self.measure(*(rows[(self.world_size, *place)] for place in places))
        return None

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def at_least(bound: float, what: str, world_size: int, op: str, tokens: int, measure) -> Goal:
    return Goal(what, world_size, op, tokens, measure, bound, True)


def at_most(bound: float, what: str, world_size: int, op: str, tokens: int, measure) -> Goal:
    return Goal(what, world_size, op, tokens, measure, bound, False)


def at_most_beside(bound: float, what: str, world_size: int, op: str, tokens: int, other: str) -> Goal:
    """The op's time as a multiple of another op's of as many tokens."""

    def beside(row: dict, others: dict) -> float:
        return _fastest(row, ("fused",)) / _fastest(others, ("fused",))

    return Goal(what, world_size, op, tokens, beside, bound, False, beside=((HIDDEN, tokens),), beside_op=other)


# ---- no cliffs ----

# As many bytes as 2048 tokens of 7168, in rows that fill shared memory more and more.
WIDTHS = {8192: 1792, 10240: 1434, 12288: 1195, 16384: 896}
STEPS = (128, 256, 512, 1024, 2048)  # a token more than which is no step up
REDUCTIONS = ("rs_rmsnorm", "rs_rmsnorm_ag")


def _bandwidth_beside(program: str) -> Callable[[dict, dict], float]:
    return lambda row, narrow: _share(program)(row) / _share(program)(narrow)


def _above_the_line(program: str) -> Callable[[dict, dict, dict], float]:
    """The time, in that of the line through the times of fewer and of more tokens."""

    def above(row: dict, fewer: dict, more: dict) -> float:
        time, low, high = (_fastest(at, (program,)) for at in (row, fewer, more))
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

SCATTERED = ("dist-rs", "own-rs")
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
    at_least(0.95, "in place, of the copy bandwidth", 8, "rs_rmsnorm", 16384, _share("fused")),
    at_least(0.92, "the same with 8 blocks a rank", 8, "rs_rmsnorm", 16384, _share("ctas8")),
    at_least(0.78, "in place, of the copy bandwidth", 8, "rs_rmsnorm", 1024, _share("fused")),
    at_least(0.88, "staged, its own bytes, of the copy bandwidth", 8, "rs_rmsnorm", 16384, _share("staged")),
    at_most(1.7, "time, in bare barriers", 8, "rs_rmsnorm", 64, times("barrier")),
    at_least(1.15, "speedup over reduce_scatter_rows + add-norm", 8, "rs_rmsnorm", 16384, speedup("own")),
    at_least(1.1, "speedup over reduce_scatter_rows + add-norm", 8, "rs_rmsnorm", 512, speedup("own")),
    at_least(1.25, "speedup over reduce_scatter_rows + add-norm", 8, "rs_rmsnorm", 64, speedup("own")),
    at_most(15.0, "us of an eager call on the CPU", 8, "rs_rmsnorm", 64, lambda row: row["host_us"]),
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
]


def section(world_size: int, op: str, *tokens: int, **options) -> Options:
    defaults = {"device": "cuda", "compile": True, "budget_s": 0.5, "warmup": 2, "zero_copy": True, "timeout_s": 15.0}
    return Options(ops=(op,), world_size=world_size, tokens=tokens, **{**defaults, **options})


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
]


def table(goals: list[Goal], documents: list[dict]) -> list[dict]:
    """Prints the goals with what was measured; returns them for a file."""
    print(f"\n# {'op':<20} {'tokens':>6} {'ranks':>5}  {'measured':>8} {'goal':>9}")
    rows = []
    for goal in goals:
        value = goal.measured(documents)
        met = None if value is None else goal.met(value)
        word = {None: "not measured", True: "met", False: "MISSED"}[met]
        shown = "-" if value is None else f"{value:.3g}"
        bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g}"
        print(f"  {goal.op:<20} {goal.tokens:>6} {goal.world_size:>5}  {shown:>8} {bound:>9}  {word:<12}  {goal.what}")
        rows.append(
            {key: value for key, value in vars(goal).items() if key != "measure"} | {"value": value, "met": met}
        )
    return rows


def write(name: str, documents: list[dict], results: Path, **summary) -> None:
    """What was made of the results, kept beside them under the same machine."""
    if documents:
        largest = max(documents, key=lambda document: document["options"]["world_size"])
        kept = {key: largest[key] for key in ("format", "date", "machine")} | summary
        Path(results, file_name(name, largest)).write_text(json.dumps(kept, indent=1) + "\n")


def check(launches: list[Launch], results: Path) -> None:
    """Runs the launches, prints the goals, and keeps them beside the results."""
    documents = run(launches, results)
    write("goals", documents, results, goals=table(GOALS, documents))
