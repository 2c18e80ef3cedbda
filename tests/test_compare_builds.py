"""tools/compare_builds.py, and whether what it calls without a header (tools/c_api.py) is what csrc/tp_fused.h says."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tp_fused
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
    if not _C.cuda_compiled():
        with pytest.raises(ValueError, match=r"libtp_fused\.so has no tpf_rs_rmsnorm_cuda: it was built without"):
            c_api.load(LIBRARY)
        pytest.skip("needs a build with CUDA kernels")
    assert c_api.load(LIBRARY).tpf_region_bytes


def test_the_library_tells_its_version_and_the_sizes_of_structs():
    library = ctypes.CDLL(str(LIBRARY))
    for name, struct in c_api.STRUCTS.items():
        assert library.tpf_sizeof(name.encode()) == ctypes.sizeof(struct)
    assert library.tpf_sizeof(b"tpf_teams") == 0
    major, minor, patch = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", tp_fused.__version__).groups()
    assert library.tpf_version() == 10000 * int(major) + 100 * int(minor) + int(patch)


def test_a_build_with_other_structs_is_refused(monkeypatch):
    class Longer(c_api.Team):
        _fields_ = (("new", ctypes.c_int64),)

    here, there = ctypes.sizeof(Longer), ctypes.sizeof(c_api.Team)
    monkeypatch.setattr(c_api, "STRUCTS", {"tpf_team": Longer})
    words = rf"tpf_team has {there} bytes in {re.escape(str(LIBRARY))} \(version \d+\) and {here} in .*c_api\.py"
    with pytest.raises(ValueError, match=words):
        c_api.load(LIBRARY)


def test_a_build_that_tells_no_sizes_is_refused(tmp_path):
    library = tmp_path / "libtp_fused.so"
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", library], check=True, timeout=60)
    with pytest.raises(ValueError, match=r"libtp_fused\.so does not tell the sizes of its structs"):
        c_api.load(library)


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
