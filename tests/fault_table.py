"""The table of docs/reliability.md: what came of every situation of fault_situations.py, in words.

python -m pytest tests/test_fault_table.py --fault-table faults.json                     on a CPU
python -m pytest tests/test_fault_table.py --fault-table faults.json --device cuda       under tools/with_mps.sh
python tests/fault_table.py faults.json                                                  writes the page

With --fault-table a test fails where a rank hears of a fault more than a second after the deadline. Without it busy
machines have more time.
"""

import json
import pathlib
import re
import sys

from fault_situations import ODD, SITUATIONS, Step

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: written by tests/fault_table.py -->", "<!-- end of faults -->"
COLUMNS = ("cpu W=4", "cuda W=4", "cuda W=8")
NOT_RUN = "not run"

# What a rank is told, by the cause that its message names. Whoever has given up tells its peers why.
WORDS = {
    "disagrees": r"rank {odd} called with .*, rank \d with|rank \d called with .*, rank {odd} with",
    "never arrived": r"rank {odd} never arrived",
    "died": r"the process of rank {odd} ended",
    "closed": r"rank {odd} closed its workspace",
    "overlaps": r"began on rank \d before the workspace's call before it had ended",
}
REFUSED = r"has no workspace|is closed|must be one of|fork"  # before anything is launched


def word_of(step: Step, odd: str = str(ODD)) -> str:
    """The word for what a rank came upon; "unclear" where the message does not name the cause, and the rank with it.

    `odd`: a pattern of the ranks that may be named.
    """
    if step.found in ("right", "wrong"):
        return step.found
    if step.found != "CollectiveFault":
        return "refused" if re.search(REFUSED, step.text) else "unclear"
    patterns = {word: pattern.replace("{odd}", odd) for word, pattern in WORDS.items()}
    return next((word for word, pattern in patterns.items() if re.search(pattern, step.text)), "unclear")


def _words(role: str, told: dict) -> str:
    word = "right numbers" if told["word"] == "right" else told["word"]
    return word if role == "peers" else f"{'the child' if role == 'child' else 'itself'}: {word}"


def cell(observed: dict[str, dict]) -> str:
    """Of {op: {role: {"word", "at_the_deadline"}}}: what most ops came upon, and then which did not."""
    by_words: dict[str, list[str]] = {}
    for op, roles in observed.items():
        peers = roles["peers"]
        said = _words("peers", peers)
        if peers["word"] != "right":
            said += ", at the deadline" if peers["at_the_deadline"] else ", at once"
        others = {role: told for role, told in roles.items() if role != "peers" and told["word"] != peers["word"]}
        by_words.setdefault("; ".join([said, *(_words(*other) for other in others.items())]), []).append(op)
    most, *rest = sorted(by_words, key=lambda said: -len(by_words[said]))
    return ". ".join([most, *(f"{', '.join(f'`{op}`' for op in by_words[said])}: {said}" for said in rest)])


def cells(page: str) -> dict[str, dict[str, str]]:
    """{situation: {column: cell}} as the page has it."""
    lines = page[page.index(BEGIN) : page.index(END)].splitlines()
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    if not rows:
        return {}
    names = {situation.title: name for name, situation in SITUATIONS.items()}
    return {names.get(row[0], row[0]): dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}


def write(page: str, observed: dict[str, dict]) -> str:
    """The page, with what was observed in the columns of `observed`; the other columns stay as they are."""
    before = cells(page)
    lines = [f"| what rank {ODD} does | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name, situation in SITUATIONS.items():
        row = before.get(name, {})
        for column in COLUMNS:
            if getattr(situation, column.split()[0]) is None:
                row[column] = "-"
            elif name in observed.get(column, {}):
                row[column] = cell(observed[column][name])
        lines.append(f"| {situation.title} | {' | '.join(row.get(column, NOT_RUN) for column in COLUMNS)} |")
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return "\n".join([page[:begin], *lines, page[end:]])


if __name__ == "__main__":
    observed: dict[str, dict] = {}
    for path in sys.argv[1:]:
        for column, rows in json.loads(pathlib.Path(path).read_text()).items():
            observed.setdefault(column, {}).update(rows)
    PAGE.write_text(write(PAGE.read_text(), observed))
