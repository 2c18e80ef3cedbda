"""Pages of the documents: what they say, and their programs, which run on ranks of torchrun."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (ROOT / name).read_text()


def programs(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)


def command(name: str, word: str) -> list[str]:
    """The arguments behind the word, of the one command of a page's that has it."""
    lines = "".join(programs(name, "sh")).replace("\\\n", " ").splitlines()
    (words,) = [words for line in lines if word in (words := shlex.split(line, comments=True))]
    return words[words.index(word) + 1 :]


def run_on_ranks(script: Path, program: str, *arguments: str, num_ranks: int = 2, device: str = "cpu") -> str:
    """What it prints."""
    script.write_text(program + "\ndist.destroy_process_group()\n")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_ranks),
        str(script),
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
