"""What the ops cost on cards of their own, by counting, and how far such counting is from what was measured.

A phase is what a rank does at the same time: its memory reads and writes bytes, its links bring bytes, its tensor cores
multiply. It takes as long as the longest of the three; phases that follow each other are added, and every
synchronisation of the ranks costs a bare barrier. What most of an op's time goes to bounds it.

Rates are those of the datasheet times the share of them that is reached. Ranks that share a card share its memory and
its tensor cores, and have no links.

Not counted: launches of kernels that meet nobody, tiles that do not fill a card, what the L2 keeps.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

TOKENS = (64, 512, 1024, 4096, 8192, 16384)
GROUP = 128  # columns of a scale of fp8 rows
BF16, FP8 = 2, 1  # bytes of what is multiplied


@dataclass(frozen=True)
class Card:
    """Dense operations a second, bytes a second of the memory and of all links in one direction."""

    bf16: float
    fp8: float
    memory: float
    link: float


CARDS = {
    "H20": Card(148e12, 296e12, 4.0e12, 450e9),
    "H100": Card(989.4e12, 1978.9e12, 3.35e12, 450e9),
    "H200": Card(989.4e12, 1978.9e12, 4.8e12, 450e9),
    "B200": Card(2250e12, 4500e12, 8.0e12, 900e9),
}


@dataclass(frozen=True)
class Shares:
    """Of the datasheet's rates: what large copies, copies between cards, and matrix products are taken to reach."""

    memory: float = 0.9
    link: float = 0.83
    bf16: float = 0.7
    fp8: float = 0.6


@dataclass(frozen=True)
class Rates:
    """What a rank has, alone or with others on its card. card: its name. barrier_s: seconds of a synchronisation."""

    card: str
    bf16: float
    fp8: float
    memory: float
    link: float
    barrier_s: float
    ranks_per_card: int = 1


def rates(card: str, shares: Shares, barrier_s: float) -> Rates:
    reached = {name: getattr(CARDS[card], name) * share for name, share in vars(shares).items()}
    return Rates(card, **reached, barrier_s=barrier_s)


@dataclass(frozen=True)
class Phase:
    """Bytes, operations on numbers of so many bytes, and synchronisations: those of the rank that owns most rows."""

    memory: float
    link: float = 0.0
    operations: float = 0.0
    factor_bytes: int = BF16
    barriers: int = 0

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Of each part by itself."""
        products = rates.fp8 if self.factor_bytes == FP8 else rates.bf16
        shared = rates.ranks_per_card
        return {
            "link": self.link / rates.link if shared == 1 else 0.0,
            "memory": self.memory * shared / rates.memory,
            "arithmetic": self.operations * shared / products,
        }


def cost(phases: tuple[Phase, ...], rates: Rates) -> tuple[float, str]:
    """Seconds of all phases, one after the other, and what most of them go to."""
    spent = Counter()
    for phase in phases:
        seconds = phase.seconds(rates)
        longest = max(seconds, key=seconds.get)
        spent[longest] += seconds[longest]
        spent["synchronising"] += phase.barriers * rates.barrier_s
    return spent.total(), max(spent, key=spent.get)


@dataclass(frozen=True)
class Shape:
    """A call, in elements; its properties are bytes of bf16. `staged`: its input is no symmetric memory. `card`,
    `ranks_per_card`: where it runs."""

    tokens: int
    world_size: int = 8
    hidden: int = 7168
    latent: int = 2112
    staged: bool = False
    card: str = "H100"
    ranks_per_card: int = 1

    @property
    def own_tokens(self) -> int:
        from tp_fused import partition

        return partition.row_count(self.tokens, 0, self.world_size)

    @property
    def rows(self) -> int:
        return self.tokens * self.hidden * BF16

    @property
    def own_rows(self) -> int:
        return self.own_tokens * self.hidden * BF16

    @property
    def latents(self) -> int:
        return self.tokens * self.latent * BF16

    @property
    def own_latents(self) -> int:
        return self.own_tokens * self.latent * BF16

    def plan(self, op: str) -> dict:
        """What would be launched. Ranks that share a card fill it, as in the benchmark."""
        import torch

        from tp_fused import planning

        most_ctas = planning.sm_count(self.card) // self.ranks_per_card
        return planning.plan(
            op,
            self.tokens,
            card=self.card,
            world_size=self.world_size,
            hidden_size=self.hidden,
            columns=self.latent if op.startswith("qkv_") else 0,
            dtype=torch.float8_e4m3fn if op.endswith("_fp8") and op.startswith("qkv_") else torch.bfloat16,
            in_place=not self.staged,
            share=planning.share_of(self.card, self.ranks_per_card, most_ctas),
        )

    def barriers(self, count: int) -> int:
        return count if self.world_size > 1 else 0


# ---- the ops, and the programs that they replace ----


def _reduce(shape: Shape, others: float) -> Phase:
    """Every rank's input is read, by its owner and by the peers; `others`: what else the memory moves meanwhile."""
    staging = 2 * (shape.rows - shape.own_rows) if shape.staged else 0
    barriers = shape.barriers(1 if shape.staged else 2)
    return Phase(shape.rows + staging + others, (shape.world_size - 1) * shape.own_rows, barriers=barriers)


def _gather(shape: Shape, own: float, all_rows: float) -> Phase:
    return Phase(own + all_rows, all_rows - own, barriers=shape.barriers(1))


def _project(shape: Shape, tokens: int, factor_bytes: int = BF16) -> Phase:
    """The product of so many rows, its result not counted."""
    scales = tokens * 4 * -(-shape.hidden // GROUP) if factor_bytes == FP8 else 0
    return Phase(
        (tokens + shape.latent) * shape.hidden * factor_bytes + scales,
        operations=2.0 * tokens * shape.hidden * shape.latent,
        factor_bytes=factor_bytes,
    )


def rs_rmsnorm(shape: Shape) -> tuple[Phase, ...]:
    return (_reduce(shape, 3 * shape.own_rows),)


def reduce_then_norm(shape: Shape) -> tuple[Phase, ...]:
    return (_reduce(shape, shape.own_rows), Phase(4 * shape.own_rows))


def rs_rmsnorm_ag(shape: Shape) -> tuple[Phase, ...]:
    reduced = _reduce(shape, 2 * shape.own_rows + shape.rows)
    # Rows are gathered as they are finished; that every rank has them says that no input is read any more.
    return (replace(reduced, link=reduced.link + shape.rows - shape.own_rows, barriers=shape.barriers(2)),)


def all_reduce_then_norm(shape: Shape) -> tuple[Phase, ...]:
    gathered = _gather(shape, shape.own_rows, shape.rows)
    return (_reduce(shape, shape.own_rows), gathered, Phase(4 * shape.rows))


def qkv_a_proj_ag(shape: Shape, factor_bytes: int = BF16) -> tuple[Phase, ...]:
    plan = shape.plan("qkv_a_proj_ag" if factor_bytes == BF16 else "qkv_a_proj_ag_fp8")
    if plan["body"] != "tiles":
        return project_then_gather(shape, factor_bytes)
    product = _project(shape, shape.own_tokens, factor_bytes)
    link = shape.latents - shape.own_latents
    return (replace(product, memory=product.memory + shape.latents, link=link, barriers=shape.barriers(1)),)


def project_then_gather(shape: Shape, factor_bytes: int = BF16) -> tuple[Phase, ...]:
    product = _project(shape, shape.own_tokens, factor_bytes)
    product = replace(product, memory=product.memory + shape.own_latents)
    return (product, _gather(shape, shape.own_latents, shape.latents))


def qkv_a_proj_ag_fp8(shape: Shape) -> tuple[Phase, ...]:
    return qkv_a_proj_ag(shape, FP8)


def project_fp8_then_gather(shape: Shape) -> tuple[Phase, ...]:
    return project_then_gather(shape, FP8)


def chain(shape: Shape) -> tuple[Phase, ...]:
    return rs_rmsnorm(shape) + qkv_a_proj_ag(shape)


def engines(shape: Shape) -> tuple[Phase, ...]:
    """All-reduce; then every rank adds and norms all rows, projects them all, and norms the latents."""
    product = _project(shape, shape.tokens)
    product = replace(product, memory=product.memory + shape.latents)
    return (*all_reduce_then_norm(shape), product, Phase(2 * shape.latents))


@dataclass(frozen=True)
class Op:
    """`programs`: what the benchmark calls the unfused program, where it times it."""

    fused: Callable[[Shape], tuple[Phase, ...]]
    unfused: Callable[[Shape], tuple[Phase, ...]]
    programs: tuple[str, ...]
    meaning: str


OPS = {
    "rs_rmsnorm": Op(rs_rmsnorm, reduce_then_norm, ("own",), "a reduce-scatter, then add and norm"),
    "rs_rmsnorm_ag": Op(
        rs_rmsnorm_ag, all_reduce_then_norm, ("twoshot",), "an all-reduce, then add and norm of all rows on every rank"
    ),
    "qkv_a_proj_ag": Op(qkv_a_proj_ag, project_then_gather, ("own", "copies"), "the product, then an all-gather"),
    "qkv_a_proj_ag_fp8": Op(
        qkv_a_proj_ag_fp8, project_fp8_then_gather, ("scaled_mm", "copies"), "the product, then an all-gather"
    ),
    "chain": Op(chain, engines, ("own", "twoshot"), "what engines do"),
}


def predict(program: Callable[[Shape], tuple[Phase, ...]], shape: Shape, rates: Rates) -> tuple[float, str]:
    """An input in symmetric memory is read in place, unless the plan is to stage its few rows."""
    shape = replace(shape, card=rates.card, ranks_per_card=rates.ranks_per_card)
    return cost(program(replace(shape, staged=not shape.plan("rs_rmsnorm")["in_place"])), rates)


# ---- what has been measured ----


def documents(results: Path) -> list[dict]:
    """The runs on cards that are known here, in bf16, that `results` holds."""
    read = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    return [document for document in read if counts(document)]


def counts(document: dict) -> bool:
    """Not what several runs were made into, which has no options, nor a sweep of blocks, which has no baselines."""
    options = document.get("options", {})
    return card_of(document) is not None and options.get("dtype") == "bf16" and options.get("baselines") != []


def card_of(document: dict) -> str | None:
    found = re.search(r"[HB]\d+", document["machine"]["gpu"] or "")
    return found.group() if found and found.group() in CARDS else None


def _place(document: dict) -> tuple:
    machine = document["machine"]
    return machine["gpu"], machine["gpus"], document["options"]["world_size"]


def barrier_seconds(found: list[dict], place: tuple | None = None) -> float:
    """The bare barrier of the runs at this place. Where there are none: of those with the fewest ranks a card."""
    measured = {}
    for document in found:
        for row in document["results"]:
            if "barrier" in row["programs"]:
                measured.setdefault(_place(document), []).append(row["programs"]["barrier"]["median_us"] * 1e-6)
    if not measured:
        raise ValueError("no run on a card has timed a barrier yet")
    at = place if place in measured else min(measured, key=lambda place: place[2] / place[1])
    return statistics.median(measured[at])


def rates_of(document: dict, found: list[dict], shares: Shares) -> Rates:
    """As the run measured them; the tensor cores', which no run measures by themselves, as assumed."""
    machine = document["machine"]
    assumed = rates(card_of(document), shares, barrier_seconds(found, _place(document)))
    link = (machine.get("link_gb_s") or 0.0) * 1e9 or assumed.link
    memory = machine["copy_gb_s"] * 1e9 / machine["gpus"]
    return replace(assumed, memory=memory, link=link, ranks_per_card=machine["ranks_per_gpu"])


@dataclass(frozen=True)
class Compared:
    """A program's time as it was measured and as it is counted, in seconds, and what bounds it by counting."""

    op: str
    tokens: int
    program: str
    measured: float
    counted: float
    bound: str


def compare(document: dict, has: Rates) -> list[Compared]:
    """Every program of a run that is known here."""
    options, compared = document["options"], []
    for row in document["results"]:
        op = OPS.get(row["op"])
        shape = Shape(row["tokens"], *(options[name] for name in ("world_size", "hidden", "latent")))
        for name, times in row["programs"].items() if op else ():
            if name not in ("fused", "staged", *op.programs):
                continue
            staged = name == "staged" or not options["zero_copy"]
            program = op.unfused if name in op.programs else op.fused
            seconds, bound = predict(program, replace(shape, staged=staged), has)
            shown = name if not staged else "staged" if program is op.fused else f"{name}, staged"
            compared.append(Compared(row["op"], row["tokens"], shown, times["median_us"] * 1e-6, seconds, bound))
    return compared
