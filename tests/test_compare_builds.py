"""tools/compare_builds.py, and whether what it calls without a header (tools/c_api.py) is what csrc/tp_fused.h says."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import c_api
from tp_fused.native import _C

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(_C.__file__).with_name("libtp_fused.so")


def test_structs_are_laid_out_as_in_the_header(tmp_path):
    layout = {f"sizeof({name})": ctypes.sizeof(struct) for name, struct in c_api.STRUCTS.items()}
    for name, struct in c_api.STRUCTS.items():
        layout |= {f"offsetof({name},{field})": getattr(struct, field).offset for field, _ in struct._fields_}
    prints = "".join(f'  printf("{question} %zu\\n", {question});\n' for question in layout)
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "tp_fused.h"\nint main(void) {{\n{prints}}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run(["cc", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True, timeout=60)
    told = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60).stdout
    assert {question: int(answer) for question, answer in map(str.split, told.splitlines())} == layout


def test_the_library_has_the_functions():
    library = ctypes.CDLL(str(LIBRARY))
    for name in (*c_api.FUNCTIONS, "tpf_region_bytes"):
        assert getattr(library, name)


def compare(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.compare_builds", str(LIBRARY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=ROOT)


def test_without_a_gpu_that_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = compare()
    assert done.returncode == 2 and "there is no GPU" in done.stderr


@pytest.mark.cuda
def test_builds_are_compared(device):
    done = compare(str(LIBRARY), "--cases", "barrier,64,512,proj512", "--rounds", "2", "--timeout", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" x") == 2 * 4 and "!" not in done.stdout.split("\n", 1)[1]


@pytest.mark.cuda
def test_one_rank_is_compared_with_torch(device):
    done = compare("--world-size", "1", "--cases", "512,proj512,proj512-fp8", "--rounds", "2", "--timeout", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.count(" x") for line in done.stdout.splitlines()[1:]] == [1, 2, 2]
