"""Every kernel under compute-sanitizer's memcheck and racecheck: `make gpu-sanitize`.

compute-sanitizer does not work under MPS. Two ranks take turns on a card here, and a barrier takes milliseconds.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# By tool, the options that only it has. torch asks for memory that other hosts could map, and a refusal is an answer.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
LIMIT_S = 270  # for one tool
OPTIONS = ("--target-processes", "all", "--error-exitcode", "1", "--require-cuda-init", "no", "--print-limit", "20")


def find_sanitizer() -> str:
    nvcc = shutil.which("nvcc")
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    found = shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders, "/usr/local/cuda/bin"])
    )
    return found or sys.exit("compute-sanitizer is missing: it comes with the CUDA toolkit")


def watch(sanitizer: str, tool: str) -> str | None:
    """Runs the cases under one tool; what is wrong, if anything."""
    with tempfile.TemporaryDirectory() as no_daemon:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # each tensor has an end of its own
            "CUDA_MPS_PIPE_DIRECTORY": no_daemon,
        }
        options = ["--tool", tool, *TOOLS[tool], *OPTIONS]
        command = [sanitizer, *options, sys.executable, str(ROOT / "tools" / "sanitize_cases.py")]
        run = ["timeout", "--kill-after", "10", str(LIMIT_S), *command]
        done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    cases = re.search(r"^\d+ calls on \d+ ranks went as they should$", done.stdout, re.MULTILINE)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", done.stdout)
    found = sum(map(int, summaries))
    if done.returncode == 0 and cases and summaries and found == 0:
        print(f"{tool}: 0 errors; {cases[0]}", flush=True)
        return None
    print(done.stdout)
    reason = "no summary" if not summaries else f"{found} errors" if found else "the cases did not end well"
    return f"{tool}: {reason} (exit code {done.returncode}), see above"


def main() -> None:
    sanitizer = find_sanitizer()
    wrong = [message for tool in TOOLS if (message := watch(sanitizer, tool))]
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
