"""Tables of a Markdown file, written from the results that it names.

Between `<!-- results: FILE.json -->` and `<!-- end -->` stands what that file of bench/results holds: nobody types the
numbers. A file that is not there yet leaves a line that says so.
"""

import json
import re
from pathlib import Path

from .baselines import BASELINES
from .report import variant_meaning
from .suite import RESULTS

_PLACE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with every table as the files in `results` have it now."""

    def written(match: re.Match) -> str:
        begin, name, end = match.groups()
        path = results / name
        body = markdown(json.loads(path.read_text())) if path.exists() else "Not measured yet.\n"
        return f"{begin}{body}{end}"

    return _PLACE.sub(written, text)


def markdown(document: dict) -> str:
    """A run's results, or the goals and blocks that a suite has made of several."""
    parts = [_caption(document)]
    ops = dict.fromkeys(row["op"] for row in document.get("results", []))
    parts += [_results(op, [row for row in document["results"] if row["op"] == op]) for op in ops]
    if "goals" in document:
        parts.append(_goals(document["goals"]))
    if "blocks" in document:
        parts.append(_blocks(document["blocks"]))
    return "\n".join(parts)


def _caption(document: dict) -> str:
    machine, options = document["machine"], document.get("options")
    if machine["gpu"]:
        device = f"{machine['gpus']} x {machine['gpu']}"
    else:
        device = f"{machine['cpu']}, {machine['cores']} cores"
    words = [device, f"torch {machine['torch']}", f"commit {(machine['commit'] or 'unknown')[:12]}"]
    words.append(f"copies {machine['copy_gb_s']:.0f} GB/s")
    if machine.get("link_gb_s"):
        words.append(f"between cards {machine['link_gb_s']:.0f} GB/s")
    if options:
        placed = "in place" if options["zero_copy"] else "staged"
        words.append(f"{options['world_size']} ranks, hidden {options['hidden']}, {options['dtype']}, inputs {placed}")
    return "; ".join(words) + "; us:\n"


def _results(op: str, rows: list[dict]) -> str:
    others = list(dict.fromkeys(name for row in rows for name in row["programs"] if name != "fused"))
    linked = any(row.get("link_share") for row in rows)
    shown = [row.get("link_share") if linked else row["programs"]["fused"].get("copy_share") for row in rows]
    head = ["tokens", op, *(["of the link" if linked else "of copies"] if any(shown) else [])]
    head += ["on the CPU"] if any(row.get("host_us") for row in rows) else []
    cells = []
    for row, share in zip(rows, shown, strict=True):
        line = [row["tokens"], f"{row['programs']['fused']['median_us']:.1f}"]
        line += [f"{share:.2f}"] if any(shown) else []
        line += [f"{row['host_us']:.1f}"] if "on the CPU" in head else []
        cells.append(line + [_other(row, name) for name in others])
    legend = [f"*{name}*: {BASELINES[name].meaning}" for name in others if name in BASELINES]
    legend += [f"*{name}*: {variant_meaning(name)}" for name in others if name not in BASELINES]
    return _table([*head, *others], cells) + ("\n" + "; ".join(legend) + ".\n" if legend else "")


def _other(row: dict, name: str) -> str:
    if name not in row["programs"]:
        return "-"
    share = row["programs"][name].get("copy_share")
    shown = f", {share:.2f} of copies" if share and not row.get("link_share") else ""
    return f"{row['programs'][name]['median_us']:.1f} ({row['speedup'][name]:.2f} x{shown})"


def _goals(goals: list[dict]) -> str:
    cells = []
    for goal in goals:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}{'' if goal['met'] else ' (missed)'}"
        bound = f"{'at least' if goal['at_least'] else 'at most'} {goal['bound']:g}"
        cells.append([goal["op"], goal["tokens"], goal["world_size"], goal["what"], value, bound])
    return _table(["op", "tokens", "ranks", "what", "measured", "goal"], cells)


def _blocks(blocks: list[dict]) -> str:
    cells = [[row["op"], row["tokens"], f"{row['best_us']:.1f}", row["blocks"] or "more"] for row in blocks]
    return _table(["op", "tokens", "best, us", "blocks for 3 % of that"], cells)


def _table(head: list[str], cells: list[list]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
