"""tools/cut_flashinfer.py, on a wheel that is laid out like FlashInfer's."""

import hashlib
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from tools import cut_flashinfer

ROOT = Path(__file__).resolve().parents[1]
ABOUT = "flashinfer_python-0.9.0.dist-info"
DATA = "flashinfer/data"
NEEDED = {
    "flashinfer/__init__.py": "raise AssertionError",
    "flashinfer/comm/__init__.py": "raise AssertionError",
    "flashinfer/comm/allreduce.py": """\
from typing import TYPE_CHECKING
from flashinfer.utils import helper
from . import peers
from .trtllm_ar import AllReduceFusionPattern
from ..fp4_quantization import _compute_swizzled_layout_sf_size
from ..jit import gen_trtllm_mnnvl_comm_module
if TYPE_CHECKING:
    from ..gemm import Gemm
def allreduce_fusion():
    from ..gemm import Gemm
def create_allreduce_fusion_workspace(): pass
""",
    "flashinfer/comm/peers.py": "",
    "flashinfer/comm/trtllm_ar.py": "try:\n    from ..jit.comm import source\nfinally:\n    pass\n"
    "class AllReduceFusionPattern: pass\n",
    "flashinfer/fi_trace.py": "",
    "flashinfer/fp4_quantization.py": "raise AssertionError",
    "flashinfer/jit/__init__.py": "raise AssertionError",
    "flashinfer/jit/comm.py": "def source(): pass\ndef gen_trtllm_mnnvl_comm_module(): pass\n",
    "flashinfer/jit/core.py": "class JitSpec: pass\n",
    "flashinfer/jit/env.py": "",
    "flashinfer/utils.py": "def helper(): pass\n",
    "flashinfer/version.py": "__version__ = '0.9.0'\n",
    f"{DATA}/csrc/trtllm_allreduce.cu": '#include <cuda.h>\n#include "beside.h"\n',
    f"{DATA}/csrc/trtllm_allreduce_fusion.cu": '  #  include "flashinfer/comm/fusion.cuh"\n',
    f"{DATA}/csrc/trtllm_moe_allreduce_fusion.cu": "",
    f"{DATA}/csrc/logging.cc": "#include <spdlog/spdlog.h>\n",
    f"{DATA}/csrc/beside.h": "",
    f"{DATA}/include/flashinfer/comm/fusion.cuh": '#include "../utils.cuh"\n',
    f"{DATA}/include/flashinfer/utils.cuh": "",
    f"{DATA}/spdlog/include/spdlog/spdlog.h": "",
}
OTHERS = {
    "flashinfer/gemm.py": "class Gemm: pass\n",
    "flashinfer/comm/other.py": "",
    f"{DATA}/csrc/gemm.cu": "",
    f"{DATA}/include/flashinfer/gemm.cuh": "",
}
LICENSE = f"{ABOUT}/licenses/LICENSE"
METADATA = """\
Metadata-Version: 2.4
Name: flashinfer-python
Version: 0.9.0
Requires-Dist: nvidia-cutlass-dsl>=4
Provides-Extra: cu13

Requires-Dist: is a word of the description, too.
"""


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "flashinfer_python-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**NEEDED, **OTHERS, LICENSE: "Apache", f"{ABOUT}/METADATA": METADATA}.items():
            archive.writestr(name, text)
        archive.writestr(f"{ABOUT}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return path


def test_what_is_needed_is_kept_as_it_is(wheel, tmp_path):
    written = cut_flashinfer.cut(wheel, tmp_path / "cut")
    assert written.name == "flashinfer_python-0.9.0+comm-py3-none-any.whl"
    about = "flashinfer_python-0.9.0+comm.dist-info"
    with zipfile.ZipFile(written) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    kept = {name for name in files if name.startswith("flashinfer/")}
    assert kept == set(NEEDED)
    for name in kept - cut_flashinfer.REPLACED.keys():
        assert files[name].decode() == NEEDED[name]
    assert files[f"{about}/licenses/LICENSE"] == b"Apache" and f"{about}/WHEEL" in files
    head, _, description = files[f"{about}/METADATA"].decode().partition("\n\n")
    assert "Version: 0.9.0+comm" in head and "cutlass" not in head and "Requires-Dist: apache-tvm-ffi" in head
    assert "Provides-Extra" not in head and description == METADATA.partition("\n\n")[2]
    for line in files[f"{about}/RECORD"].decode().splitlines()[:-1]:
        name, digest, size = line.split(",")
        expected = urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(files[name]))


def test_the_cut_package_is_imported(wheel, tmp_path):
    """In place of the files that would have imported the rest."""
    written = cut_flashinfer.cut(wheel, tmp_path / "cut")
    program = "from flashinfer.comm import allreduce_fusion, create_allreduce_fusion_workspace, AllReduceFusionPattern"
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(written)}, check=True, timeout=60)


def test_a_compiled_module_is_packed_where_flashinfer_looks(wheel, tmp_path):
    (tmp_path / "trtllm_comm.so").write_bytes(b"ELF")
    written = cut_flashinfer.cut(wheel, tmp_path / "cut", tmp_path / "trtllm_comm.so")
    with zipfile.ZipFile(written) as archive:
        assert archive.read(f"{DATA}/aot/trtllm_comm/trtllm_comm.so") == b"ELF"


def test_another_layout_is_refused(wheel, tmp_path):
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("flashinfer/__init__.py", "")
    with pytest.raises(ValueError, match=r"has no flashinfer/comm/__init__\.py, "):
        cut_flashinfer.cut(other, tmp_path)


def test_the_command(wheel, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tools" / "cut_flashinfer.py"),
        str(wheel),
        "-o",
        str(tmp_path / "new" / "folder"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "flashinfer_python-0.9.0+comm-py3-none-any.whl: 0.0 MiB" in done.stdout
