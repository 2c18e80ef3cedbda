"""Markdown tables of what bench/results holds, and of what `python -m bench model` counts: nobody types the numbers."""

import statistics
from dataclasses import replace

from . import counts, model
from .baselines import BASELINES
from .results import device_name, short_commit, variant_meaning


def markdown(document: dict) -> str:
    """A run's results, or the goals and blocks that a suite has made of several."""
    parts = [_caption(document)]
    ops = dict.fromkeys(row["op"] for row in document.get("results", []))
    parts += [_results(op, [row for row in document["results"] if row["op"] == op]) for op in ops]
    if "goals" in document:
        parts.append(_goals(document["goals"], document["machine"]))
    if "blocks" in document:
        parts.append(_blocks(document["blocks"]))
    return "\n".join(parts)


def _caption(document: dict) -> str:
    machine, options = document["machine"], document.get("options")
    words = [device_name(machine), f"torch {machine['torch']}", f"commit {short_commit(machine)}"]
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
        line += [_on_the_cpu(row)] if "on the CPU" in head else []
        cells.append(line + [_other(row, name) for name in others])
    legend = [f"*{name}*: {BASELINES[name].meaning}" for name in others if name in BASELINES]
    legend += [f"*{name}*: {variant_meaning(name)}" for name in others if name not in BASELINES]
    return table([*head, *others], cells) + ("\n" + "; ".join(legend) + ".\n" if legend else "")


def _on_the_cpu(row: dict) -> str:
    """The slowest rank's time and, where ranks differ, the fastest's; then an empty call's, which older runs lack."""
    slowest, fastest, empty = f"{row['host_us']:.1f}", row.get("host_us_fastest"), row.get("host_empty_us")
    shown = slowest if fastest is None or slowest == f"{fastest:.1f}" else f"{fastest:.1f} to {slowest}"
    return shown if empty is None else f"{shown} (empty {empty:.1f})"


def _other(row: dict, name: str) -> str:
    if name not in row["programs"]:
        return "-"
    share = row["programs"][name].get("copy_share")
    shown = f", {share:.2f} of copies" if share and not row.get("link_share") else ""
    return f"{row['programs'][name]['median_us']:.1f} ({row['speedup'][name]:.2f} x{shown})"


def _goals(goals: list[dict], machine: dict) -> str:
    """machine: with the commit of the last run; goals that an earlier one has measured say at which."""
    cells = []
    for goal in goals:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}{'' if goal['met'] else ' (missed)'}"
        if goal.get("commit", machine["commit"]) != machine["commit"]:
            value += f", at {short_commit(goal)}"
        bound = f"{'at least' if goal['at_least'] else 'at most'} {goal['bound']:g}"
        cells.append([goal["op"], goal["tokens"], goal["world_size"], goal["what"], value, bound])
    return table(["op", "tokens", "ranks", "what", "measured", "goal"], cells)


def _blocks(blocks: list[dict]) -> str:
    cells = [[row["op"], row["tokens"], f"{row['best_us']:.1f}", row["blocks"] or "more"] for row in blocks]
    return table(["op", "tokens", "best, us", "blocks for 3 % of that"], cells)


# ---- what bench/model.py counts ----


def predictions(shapes: list[model.Shape], cards: tuple[str, ...], shares: model.Shares, barrier_s: float) -> str:
    """A table for every op: us, what bounds it, and how many times as long the unfused program takes."""
    from tp_fused import planning

    cells = [
        [
            name,
            planning.sm_count(name),
            *(f"{rate:.0f}" for rate in (card.bf16 / 1e12, card.fp8 / 1e12, card.memory / 1e9, card.link / 1e9)),
        ]
        for name, card in ((name, model.CARDS[name]) for name in cards)
    ]
    parts = [
        table(
            ["card", "SMs", "bf16, TFLOP/s", "fp8, TFLOP/s", "memory, GB/s", "links, GB/s a direction"],
            cells,
        )
    ]
    reached = ", ".join(f"{name} {share:g}" for name, share in vars(shares).items())
    sizes = f"{shapes[0].world_size} ranks, hidden {shapes[0].hidden}, {shapes[0].latent} latent columns, bf16"
    parts.append(f"Reached of these: {reached}. A barrier: {barrier_s * 1e6:.1f} us. {sizes}, inputs in place; us:\n")
    for name, op in model.OPS.items():
        cells = []
        for shape in shapes:
            line = [shape.tokens]
            for card in cards:
                has = model.rates(card, shares, barrier_s)
                seconds, bound = model.predict(op.fused, shape, has)
                unfused = model.fastest(op.unfused.values(), shape, has)
                line.append(f"{seconds * 1e6:.1f}, {bound} ({unfused / seconds:.2f} x)")
            cells.append(line)
        parts.append(f"`{name}`; in brackets, {op.meaning}:\n\n" + table(["tokens", *cards], cells))
    return "\n".join([*parts, _prologue_forms(shapes[0], cards, shares, barrier_s)])


def _prologue_forms(shape: model.Shape, cards: tuple[str, ...], shares: model.Shares, barrier_s: float) -> str:
    """mla_prologue both ways, about where one becomes faster than the other."""
    cells = []
    for tokens in (1, 8, 16, 32, 64, 128, 256):
        asked = replace(shape, tokens=tokens)
        line = [tokens, "all rows" if asked.gathers() else "own rows"]
        for card in cards:
            has = model.rates(card, shares, barrier_s)
            both = (model.predict(form, asked, has)[0] * 1e6 for form in (counts.gathered_chain, counts.chain))
            line.append(" / ".join(f"{us:.1f}" for us in both))
        cells.append(line)
    about = "all normed rows for a share of the columns / its own rows for all columns"
    return f"`mla_prologue`'s two forms, in which a rank multiplies {about}:\n\n" + table(
        ["tokens", "runs", *cards], cells
    )


def comparison(runs: list[dict], shares: model.Shares, found: list[dict]) -> str:
    """What the runs measured beside what is counted for their machines. `found`: where their barriers are looked up."""
    cells, ratios = [], []
    for run in runs:
        place = f"{run['machine']['gpus']} x {model.card_of(run)}"
        for row in model.compare(run, model.rates_of(run, found, shares)):
            ratios.append(row.counted / row.measured)
            times = (f"{row.measured * 1e6:.1f}", f"{row.counted * 1e6:.1f}", f"{ratios[-1]:.2f}")
            cells.append([place, run["options"]["world_size"], row.op, row.tokens, row.program, *times, row.bound])
    if not cells:
        return "Not measured yet.\n"
    head = [
        "cards",
        "ranks",
        "op",
        "tokens",
        "program",
        "measured, us",
        "counted, us",
        "counted / measured",
        "bound by",
    ]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, half of them over {statistics.median(ratios):.2f}"
    return table(head, cells) + f"\nCounted / measured: {spread}.\n"


def table(head: list[str], cells: list[list]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
