"""The tables of docs/performance.md, one a question, from the documents of bench/results."""

from collections.abc import Callable

from . import model
from .bounds import speedup
from .catalog import ENGINES
from .results import short_commit
from .tables import table

TOKENS = (1, 64, 512, 4096, 16384)
CARDS = {"2xh100": "2 x H100", "2xh200": "2 x H200"}
OPS = ("rs_rmsnorm", "rs_rmsnorm_ag", "qkv_a_proj_ag", "chain")


def machine_name(document: dict) -> str:
    """Such as 2 x H200, or CPU."""
    machine = document["machine"]
    return f"{machine['gpus']} x {model.card_of(document) or machine['gpu']}" if machine["gpu"] else "CPU"


def page_name(document: dict) -> str:
    """Of docs/results: the page of the document's machine."""
    return f"{machine_name(document).lower().replace(' ', '')}.md"


class Found:
    """The documents of a folder, as the questions look for them."""

    def __init__(self, documents: dict[str, dict]):
        self.documents = documents

    def row(self, section: str, device: str, ranks: int, tokens: int) -> dict:
        """Raises KeyError where that was not measured."""
        document = self.documents[f"{section}_{device}_{ranks}_ranks.json"]
        for row in document["results"]:
            if row["tokens"] == tokens:
                return row
        raise KeyError(f"{section} of {tokens} tokens on {device}")

    def made_of(self, key: str) -> list[dict]:
        """Documents that several runs were made into: "goals" or "blocks"."""
        return [document for document in self.documents.values() if key in document]


def _timed(row: dict, *others: tuple[str, ...]) -> str:
    """us, and how many times as long the fastest of each of these programs takes."""
    shown = ", ".join(_times(row, names) for names in others)
    return f"{row['programs']['fused']['median_us']:.1f} ({shown})"


def _times(row: dict, names: tuple[str, ...]) -> str:
    timed = row["programs"].keys() & set(names)
    return f"{speedup(*timed)(row):.2f} x" if timed else "-"


def _side_by_side(found: Found, columns: dict[str, Callable[[dict], str]]) -> str:
    """columns: what to show of an op's row. Two columns each: two H100, two H200."""
    head = [f"{op}, {name}" for op in columns for name in CARDS.values()]
    cells = [
        [tokens, *(cell(found.row(op, device, 2, tokens)) for op, cell in columns.items() for device in CARDS)]
        for tokens in TOKENS
    ]
    return table(["tokens", *head], cells)


def machines(found: Found) -> str:
    last = {}
    for document in sorted(found.documents.values(), key=lambda document: document["date"]):
        last[machine_name(document)] = document
    cells = []
    for name, document in sorted(last.items()):
        machine = document["machine"]
        link = f"{machine['link_gb_s']:.0f}" if machine.get("link_gb_s") else "-"
        software = [machine["torch"], machine.get("driver") or "not recorded", machine.get("nccl") or "not recorded"]
        if not machine["gpu"]:
            software[1:] = ["-", "-"]
        shown = [document["date"][:10], *software, f"{machine['copy_gb_s']:.0f}", link, short_commit(machine)]
        cells.append([f"[{name}](results/{page_name(document)})", *shown])
    return table(["machine", "date", "torch", "driver", "NCCL", "copies, GB/s", "link, GB/s", "commit"], cells)


def collectives(found: Found) -> str:
    others = {
        "rs_rmsnorm": [("dist",), ("symm",)],
        "rs_rmsnorm_ag": [("dist",), ("twoshot", "oneshot")],
        "qkv_a_proj_ag": [("dist",)],
    }
    return _side_by_side(found, {op: lambda row, names=names: _timed(row, *names) for op, names in others.items()})


def chain(found: Found) -> str:
    programs = {"engines": ENGINES, "scattered, NCCL": ("dist-rs",), "scattered, tp_fused's transport": ("own-rs",)}
    cells = []
    for tokens in TOKENS:
        row = found.row("chain", "2xh200", 2, tokens)
        times = [_times(row, names) for names in programs.values()]
        h100 = _timed(found.row("chain", "2xh100", 2, tokens), ENGINES)
        cells.append([tokens, f"{row['programs']['fused']['median_us']:.1f}", *times, h100])
    return table(["tokens", "2 x H200, us", *programs, "2 x H100, us (engines)"], cells)


def shared(found: Found) -> str:
    asked = [
        ("rs_rmsnorm", 8, (64, 1024, 16384), ("own",), "unfused"),
        ("rs_rmsnorm_ag", 4, (512, 16384), ("twoshot",), "torch's two-shot all-reduce, add, norm"),
        ("qkv_a_proj_ag", 8, (512, 16384), ("own", "copies"), "cuBLAS, then an all-gather"),
        ("qkv_a_proj_ag_fp8", 8, (16384,), ("scaled_mm", "copies"), "`_scaled_mm`, then an all-gather"),
        ("qkv_a_proj_ag_norm", 8, (16384,), ("ag+norm",), "`qkv_a_proj_ag`, norms, split"),
        ("chain", 8, (16384,), ("own-rs",), "scattered, nothing fused"),
    ]
    cells = []
    for op, ranks, sizes, programs, meaning in asked:
        for tokens in sizes:
            row = found.row(op, "1xh100", ranks, tokens)
            share = f"{row['programs']['fused']['copy_share']:.2f}"
            cells.append([f"`{op}`", ranks, tokens, _timed(row, programs), meaning, share])
    return table(["op", "ranks", "tokens", "us", "in brackets", "of copies"], cells)


def link(found: Found) -> str:
    return _side_by_side(found, {op: lambda row: f"{row['link_share']:.2f}" for op in OPS[:2]})


def resources(found: Found) -> str:
    """What an op takes beside its time."""
    needed = {
        (machine_name(document), row["op"], row["tokens"]): row["blocks"] or "more"
        for document in found.made_of("blocks")
        for row in document["blocks"]
    }
    cells = []
    for op in (*OPS[:3], "all_gather_rows"):
        line = [f"`{op}`"]
        for device in CARDS:
            try:
                line.append(f"{found.row(op, device, 2, 64)['host_us']:.1f}")
            except KeyError:
                line.append("-")
        line += [", ".join(str(needed[name, op, tokens]) for tokens in (64, 1024, 16384)) for name in CARDS.values()]
        cells.append(line)
    head = [f"{what}, {name}" for what in ("CPU, us", "blocks") for name in CARDS.values()]
    return table(["op", *head], cells)


def missed(found: Found) -> str:
    """How many, by machine."""
    cells = []
    for document in found.made_of("goals"):
        measured = [goal for goal in document["goals"] if goal["met"] is not None]
        cells.append([machine_name(document), len(measured), sum(not goal["met"] for goal in measured)])
    return table(["where", "goals measured", "missed"], cells)


def missed_goals(found: Found) -> str:
    """Which, by machine, op and what is compared."""
    rows = {}  # the tokens and the values of a goal, by all else
    for document in found.made_of("goals"):
        for goal in document["goals"]:
            if goal["met"] is False:
                bound = f"{'at least' if goal['at_least'] else 'at most'} {goal['bound']:g}"
                place = f"{machine_name(document)}, {goal['world_size']} ranks"
                row = rows.setdefault((place, f"`{goal['op']}`", goal["what"], bound), {})
                row[goal["tokens"]] = f"{goal['value']:.3g}"
    cells = [[*key[:2], ", ".join(map(str, row)), key[2], ", ".join(row.values()), key[3]] for key, row in rows.items()]
    return table(["where", "op", "tokens", "what", "measured", "goal"], cells)


def counted(found: Found) -> str:
    runs = [document for document in found.documents.values() if model.counts(document)]
    shares, barrier_s = model.Shares(), model.barrier_seconds(runs)
    cells = []
    for name in OPS:
        op, line = model.OPS[name], [f"`{name}`"]
        for card in model.CARDS:
            has, shape = model.rates(card, shares, barrier_s), model.Shape(16384)
            seconds, bound = model.predict(op.fused, shape, has)
            unfused = model.fastest(op.unfused.values(), shape, has)
            line.append(f"{seconds * 1e6:.0f}, {bound} ({unfused / seconds:.2f} x)")
        cells.append(line)
    return table(["op", *model.CARDS], cells)


QUESTIONS = {made.__name__: made for made in (machines, collectives, chain, shared, link, resources, missed, counted)}
