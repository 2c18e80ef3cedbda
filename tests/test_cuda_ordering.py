"""The orders that the protocol asks a GPU for. On a card, litmus tests find nothing wrong, and something with an order
weakened.

tests/cuda/ordering.cu makes the litmus tests of the product's headers. It is compiled as it is, and once for each
acquire, release, fence or wait that can be taken out (tests/cuda/weakened.cuh). Not every weakening shows on every
card: so the machine code is read, too, without one. What is taken out has to have been an instruction.

    python3 tests/test_cuda_ordering.py       on a card: what each litmus test finds in each program. Needs no build.
"""

import collections
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "cuda" / "ordering.cu"
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90a", f"-I{ROOT / 'csrc'}")
NVCC = shutil.which(
    os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
)
SOUND = "SOUND"  # nothing is weakened
LITMUS_TESTS = (
    "stored_and_cached",
    "stored_and_loaded",
    "stored_and_copied",
    "moved_in_bulk",
    "own_rows",
    "reused_buffers",
    "rows_in_place",
    "posted_rows",
    "finished_tiles",
    "fault_records",
)

# What is weakened, and which instructions a litmus test then has fewer of. An arrival only loses what it hangs on.
LOST = {
    "PUBLISH_RELEASE": ("rows_in_place", {"MEMBAR.ALL.SYS"}),
    "OBSERVE_ACQUIRE": ("stored_and_cached", {"CCTL.IVALL"}),
    "RELAXED_LOAD": ("posted_rows", {"LDG.E.128.STRONG.SYS"}),
    "REPORT_FENCE": ("fault_records", {"MEMBAR.SC.SYS", "CCTL.IVALL"}),
    "REPORT_RELEASE": ("fault_records", {"MEMBAR.ALL.SYS"}),
    "NOTIFIED_ACQUIRE": ("stored_and_cached", {"CCTL.IVALL"}),
    "COUNT_ACQ_REL": ("finished_tiles", {"MEMBAR.ALL.GPU", "CCTL.IVALL"}),
    "COUNT_ACQUIRE": ("finished_tiles", {"CCTL.IVALL"}),
    "FENCE_ASYNC_SHARED": ("moved_in_bulk", {"FENCE.VIEW.ASYNC.S", "MEMBAR.ALL.CTA"}),
    "FENCE_ASYNC_GLOBAL": ("moved_in_bulk", {"FENCE.VIEW.ASYNC.G"}),
    "BULK_WAIT_READ": ("moved_in_bulk", {"DEPBAR.LE"}),
    "BULK_WAIT_ALL": ("moved_in_bulk", {"DEPBAR.LE", "CCTL.IVALL"}),
    "ARRIVE_HAVING": ("reused_buffers", set()),
    "SYNC_HAVING": ("rows_in_place", {"BAR.RED.POPC.DEFER_BLOCKING"}),
}
# Those that are taken out together where machine code is read: none changes a litmus test that another one is seen in.
TOGETHER = (
    ("PUBLISH_RELEASE",),
    ("OBSERVE_ACQUIRE",),
    ("REPORT_FENCE",),
    ("REPORT_RELEASE",),
    ("NOTIFIED_ACQUIRE",),
    ("FENCE_ASYNC_SHARED", "COUNT_ACQ_REL", "RELAXED_LOAD", "SYNC_HAVING"),
    ("FENCE_ASYNC_GLOBAL", "COUNT_ACQUIRE", "ARRIVE_HAVING"),
    ("BULK_WAIT_READ",),
    ("BULK_WAIT_ALL",),
)
ARRIVAL = r"SYNCS\.ARRIVE\.TRANS64\.A1T0"
ORDERS = r"MEMBAR|CCTL|FENCE|DEPBAR|BAR\.RED|LDG.*\.STRONG"

# The weakenings that show on one H200, and the litmus tests that show them: at least one of each line's has to.
SEEN = {
    "PUBLISH_RELEASE": ("stored_and_cached", "stored_and_loaded", "stored_and_copied", "rows_in_place"),
    "OBSERVE_ACQUIRE": ("stored_and_cached", "stored_and_loaded", "finished_tiles"),
    "COUNT_ACQ_REL": ("finished_tiles",),
    "COUNT_ACQUIRE": ("finished_tiles",),
    "FENCE_ASYNC_SHARED": ("moved_in_bulk",),
    "FENCE_ASYNC_GLOBAL": ("own_rows",),
    "BULK_WAIT_READ": ("moved_in_bulk",),
    "ARRIVE_HAVING": ("reused_buffers",),
    "SYNC_HAVING": ("rows_in_place",),
}
SOUND_S, SEEN_S, TABLE_S = 0.5, 3.0, 0.15  # of each litmus test


def compile(folder: Path, weakening: str, *options: str) -> Path:
    """The program, with an order weakened, or several: FENCE_ASYNC_SHARED|COUNT_ACQUIRE."""
    compiled = folder / weakening
    weakened = [] if weakening == SOUND else [f"-DTPF_WEAKEN={weakening}"]
    assert NVCC, "there is no nvcc"
    command = [NVCC, *FLAGS, *options, *weakened, "-o", str(compiled), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return compiled


def for_each(weakenings, function) -> dict:
    """function(weakening) by weakening, on all cores: it starts processes."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        return dict(zip(weakenings, executor.map(function, weakenings), strict=True))


def watch(program: Path, litmus_tests, seconds: float) -> dict[str, dict]:
    """What each litmus test finds, in so many seconds at most: ordering.cu's lines."""
    # Not under MPS, where a program that has to be stopped takes others with it.
    environment = {name: text for name, text in os.environ.items() if name != "CUDA_MPS_PIPE_DIRECTORY"}
    command = [str(program), str(seconds), *litmus_tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    lines = {line["litmus"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 3 or list(lines) == list(litmus_tests), done.stdout  # 3: one does not end
    return lines


def wrong(lines: dict[str, dict]) -> dict[str, dict]:
    return {litmus: line for litmus, line in lines.items() if line["wrong"] or line["faults"] or not line["ends"]}


@pytest.fixture(scope="module")
def programs(device, tmp_path_factory) -> dict[str, Path]:
    torch = pytest.importorskip("torch")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the litmus tests are compiled for sm_90a")
    folder = tmp_path_factory.mktemp("programs")
    return for_each((SOUND, *SEEN), lambda name: compile(folder, name))


@pytest.mark.cuda
def test_the_orders_suffice(device, programs):
    lines = watch(programs[SOUND], LITMUS_TESTS, SOUND_S)
    assert not wrong(lines) and len(lines) == len(LITMUS_TESTS)


@pytest.mark.cuda
@pytest.mark.parametrize("weakening", SEEN)
def test_a_weakened_order_is_seen(device, programs, weakening):
    lines = watch(programs[weakening], SEEN[weakening], SEEN_S)
    assert wrong(lines), lines


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory) -> dict[str, dict[str, list]]:
    """The kernels as they are, and of each weakening the one that loses something."""
    from test_cuda_binary import run  # it imports the library, which the litmus tests do without

    if NVCC is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("cubins")

    def disassembled(names: tuple[str, ...]) -> dict[str, list]:
        litmus_tests = sorted({LOST[name][0] for name in (LOST if names == (SOUND,) else names)})
        only = f"-DTPF_LITMUS={'+'.join(litmus_tests)}"
        return sass.functions(run("nvdisasm", "-c", "-hex", "-ndf", compile(folder, "|".join(names), "-cubin", only)))

    found = for_each(((SOUND,), *TOGETHER), disassembled)
    return {name: code for names, code in found.items() for name in names}


def order_counts(code: list) -> collections.Counter:
    opcodes = [item.opcode for item in code if isinstance(item, sass.Instruction)]
    return collections.Counter(opcode for opcode in opcodes if re.match(ORDERS, opcode))


@pytest.mark.parametrize("weakening", LOST)
def test_an_order_is_in_the_machine_code(machine_code, weakening):
    litmus, lost = LOST[weakening]
    sound, weakened = (machine_code[name][litmus] for name in (SOUND, weakening))
    assert set(order_counts(sound) - order_counts(weakened)) == lost
    assert not order_counts(weakened) - order_counts(sound)
    if weakening != "ARRIVE_HAVING":
        return
    # An arrival either hangs on what has been read, or comes while it is still being read.
    for code, waits in ((sound, True), (weakened, False)):
        arrivals = [
            i for i, item in enumerate(code) if isinstance(item, sass.Instruction) and re.match(ARRIVAL, item.text)
        ]
        assert arrivals and [sass.hangs_on(code, index, "LDS") for index in arrivals] == [waits] * len(arrivals)
        assert (sass.outstanding_loads(code, "LDS", ARRIVAL) == []) == waits


def test_all_weakenings_are_known():
    header = SOURCE.with_name("weakened.cuh").read_text()
    assert re.findall(r"^#define (\w+) \d+$", header, re.MULTILINE) == list(LOST)
    assert set(SEEN) <= set(LOST)
    assert sorted(name for names in TOGETHER for name in names) == sorted(LOST)
    # Each of those that are taken out together is seen in a litmus test of its own.
    assert all(len({LOST[name][0] for name in names}) == len(names) for names in TOGETHER)


def main(weakenings: list[str]) -> None:
    """Prints what is found in each program; of `weakenings` alone, if there are any. Fails as the tests do."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        programs = for_each(weakenings or (SOUND, *LOST), lambda name: compile(Path(folder), name))
        for name, program in programs.items():
            lines = watch(program, LITMUS_TESTS, SOUND_S if name == SOUND else TABLE_S)
            found = wrong(lines)
            print(name)
            for litmus, line in found.items():
                ending = "" if line["ends"] else ", and does not end"
                print(f"  {litmus}: {line['wrong']} wrong, {line['faults']} faults in {line['rounds']} rounds{ending}")
            nothing = [f"{litmus} ({line['rounds']})" for litmus, line in lines.items() if litmus not in found]
            print("  nothing in so many rounds:", ", ".join(nothing), flush=True)
            if found if name == SOUND else name in SEEN and not found.keys() & set(SEEN[name]):
                failed.append(name)
    if failed:
        sys.exit(f"not as expected: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
