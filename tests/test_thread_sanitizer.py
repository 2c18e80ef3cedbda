"""The protocol under ThreadSanitizer: clean as it is, and caught when any of what orders the ranks is taken out.

ThreadSanitizer knows what C++ promises, not what this machine happens to do: an access that no release and acquire
order is a report, even where x86 would never reorder it.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-fsanitize=thread", "-march=x86-64-v3", "-ffp-contract=off"]
ROUNDS = 2000
# How a fault shows. A rank that comes late may acquire a peer's later epoch: what it reads then is in order, and wrong.
CAUGHT = re.compile(r"^WARNING: ThreadSanitizer: data race|^rank \d+, round \d+, \d+ tokens: wrong$", re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def sanitizer(tmp_path_factory):
    source = tmp_path_factory.mktemp("probe") / "probe.cpp"
    source.write_text("int main() {}\n")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    probe = run(COMPILER, *FLAGS, str(source), "-o", str(source.with_suffix("")))
    if probe.returncode:
        pytest.skip(f"{COMPILER} has no ThreadSanitizer for x86-64-v3: {probe.stderr}")


def run(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def copy_of_csrc(folder: Path) -> Path:
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cuda"))
    return folder / "csrc"


def build(folder: Path, kept: Path, units: list[Path], others: list[str] = ()) -> tuple[Path, list[str]]:
    """The program of `units`, compiled with the folder's csrc, and of object files that are there already."""
    keep = [sys.executable, str(ROOT / "tests/kept_objects.py"), str(kept)]

    def compile(unit: Path) -> str:
        compiled = str(folder / f"{unit.stem}.o")
        done = run(*keep, COMPILER, *FLAGS, f"-I{folder}/csrc", "-c", str(unit), "-o", compiled)
        assert done.returncode == 0, done.stderr
        return compiled

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        objects = list(executor.map(compile, units))
    program = folder / "threads_as_ranks"
    done = run(COMPILER, "-fsanitize=thread", *objects, *others, "-lrt", "-o", str(program))
    assert done.returncode == 0, done.stderr
    return program, objects


@pytest.fixture(scope="module")
def clean(tmp_path_factory, kept) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("clean")
    units = [*copy_of_csrc(folder).glob("cpu/*.cpp"), ROOT / "tests/cpp/threads_as_ranks.cpp"]
    return build(folder, kept, units)


def watch(program: Path) -> subprocess.CompletedProcess:
    # Where addresses are randomised too widely, ThreadSanitizer does not start.
    fixed = ["setarch", "-R"] if shutil.which("setarch") and run("setarch", "-R", "true").returncode == 0 else []
    return run(*fixed, str(program), str(ROUNDS))


def test_the_protocol_is_clean(clean):
    done = watch(clean[0])
    assert done.returncode == 0 and done.stderr == "", done.stderr[:4000]
    assert done.stdout == f"{ROUNDS} rounds of 4 ranks\n"


# What is changed, and a unit that holds it (the others are taken as they are: compiling them all takes long).
MUTATIONS = {
    "publishing without release": ("protocol.h", "order::memory_order_release", "order::memory_order_relaxed", "round"),
    "observing without acquire": ("protocol.h", "order::memory_order_acquire", "order::memory_order_relaxed", "round"),
    "no closing synchronisation": ("cpu/round.cpp", "if (zero_copy) {", "if (false) {", "round"),
    "no wait": ("protocol.h", "if (reached(epoch_of(*seen), epoch)) {", "if (true) {", "round"),
    "one staging slot": ("protocol.h", "(epoch & 1) * slot_bytes", "0 * slot_bytes", "rs_rmsnorm"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_taken_out_is_missed(clean, kept, tmp_path, mutation):
    name, present, instead, unit = MUTATIONS[mutation]
    csrc = copy_of_csrc(tmp_path)
    text = (csrc / name).read_text()
    assert present in text, f"{name} has no {present!r} any more: change this test with it"
    (csrc / name).write_text(text.replace(present, instead))
    others = [compiled for compiled in clean[1] if Path(compiled).stem != unit]
    done = watch(build(tmp_path, kept, [csrc / f"cpu/{unit}.cpp"], others)[0])
    assert done.returncode != 0
    assert CAUGHT.search(done.stderr), done.stderr[:4000]
