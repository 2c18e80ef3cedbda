"""Faults, counted: every situation x every op, on a CPU and on cuda. By every survivor it is detected by name within
the deadline and a second, or rightly tolerated: no wrong number without an error, and no hang.
"""

import json
import pathlib

import fault_table
import pytest
from fault_situations import ODD, SITUATIONS, Step, come_about, deadline_of, expected
from programs import ALL_OPS
from ranks import BUSY_S, RankDied

WORLD_SIZES = {"cpu": [4], "cuda": [4, 8]}
SLACK_S = 1.0  # beyond the deadline: what docs/reliability.md promises, on a machine that does nothing else


def pytest_generate_tests(metafunc):
    if "world_size" in metafunc.fixturenames:
        metafunc.parametrize("world_size", WORLD_SIZES[metafunc.config.getoption("--device")])


def judged(name: str, op: str, device: str, steps: list[Step], slack_s: float) -> dict[str, dict]:
    """{role: {"word", "seconds", "at_the_deadline"}} of one op, or AssertionError."""
    deadline_s, words, told = deadline_of(name, op, device), expected(name, op, device), {}
    for role in words:
        of_role = [step for step in steps if step.role == role]
        assert of_role, f"{op}: nothing was heard of {role}"
        for step in of_role:
            word = fault_table.word_of(step, SITUATIONS[name].odd)
            assert word in words[role] | {"right"}, f"{op}, {role}: {word}, expected {words[role]}: {step}"
            assert step.seconds < deadline_s + slack_s, (
                f"{op}, {role}: {step.seconds:.1f} s, deadline {deadline_s} s: {step}"
            )
        seconds = max(step.seconds for step in of_role)
        told[role] = {"seconds": round(seconds, 3), "at_the_deadline": seconds >= deadline_s}
    return told


def survivors_words(name: str, op: str, device: str, by_rank: dict[int, list[Step]]) -> dict[str, set[str]]:
    """What each survivor came upon, all its steps taken together, by role."""
    found: dict[str, set[str]] = {}
    for rank, steps in by_rank.items():
        for role in {step.role for step in steps}:
            words = {fault_table.word_of(step, SITUATIONS[name].odd) for step in steps if step.role == role}
            allowed = expected(name, op, device)[role]
            heard = words & (allowed - {"right"}) or words & allowed
            assert heard, f"{op}: rank {rank} was not told: {steps}"
            found.setdefault(role, set()).update(heard)
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if SITUATIONS[name].cpu else pytest.mark.cuda) for name in SITUATIONS]
)
def test_every_op(pools, device, world_size, name, request):
    outcomes = pools(world_size).outcomes(come_about, name, device, timeout_s=120.0)
    survivors = {rank: result for rank, result in enumerate(outcomes) if not isinstance(result, RankDied)}
    assert (len(survivors) == world_size) == (name != "killed"), outcomes
    for result in survivors.values():
        if isinstance(result, Exception):
            raise result
    observed, path = {}, request.config.getoption("--fault-table")
    for op in ALL_OPS:
        steps_of_all = [step for steps in survivors.values() for step in steps[op]]
        told = judged(name, op, device, steps_of_all, SLACK_S if path else BUSY_S)
        for role, words in survivors_words(name, op, device, {r: steps[op] for r, steps in survivors.items()}).items():
            told[role]["word"] = " or ".join(sorted(words))
        observed[op] = told
    column = f"{device} W={world_size}"
    if path:
        add_to(pathlib.Path(path), column, name, observed)
    elif device == "cpu":
        page = fault_table.cells(fault_table.PAGE.read_text())
        assert page[name][column] == fault_table.cell(observed), "docs/reliability.md: see tests/fault_table.py"


def add_to(path: pathlib.Path, column: str, name: str, observed: dict) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(column, {})[name] = observed
    path.write_text(json.dumps(table, indent=1))


# ---- the page ----


def test_page_has_all_rows():
    page = fault_table.PAGE.read_text()
    assert list(fault_table.cells(page)) == list(SITUATIONS)
    assert fault_table.write(page, {}) == page


def told(peers: str, itself: str, at_the_deadline: bool = False) -> dict:
    return {"peers": {"word": peers, "at_the_deadline": at_the_deadline}, "itself": {"word": itself}}


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ({"a": told("right", "right")}, "right numbers"),
        ({"a": told("closed", "refused")}, "closed, at once; itself: refused"),
        (
            {"a": told("died", "died"), "b": told("never arrived", "refused", True), "c": told("died", "died")},
            "died, at once. `b`: never arrived, at the deadline; itself: refused",
        ),
    ],
)
def test_cell(observed, expected):
    assert fault_table.cell(observed) == expected


@pytest.mark.parametrize(
    ("found", "text", "word"),
    [
        ("right", "", "right"),
        ("CollectiveFault", f"op #2: rank {ODD} called with num_tokens=5, rank 0 with num_tokens=4", "disagrees"),
        ("CollectiveFault", "op #2: rank 2 called with num_tokens=5, rank 0 with num_tokens=4", "unclear"),
        ("CollectiveFault", "op #2: rank 2 has given up (op #2: rank 1 never arrived; it waited)", "never arrived"),
        ("CollectiveFault", "op #2: rank 2 never arrived", "unclear"),
        ("ValueError", "group '0' has no workspace for cpu tensors", "refused"),
        ("ValueError", "out of memory", "unclear"),
    ],
)
def test_word(found, text, word):
    """A message that names another rank, or another cause, does not count."""
    assert fault_table.word_of(Step("peers", found, text, 0.0)) == word


def test_where_no_rank_is_odd_any_may_be_named():
    text = "op #2: rank 2 called with rs_rmsnorm_ag, rank 0 with qkv_a_proj_ag_norm"
    situation = SITUATIONS["graph streams"]
    assert fault_table.word_of(Step("peers", "CollectiveFault", text, 0.0), situation.odd) == "disagrees"
    assert "disagrees" in expected("graph streams", "mla_prologue", "cuda")["peers"]
    assert "disagrees" not in expected("graph streams", "rs_rmsnorm", "cuda")["peers"]
