"""tp_fused.launch, as a program that starts its ranks uses it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tp_fused.launch import launch

PROGRAM = """
import gc
from tp_fused.launch import launch

def main(lower):
    assert gc.get_freeze_count() > lower

if __name__ == "__main__":
    launch(main, 2, LOWER)
    print("all ranks are right")
"""


def run(tmp_path: Path, lower: int) -> subprocess.CompletedProcess:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("LOWER", str(lower)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, env=environment)


def test_ranks_are_forked_with_all_that_was_imported_frozen(tmp_path):
    done = run(tmp_path, lower=10000)  # torch alone makes ten times as many objects
    assert done.stdout == "all ranks are right\n", done.stderr


def test_what_a_rank_raises_is_raised_by_launch(tmp_path):
    done = run(tmp_path, lower=10**9)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((print, 0), ValueError, "world_size must be positive, got 0"),
        ((print, -1), ValueError, "world_size must be positive, got -1"),
        ((print, "2"), TypeError, "world_size must be an integer, got '2'"),
        ((None, 2), TypeError, "main must be a function, got None"),
    ],
)
def test_what_cannot_be_launched(arguments, kind, message):
    with pytest.raises(kind) as error:
        launch(*arguments)
    assert str(error.value) == message
