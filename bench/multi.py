"""One rank a card: `python -m bench multi`, which `make gpu-multi` calls on a machine with two or more.

For 8, 4 and 2 ranks as far as there are cards: the ops beside NCCL and torch's symmetric memory, inputs read in place
and staged. For the most ranks also more sizes, fp8, the prologue, how many blocks an op needs, and what it takes from
a matrix product beside it.
"""

from pathlib import Path

from .bounds import Goal, at_least, at_most, at_most_beside, section, speedup, table, times, write
from .catalog import ENGINES, SCATTERED
from .suite import Launch, compile_flashinfer, run

TOKENS = tuple(2**power for power in range(15))  # of reductions and the prologue, on the most ranks
FEWER_TOKENS = (1, 8, 64, 128, 512, 1024, 4096, 8192, 16384)
CTAS = (2, 4, 8, 16, 24, 32, 48, 64)
PARTS = ("ops", "prologue", "blocks", "beside")
STAGED = ("staged",)
ALL_REDUCED = ("dist", "nccl-symm", "twoshot", "oneshot", "flashinfer")
NEAR = 1.03  # of the best time: near enough to leave the rest of the card to others


def launches(cards: int, parts: tuple[str, ...] = PARTS) -> list[Launch]:
    sizes = [world_size for world_size in (8, 4, 2) if world_size <= cards]
    most, *fewer = sizes
    planned = [_ops(most), *map(_some_ops, fewer), _prologue(most), _blocks(most), _beside(most)]
    return [launch for launch in planned if launch.name.startswith(parts)]


def _some_ops(world_size: int, reduced: tuple[int, ...] = FEWER_TOKENS) -> Launch:
    """reduced: the sizes of reductions."""

    def timed(op: str, tokens: tuple[int, ...], *baselines: str, variants: tuple[str, ...] = ()):
        return section(world_size, op, *tokens, baselines=baselines, variants=variants, budget_s=0.3)

    sections = {
        "rs_rmsnorm": timed("rs_rmsnorm", reduced, *("dist", "nccl-symm", "own", "symm", "barrier"), variants=STAGED),
        "rs_rmsnorm_ag": timed("rs_rmsnorm_ag", reduced, "allreduce", *ALL_REDUCED, variants=STAGED),
        "qkv_a_proj_ag": timed("qkv_a_proj_ag", FEWER_TOKENS, "dist", "own", "copies", "gemm"),
        "chain": timed("chain", FEWER_TOKENS, *ENGINES, *SCATTERED, variants=STAGED),
    }
    return Launch(f"ops-{world_size}", 90, sections)


def _ops(world_size: int) -> Launch:
    some = _some_ops(world_size, TOKENS)
    quantized = {"baselines": (*ALL_REDUCED, "rs_rmsnorm_ag"), "variants": STAGED, "budget_s": 0.3}
    few = [tokens for tokens in FEWER_TOKENS if tokens <= 512]
    sections = {
        "rs_rmsnorm_ag_fp8": section(world_size, "rs_rmsnorm_ag_fp8", *TOKENS, **quantized),
        "qkv_a_proj_ag_complete": section(
            world_size, "qkv_a_proj_ag_complete", *few, baselines=("gemm",), budget_s=0.3
        ),
    }
    return Launch(some.name, 260 if world_size == 8 else 163, {**some.sections, **sections})


def _prologue(world_size: int) -> Launch:
    programs = {"mla_prologue": (*ENGINES, *SCATTERED), "mla_prologue_fp8": (*ENGINES, *SCATTERED, "mla_prologue")}
    sections = {
        op: section(world_size, op, *TOKENS, baselines=baselines, budget_s=0.2) for op, baselines in programs.items()
    }
    return Launch("prologue", 200 if world_size == 8 else 187, sections)


def _blocks(world_size: int) -> Launch:
    def swept(op: str):
        variants = tuple(f"ctas{count}" for count in CTAS)
        return section(world_size, op, 64, 1024, 16384, baselines=(), variants=variants, budget_s=0.3)

    ops = ("rs_rmsnorm", "rs_rmsnorm_ag", "all_gather_rows", "qkv_a_proj_ag")
    return Launch("blocks", 84, {f"{op}_blocks": swept(op) for op in ops})


def _beside(world_size: int) -> Launch:
    bounds = ("ctas4", "ctas8", "ctas16", "ctas32")
    options = section(world_size, "beside_gemm", 4096, 16384, baselines=("alone", "gemm"), variants=bounds)
    return Launch("beside", 45, {"beside_gemm": options})


def goals(world_size: int) -> list[Goal]:
    small, large = [tokens for tokens in TOKENS if tokens <= 512], [tokens for tokens in TOKENS if tokens >= 8192]
    nccl, engines = speedup("dist"), speedup(*ENGINES)
    return [
        *(at_least(1.8, "speedup over NCCL + add-norm", world_size, "rs_rmsnorm", tokens, nccl) for tokens in small),
        *(
            at_least(1.0, "speedup over NCCL + add-norm", world_size, "rs_rmsnorm", tokens, nccl)
            for tokens in TOKENS
            if tokens not in (*small, *large)
        ),
        *(at_least(1.05, "speedup over NCCL + add-norm", world_size, "rs_rmsnorm", tokens, nccl) for tokens in large),
        at_least(1.5, "speedup over cuBLAS + NCCL", world_size, "qkv_a_proj_ag", 16384, nccl),
        *(
            at_least(2.3 if tokens == 16384 else 1.0, "speedup over engines", world_size, "chain", tokens, engines)
            for tokens in FEWER_TOKENS
        ),
        *(_on_two_cards() if world_size == 2 else ()),
    ]


def _on_two_cards() -> list[Goal]:
    flashinfer, engines = "time, in that of FlashInfer's all-reduce", "time, in that of the fastest that engines do"
    staged, gemm = times("flashinfer", program="staged"), times("gemm")
    return [
        *(at_most(0.85, flashinfer, 2, "rs_rmsnorm_ag", tokens, times("flashinfer")) for tokens in (1, 16, 64, 128)),
        *(at_most(0.95, f"staged, {flashinfer}", 2, "rs_rmsnorm_ag", tokens, staged) for tokens in (512, 2048)),
        *(
            at_most_beside(1.2, "time, in that of rs_rmsnorm", 2, "rs_rmsnorm_ag", tokens, "rs_rmsnorm")
            for tokens in TOKENS
            if tokens <= 16
        ),
        *(
            at_most(0.90, "time, in that of cuBLAS with all of the weight", 2, "qkv_a_proj_ag_complete", tokens, gemm)
            for tokens in (1, 8, 64)
        ),
        *(at_most(0.70, engines, 2, "mla_prologue", tokens, times(*ENGINES)) for tokens in (1, 8, 64)),
        *(
            at_most(0.80, "time, in that of the bf16 form", 2, "rs_rmsnorm_ag_fp8", tokens, times("rs_rmsnorm_ag"))
            for tokens in (4096, 16384)
        ),
    ]


def blocks_needed(documents: list[dict]) -> list[dict]:
    """For every op and size that was swept, the fewest blocks that are near the best time."""
    needed = []
    for row in (row for document in documents for row in document["results"]):
        times = {count: row["programs"].get(f"ctas{count}", {}).get("median_us") for count in CTAS}
        if None in times.values():
            continue
        best = min(*times.values(), row["programs"]["fused"]["median_us"])
        fewest = next((count for count in CTAS if times[count] <= NEAR * best), None)
        needed.append({"op": row["op"], "tokens": row["tokens"], "best_us": best, "blocks": fewest})
    return needed


def check(planned: list[Launch], results: Path) -> None:
    """Runs launches, prints the goals and the blocks that are needed, and keeps them beside the results."""
    compared = any(launch.name.startswith(("ops", "prologue")) for launch in planned)
    if compared:
        compile_flashinfer()
    documents = run(planned, results)
    if compared:
        write("multi", documents, results, goals=table(goals(planned[0].world_size), documents))
    needed = blocks_needed(documents)
    if not needed:
        return
    print(f"\n# blocks a card within {100 * NEAR - 100:.0f} % of the best, of {', '.join(map(str, CTAS))} and no bound")
    for row in needed:
        print(f"  {row['op']:<20} {row['tokens']:>6}  {row['best_us']:>9.1f} us  {row['blocks'] or 'more':>5}")
    write("blocks", documents, results, blocks=needed)
