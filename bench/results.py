"""The files of results: where they are kept, what they are called, what they call things. Without torch."""

import json
import re
from pathlib import Path

from .options import ctas_of

RESULTS = Path(__file__).resolve().parent / "results"


def load(path: Path) -> dict | None:
    """A run's JSON file; None for what `goals` or `multi` has made of several, ValueError where it is neither."""
    try:
        document = json.loads(path.read_text())
        if "goals" in document or "blocks" in document:
            return None
        if document["machine"]["copy_gb_s"] <= 0 or not {"results", "options"} <= document.keys():
            raise KeyError("results, options or machine")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file that --json wrote ({error!r})") from None
    return document


def file_name(section: str, document: dict) -> str:
    """Such as rs_rmsnorm_1xh100_8_ranks.json: the section, the devices by their shortest name, the ranks."""
    machine = document["machine"]
    gpu = re.search(r"[A-Z]+\d+\w*", machine["gpu"] or "")
    device = f"{machine['gpus']}x{gpu.group().lower()}" if gpu else machine["device"]
    return f"{section}_{device}_{document['options']['world_size']}_ranks.json"


def device_name(machine: dict) -> str:
    if machine["gpu"]:
        return f"{machine['gpus']} x {machine['gpu']}"
    return f"{machine['cpu']}, {machine['cores']} cores"


def short_commit(machine: dict) -> str:
    """What a table or a picture calls it."""
    commit, *dirty = (machine["commit"] or "unknown").split("-")
    return "-".join([commit[:12], *dirty])


def variant_meaning(name: str) -> str:
    placed = {"staged": "its input staged by the kernel", "zero-copy": "its input read in place"}
    return placed.get(name) or f"grids of at most {ctas_of(name)} blocks"
