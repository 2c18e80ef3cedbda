"""Every kernel under compute-sanitizer: `make gpu-sanitize`, or some of its tools: `tools/sanitize.py racecheck`.

compute-sanitizer does not work under MPS. Two ranks take turns on a card here, and a barrier takes milliseconds.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# By tool, the options that only it has. torch asks for memory that other hosts could map, and a refusal is an answer.
# initcheck also reports torch's own kernels, which read whole vectors, and copies to the host of what TMA has written,
# of which it knows nothing: these are counted and not held against us, so all reports have to be printed. It must watch
# them all the same: it learns from them what has been written.
TOOLS = {
    "memcheck": ("--report-api-errors", "no", "--print-limit", "20"),
    "racecheck": ("--print-limit", "20"),
    "initcheck": ("--print-limit", "10000000", "--show-backtrace", "no"),
    "synccheck": ("--print-limit", "20"),
}
LIMIT_S = 200  # for one tool
OPTIONS = ("--target-processes", "all", "--require-cuda-init", "no")
OURS = "tpf"  # the namespace of our kernels, mangled or not

# The first line of a report says what was found, and the next one in which kernel.
REPORT = re.compile(r"^=+ (?!\s)(?!COMPUTE|.*SUMMARY)(.+)\n=+\s+at (.+)$", re.MULTILINE)
HOST_COPY = re.compile(r"^=+ Host API memory access error", re.MULTILINE)
RACE = re.compile(r"Race reported between (\w+ access) at (.+)")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def find_sanitizer() -> str:
    nvcc = shutil.which("nvcc")
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    found = shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders, "/usr/local/cuda/bin"])
    )
    return found or sys.exit("compute-sanitizer is missing: it comes with the CUDA toolkit")


def digest(output: str) -> collections.Counter:
    """How often each finding was reported of each kernel: offsets, addresses and template arguments left out."""
    reports = [*REPORT.findall(output), *(("a race with a " + what, place) for what, place in RACE.findall(output))]
    short = ((re.sub(r"0x[0-9a-f]+", "", what), re.split(r"[<(+]", place)[0]) for what, place in reports)
    return collections.Counter(f"{what.strip()} at {place.removeprefix('void ')}" for what, place in short)


def findings(tool: str, output: str) -> int | None:
    """How many count; None where the tool has not come to its end."""
    summaries = [int(number) for number in SUMMARY.findall(output)]
    if not summaries or tool != "initcheck":
        return sum(summaries) if summaries else None
    reports = REPORT.findall(output)
    others = sum(OURS not in place for _, place in reports) + len(HOST_COPY.findall(output))
    return sum(summaries) - others


def excerpt(output: str) -> str:
    """The reports of our kernels, and how it ended: all of it can be a hundred megabytes."""
    lines = output.splitlines()
    ours = [i for i, line in enumerate(lines) if OURS in line]
    kept = sorted({i for at in ours[:100] for i in range(at - 1, at + 4)} | set(range(len(lines))[-60:]))
    return "\n".join(lines[i] for i in kept if 0 <= i < len(lines))


def watch(sanitizer: str, tool: str) -> str | None:
    """Runs the cases under one tool; what is wrong, if anything."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as no_daemon:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # each tensor has an end of its own
            "CUDA_MPS_PIPE_DIRECTORY": no_daemon,
        }
        options = ["--tool", tool, *TOOLS[tool], *OPTIONS]
        command = [sanitizer, *options, sys.executable, str(ROOT / "tools" / "sanitize_cases.py"), "cuda", tool]
        run = ["timeout", "--kill-after", "10", str(LIMIT_S), *command]
        done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    took = f"{time.monotonic() - begin:.0f} s"
    cases = re.search(r"^\d+ calls on \d+ ranks went as they should$", done.stdout, re.MULTILINE)
    found = findings(tool, done.stdout)
    if done.returncode == 0 and cases and found == 0:
        print(f"{tool}: 0 errors in {took}; {cases[0]}", flush=True)
        return None
    print(excerpt(done.stdout))
    reason = "no summary" if found is None else f"{found} errors" if found else "the cases did not end well"
    counts = "".join(f"\n  {count} x {what}" for what, count in digest(done.stdout).most_common(30))
    return f"{tool}: {reason} in {took} (exit code {done.returncode}), see above{counts}"


def main() -> None:
    tools = sys.argv[1:] or list(TOOLS)
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        sys.exit(f"there is no tool {', '.join(unknown)}: choose from {', '.join(TOOLS)}")
    sanitizer = find_sanitizer()
    wrong = [message for tool in tools if (message := watch(sanitizer, tool))]
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
