"""Draws the pictures of docs/images that show results: `python docs/plots.py`.

How many times as long as the op other programs take, over tokens. Plain SVG, so that the words can be searched and the
colours follow the reader's.
"""

import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 40, 230, 44, 44
COLOURS = {  # for readers whose system is light, and dark
    "own": ("#0a7d5a", "#3ccf9e"),
    "c0": ("#c0392b", "#ff8a7a"),
    "c1": ("#7d5ba6", "#c5a3f0"),
    "c2": ("#a0660c", "#f0c060"),
    "c3": ("#2b6cb0", "#7fb8f0"),
    "grid": ("#ddd", "#3a3f4b"),
}


def style() -> str:
    light, dark = (
        "\n".join(f"path.{name} {{ stroke: {of[i]} }} text.{name} {{ fill: {of[i]} }}" for name, of in COLOURS.items())
        for i in (0, 1)
    )
    return f"""<style>
text {{ font: 13px system-ui, sans-serif; fill: #333 }} .title {{ font-weight: 600 }} .small {{ font-size: 12px }}
path {{ fill: none; stroke-width: 2 }} path.grid {{ stroke-width: 1 }} .back {{ fill: #fff }}
{light}
@media (prefers-color-scheme: dark) {{
text {{ fill: #ddd }} .back {{ fill: #1e2129 }}
{dark}
}}
</style>"""


def draw(section: str, title: str, programs: dict[str, str], picture: Path) -> None:
    """programs: of the file of results, in the words of the picture."""
    document = json.loads((ROOT / f"bench/results/{section}.json").read_text())
    rows = [row for row in document["results"] if row["tokens"] > 0]
    tokens = [row["tokens"] for row in rows]
    lines = {
        words: [(row["tokens"], row["speedup"][program]) for row in rows if program in row["speedup"]]
        for program, words in programs.items()
    }
    ratios = [ratio for line in lines.values() for _, ratio in line]
    low, high = min(0.75, math.floor(min(ratios) * 4) / 4), math.ceil(max(ratios) * 4) / 4

    def x(count: int) -> float:
        span = math.log2(tokens[-1]) - math.log2(tokens[0])
        return LEFT + (math.log2(count) - math.log2(tokens[0])) / span * (WIDTH - LEFT - RIGHT)

    def y(ratio: float) -> float:
        return HEIGHT - BOTTOM - (ratio - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    machine, options = document["machine"], document["options"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        style(),
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text class="title" x="{LEFT}" y="22">{title}</text>',
    ]
    for step in (step / 2 for step in range(math.ceil(low * 2), math.floor(high * 2) + 1)):
        parts.append(f'<path class="{"own" if step == 1 else "grid"}" d="M{LEFT} {y(step):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="small" x="{LEFT - 6}" y="{y(step) + 4:.1f}" text-anchor="end">{step:g}</text>')
    parts.append(f'<text class="own" x="{WIDTH - RIGHT + 10}" y="{y(1) + 4:.1f}">tp_fused</text>')
    for count in tokens:
        shown = f"{count // 1024}K" if count >= 1024 else count
        parts.append(f'<text class="small" x="{x(count):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{shown}</text>')
    where = f"{machine['gpus']} x {machine['gpu']}, hidden {options['hidden']}, {options['dtype']}"
    below = f"tokens; {where}; commit {machine['commit'][:12]}"
    parts.append(f'<text class="small" x="{LEFT}" y="{HEIGHT - 6}">{below}</text>')
    taken = [y(1) + 4]
    for index, (words, line) in sorted(enumerate(lines.items()), key=lambda each: each[1][1][-1][1]):
        points = "L".join(f"{x(count):.1f} {y(ratio):.1f}" for count, ratio in line)
        parts.append(f'<path class="c{index}" d="M{points}"/>')
        place = y(line[-1][1]) + 4
        while any(abs(place - other) < 15 for other in taken):  # words do not cover each other
            place -= 1
        taken.append(place)
        parts.append(f'<text class="c{index}" x="{WIDTH - RIGHT + 10}" y="{place:.1f}">{words}</text>')
    picture.write_text("\n".join([*parts, "</svg>"]) + "\n")


def draw_all(folder: Path) -> None:
    took = "how many times as long as tp_fused"
    transport = "unfused, tp_fused's transport"
    programs = {
        "dist": "NCCL all-reduce",
        "twoshot": "torch's two-shot all-reduce",
        "dist-rs": "scattered, unfused, NCCL",
        "own-rs": "scattered, tp_fused's transport",
    }
    draw("chain_2xh200_2_ranks", f"rs_rmsnorm + qkv_a_proj_ag_norm: {took}", programs, folder / "chain.svg")
    programs = {"dist": "NCCL, add, norm", "own": transport, "symm": "torch reduce-scatter alone"}
    draw("rs_rmsnorm_2xh200_2_ranks", f"rs_rmsnorm: {took}", programs, folder / "rs_rmsnorm.svg")
    programs = {"dist": "cuBLAS, NCCL", "own": transport, "gemm": "cuBLAS alone, no gather"}
    draw("qkv_a_proj_ag_2xh200_2_ranks", f"qkv_a_proj_ag: {took}", programs, folder / "qkv_a_proj_ag.svg")


if __name__ == "__main__":
    draw_all(ROOT / "docs" / "images")
