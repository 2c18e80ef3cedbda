"""The protocol as a Promela model (models/): what is proven of it, and that each classic bug is found."""

import concurrent.futures
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[1] / "models" / "protocol.pml"
COMPILER = os.environ.get("CC", "gcc")
OPS = {"stage": 1, "post": 2, "place": 3, "gather": 4, "ag_stage": 5, "ag_post": 6, "ag_place": 7}
OPS |= {"ag_post_once": 8, "ag_place_once": 9}

pytestmark = [
    pytest.mark.skipif(shutil.which("spin") is None, reason="there is no spin (a Debian package)"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}"),
]


def ops(names: str) -> str:
    return f"OPS={sum(1 << OPS[name] for name in names.split())}"


ALL = " ".join(OPS)
ALL_CPU = "stage place gather ag_stage ag_place"  # there are no inboxes
ONE_FAULT = ("N=3", "TIMEOUTS=1")

RIGHT = {
    "cuda, all ops": ("N=3", ops(ALL)),
    "cpu, all ops": ("N=3", "CPU", ops(ALL_CPU)),
    "two chunks": ("N=3", "CHUNKS=2", ops("ag_stage")),
    "four ranks, rs_rmsnorm_ag": ("N=4", "AT_ONCE", ops("ag_stage")),
    "every rank finishes every call": ("N=3", "LIVE", ops("stage place")),
    "four ranks, every rank finishes every call": ("N=4", "AT_ONCE", "LIVE", ops("stage")),
    "a rank gives up, staged": (*ONE_FAULT, ops("stage")),
    "a rank gives up, posted": (*ONE_FAULT, ops("post")),
    "a rank gives up, in place": (*ONE_FAULT, ops("place")),
    "a rank gives up, ag in place": (*ONE_FAULT, ops("ag_place")),
    "a rank gives up, ag posted in one round": (*ONE_FAULT, ops("ag_post_once")),
    "a rank gives up, ag in place in one round": (*ONE_FAULT, ops("ag_place_once")),
    "cpu, a rank gives up or dies, in place": (*ONE_FAULT, "CPU", "DEATHS=1", ops("place")),
    "cpu, a rank gives up or dies, ag in place": (*ONE_FAULT, "CPU", "DEATHS=1", ops("ag_place")),
    "cpu, a rank gives up or dies, projection": (*ONE_FAULT, "CPU", "DEATHS=1", ops("gather")),
    # Either of the two is enough where a rank gives up before the closing step.
    "a rank gives up and closes all the same": (*ONE_FAULT, "BUG_CLOSES_ANYWAY", ops("place")),
    "nobody looks again": (*ONE_FAULT, "ONLY_OPENING", "BUG_NO_LOOK_AGAIN", ops("place")),
}

# Larger searches: TP_FUSED_MODELS=all.
LARGE = {
    "four ranks, staged and in place": ("N=4", "AT_ONCE", ops("stage place")),
    "four ranks, every rank finishes every call, staged and in place": ("N=4", "AT_ONCE", "LIVE", ops("stage place")),
    "a rank calls another op": ("N=3", "MISTAKES=1", ops("stage place")),
    "a rank calls another op, ag in one round": ("N=3", "MISTAKES=1", ops("ag_post_once ag_place_once")),
    "a rank gives up, two chunks": (*ONE_FAULT, "CHUNKS=2", ops("gather ag_place")),
    "a rank gives up, cuda, all ops": (*ONE_FAULT, ops(ALL)),
    "cpu, a rank gives up or dies, all ops": (*ONE_FAULT, "CPU", "DEATHS=1", ops(ALL_CPU)),
}

WRONG = {
    "== for >=": ("N=3", "BUG_EQUAL", ops("stage")),
    "one slot for two": ("N=3", "BUG_ONE_SLOT", ops("stage")),
    "an inbox cleared in the next round": ("N=3", "BUG_CLEAR_LATE", ops("post")),
    "one inbox for two": ("N=3", "BUG_ONE_INBOX", ops("post")),
    "normalised rows posted over those to be added up": ("N=3", "BUG_ONE_PART", ops("ag_post_once")),
    "no closing synchronisation": ("N=3", "BUG_NO_CLOSING", ops("place")),
    "published before it is written": ("N=3", "BUG_PUBLISH_FIRST", ops("stage")),
    "epochs compared unsigned": ("N=3", "BUG_UNSIGNED", ops("stage")),
    "gathering in the slot of the reducing round": ("N=3", "BUG_GATHER_IN_SAME_SLOT", ops("ag_stage")),
    "a word that no call has used for all epochs": ("N=3", "BUG_UNUSED_WORD", ops("stage place")),
    "no look after the closing step": ("N=3", "TIMEOUTS=1", "BUG_NO_LOOK_AGAIN", ops("place")),
    "no look after the gather": ("N=3", "TIMEOUTS=1", "BUG_NO_LOOK_AGAIN", ops("ag_place")),
    "no look after the gather, in one round": ("N=3", "TIMEOUTS=1", "BUG_NO_LOOK_AGAIN", ops("ag_place_once")),
    # Why `all_arrived` looks once, after all waits.
    "a look that does not wait for the gather": ("N=3", "TIMEOUTS=1", "BUG_LOOK_EARLY", ops("ag_place")),
    "a rank that is told leaves its other waits": ("N=3", "CHUNKS=2", "TIMEOUTS=1", "BUG_LEAVE_WAITS", ops("ag_place")),
    "cpu, no look, a rank gives up": ("N=3", "CPU", "TIMEOUTS=1", "BUG_NO_LOOK_AGAIN", ops("place")),
    "cpu, no look, a rank dies while it closes": ("N=3", "CPU", "DEATHS=1", "BUG_NO_LOOK_AGAIN", ops("place")),
    "a rank tells its peers after its caller": ("N=3", "TIMEOUTS=1", "BUG_NOTIFIES_LATE", ops("place")),
    "a rank that gave up closes": (
        *("N=3", "TIMEOUTS=1", "ONLY_OPENING", "BUG_NO_LOOK_AGAIN", "BUG_CLOSES_ANYWAY"),
        ops("place"),
    ),
    "a rank that gave up multiplies into its slot": ("N=3", "CPU", "TIMEOUTS=1", "BUG_CALLS_INTO_SLOT", ops("gather")),
}


def search(folder: Path, *defines: str) -> str:
    """What spin's verifier says of the model with these definitions."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    live = "LIVE" in defines
    run("spin", *[f"-D{define}" for define in defines], "-a", str(MODEL))
    run(COMPILER, "-O0", "-w", "-DCOLLAPSE", "-DMEMLIM=2000", *[] if live else ["-DSAFETY"], "-o", "pan", "pan.c")
    return run("./pan", "-w20", "-m1000000", *["-a"] if live else [])  # a hash table of 8 MB, instead of 128


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """{model: what is said of it, in a future} of all that are asked for; as many searches at a time as cores."""
    tests = (test_the_protocol_is_right, test_bugs_are_found)
    asked = [item.callspec.params["model"] for item in request.session.items if item.function in tests]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        folder = tmp_path_factory.mktemp
        yield {model: executor.submit(search, folder("model"), *(RIGHT | WRONG)[model]) for model in asked}
        executor.shutdown(cancel_futures=True)


def errors(report: str) -> int:
    assert "max search depth too small" not in report, report
    assert "out of memory" not in report, report
    return int(re.search(r"errors: (\d+)", report)[1])


@pytest.mark.parametrize("model", RIGHT)
def test_the_protocol_is_right(reports, model):
    report = reports[model].result()
    assert errors(report) == 0, report
    assert "Search not completed" not in report, report


@pytest.mark.parametrize("model", LARGE)
@pytest.mark.skipif(os.environ.get("TP_FUSED_MODELS") != "all", reason="a larger search: TP_FUSED_MODELS=all")
def test_larger_searches(tmp_path, model):
    report = search(tmp_path, *LARGE[model])
    assert errors(report) == 0, report
    assert "Search not completed" not in report, report


@pytest.mark.parametrize("model", WRONG)
def test_bugs_are_found(reports, model):
    assert errors(reports[model].result()) > 0
