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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .counts import FP8, OPS, Phase, Phases, Shape

TOKENS = (1, 8, 64, 512, 1024, 4096, 8192, 16384)


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


def _seconds(phase: Phase, rates: Rates) -> dict[str, float]:
    """Of each part by itself."""
    products = rates.fp8 if phase.factor_bytes == FP8 else rates.bf16
    shared = rates.ranks_per_card
    return {
        "link": phase.link / rates.link if shared == 1 else 0.0,
        "memory": phase.memory * shared / rates.memory,
        "arithmetic": phase.operations * shared / products,
    }


def cost(phases: Phases, rates: Rates) -> tuple[float, str]:
    """Seconds of all phases, one after the other, and what most of them go to."""
    spent = Counter()
    for phase in phases:
        seconds = _seconds(phase, rates)
        longest = max(seconds, key=seconds.get)
        spent[longest] += seconds[longest]
        spent["synchronising"] += phase.barriers * rates.barrier_s
    return spent.total(), max(spent, key=spent.get)


def predict(program: Callable[[Shape], Phases], shape: Shape, rates: Rates) -> tuple[float, str]:
    """An input in symmetric memory is read in place, unless the plan is to stage its few rows."""
    shape = replace(shape, card=rates.card, ranks_per_card=rates.ranks_per_card)
    return cost(program(replace(shape, staged=not shape.plan("rs_rmsnorm")["in_place"])), rates)


def fastest(programs: Iterable[Callable[[Shape], Phases]], shape: Shape, rates: Rates) -> float:
    """Seconds of the fastest of these."""
    return min(predict(program, shape, rates)[0] for program in programs)


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
            if name not in ("fused", "staged", *op.unfused):
                continue
            staged = name == "staged" or not options["zero_copy"]
            program = op.unfused.get(name, op.fused)
            seconds, bound = predict(program, replace(shape, staged=staged), has)
            shown = name if not staged else "staged" if program is op.fused else f"{name}, staged"
            compared.append(Compared(row["op"], row["tokens"], shown, times["median_us"] * 1e-6, seconds, bound))
    return compared
