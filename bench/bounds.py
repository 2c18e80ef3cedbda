"""A goal: a number that rows of results give, and its bound. goals.py, decode.py and multi.py have the goals."""

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .options import Options
from .results import file_name


def fastest(row: dict, names: tuple[str, ...]) -> float:
    return min(row["programs"][name]["median_us"] for name in names if name in row["programs"])


def share(program: str) -> Callable[[dict], float]:
    return lambda row: row["programs"][program]["copy_share"]


def times(*names: str, program: str = "fused") -> Callable[[dict], float]:
    """The op's time, or a variant's, as a multiple of the fastest of these programs'."""
    return lambda row: fastest(row, (program,)) / fastest(row, names)


def speedup(*names: str) -> Callable[[dict], float]:
    return lambda row: fastest(row, names) / fastest(row, ("fused",))


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
        """By the first rows that have it; None where a row, or a program that it is compared with, is missing."""
        rows = {}
        for document in documents:
            options = document["options"]
            for row in document["results"]:
                place = (options["world_size"], row["op"], options.get("hidden", HIDDEN), row["tokens"])
                rows.setdefault(place, []).append(row)
        beside = ((self.beside_op or self.op, *place) for place in self.beside)
        places = ((self.op, self.hidden, self.tokens), *beside)
        for chosen in itertools.product(*(rows.get((self.world_size, *place), ()) for place in places)):
            with contextlib.suppress(KeyError, ValueError):
                return self.measure(*chosen)
        return None

    def met(self, value: float) -> bool:
        return is_met(value, self.bound, self.at_least)


def is_met(value: float, bound: float, at_least: bool) -> bool:
    return value >= bound if at_least else value <= bound


def at_least(bound: float, what: str, world_size: int, op: str, tokens: int, measure) -> Goal:
    return Goal(what, world_size, op, tokens, measure, bound, True)


def at_most(bound: float, what: str, world_size: int, op: str, tokens: int, measure) -> Goal:
    return Goal(what, world_size, op, tokens, measure, bound, False)


def at_most_beside(bound: float, what: str, world_size: int, op: str, tokens: int, other: str) -> Goal:
    """The op's time as a multiple of another op's of as many tokens."""

    def beside(row: dict, others: dict) -> float:
        return fastest(row, ("fused",)) / fastest(others, ("fused",))

    return Goal(what, world_size, op, tokens, beside, bound, False, beside=((HIDDEN, tokens),), beside_op=other)


def section(world_size: int, op: str, *tokens: int, **options) -> Options:
    defaults = {"device": "cuda", "compile": True, "budget_s": 0.5, "warmup": 2, "zero_copy": True, "timeout_s": 15.0}
    return Options(ops=(op,), world_size=world_size, tokens=tokens, **{**defaults, **options})


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
    """What was made of the results, kept beside them under the same machine. Goals that this run has not measured stay
    as an earlier one has: each says when, and at which commit.
    """
    if not documents:
        return
    largest = max(documents, key=lambda document: document["options"]["world_size"])
    file = Path(results, file_name(name, largest))
    if "goals" in summary:
        earlier = _dated(json.loads(file.read_text())) if file.exists() else []
        summary["goals"] = [_latest(goal, earlier) for goal in _dated(largest | summary)]
    kept = {key: largest[key] for key in ("format", "date", "machine")} | summary
    file.write_text(json.dumps(kept, indent=1) + "\n")


def _dated(document: dict) -> list[dict]:
    """Its goals; where one was measured, with when and at which commit."""
    run = {"date": document["date"], "commit": document["machine"].get("commit")}
    return [run | goal if goal["value"] is not None else goal for goal in document["goals"]]


def _latest(goal: dict, earlier: list[dict]) -> dict:
    """The goal, or what was measured for it earlier, held against today's bound."""

    def named(one: dict) -> tuple:
        return one["what"], one["world_size"], one["op"], one["tokens"], one["at_least"], one.get("hidden", HIDDEN)

    if goal["value"] is None:
        for one in earlier:
            if named(one) == named(goal) and one["value"] is not None:
                met = is_met(one["value"], goal["bound"], goal["at_least"])
                return goal | {name: one[name] for name in ("value", "date", "commit")} | {"met": met}
    return goal
