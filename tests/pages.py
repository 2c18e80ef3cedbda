"""Pages of the documents: what they say, and their programs, which run on ranks."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from ranks import run_program

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (ROOT / name).read_text()


def programs(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)


def commands(name: str, word: str) -> list[list[str]]:
    """The arguments behind the word, of each command of a page's that has it."""
    lines = "".join(programs(name, "sh")).replace("\\\n", " ").splitlines()
    found = [words for line in lines if word in (words := shlex.split(line, comments=True))]
    return [words[words.index(word) + 1 :] for words in found]


def command(name: str, word: str) -> list[str]:
    """The arguments behind the word, of the one command of a page's that has it."""
    (arguments,) = commands(name, word)
    return arguments


def run_on_ranks(folder: Path, program: str, *arguments: str, num_ranks: int = 2, device: str = "cpu") -> str:
    """What it prints; without a GPU on ranks that have torch already."""
    program += "\ndist.destroy_process_group()\n"
    if device == "cpu":
        return run_program(program, folder, num_ranks, *arguments, CUDA_VISIBLE_DEVICES="")
    return run_under_torchrun(folder / "program.py", program, *arguments, num_ranks=num_ranks)


def run_under_torchrun(script: Path, program: str, *arguments: str, num_ranks: int = 2, **environment: str) -> str:
    script.write_text(program)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *launcher, str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
